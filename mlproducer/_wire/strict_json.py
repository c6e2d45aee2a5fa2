"""Strict JSON (RFC 8259) in UTF-8: what any stock reader reads back as it was written.

Python's own encoder does the work. What a task may hold was checked when it was made (`shapes`);
what cannot be written all the same is refused by its field's name and type, never by its content.
Types beyond JSON's are written as kombu's JSON has them, which a stock Celery worker reads back.

Runs on: any thread.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from mlproducer.errors import InvalidMessageError

_ACCEPTED = "accepted are str, bool, None, int, finite float, list, tuple and dict"


def _as_kombu(value: object) -> dict[str, object]:
    """Give what ``kombu.utils.json`` makes of a value that JSON has no type for."""
    if isinstance(value, datetime):  # before date, which it is as well
        return _marked("datetime", datetime.isoformat(value))
    if isinstance(value, date):
        return _marked("date", date.isoformat(value))
    if isinstance(value, time):
        return _marked("time", time.isoformat(value))
    if isinstance(value, Decimal):
        return _marked("decimal", str(value))
    if isinstance(value, UUID):
        return _marked("uuid", {"hex": value.hex})
    if isinstance(value, bytes):
        try:
            return _marked("bytes", value.decode())
        except UnicodeDecodeError:
            return _marked("base64", base64.b64encode(value).decode())
    raise TypeError


def _marked(kind: str, value: object) -> dict[str, object]:
    return {"__type__": kind, "__value__": value}


_stock = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_kombu
)


@lru_cache(1)
def _fast() -> Callable[[object], bytes] | None:
    """Give orjson's encoder (the extra ``fast``), a third of the time of the stock one's."""
    try:
        import orjson  # noqa: PLC0415 - an extra, and not needed before the first message
    except ImportError:
        return None
    dumps: Callable[[object], bytes] = orjson.dumps
    return dumps


def _made_once() -> Callable[[object, int], Iterable[str]]:
    """Give what the stock encoder sets up anew for each value: value and indent in, pieces out."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, _indent: _stock.iterencode(value)
    pieces: Callable[[object, int], Iterable[str]] = make(
        None, _stock.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
    )
    return pieces


_pieces = _made_once()


def dumps(field: str, value: object, *, plain: bool = True) -> bytes:
    """Encode a value, compactly; tuples become arrays.

    :param field: what error texts call the value
    :param plain: JSON's own types are enough; orjson would write others in its own way
    :raises InvalidMessageError: a type, a number or a text that strict JSON cannot carry
    """
    fast = _fast() if plain else None
    if fast is not None:
        with contextlib.suppress(TypeError):  # it takes less; what it refuses is judged below
            encoded = fast(value)
            if b"null" not in encoded:  # which also stands for a float that is not finite
                return encoded
    try:
        return "".join(_pieces(value, 0)).encode()
    except UnicodeEncodeError:
        reason = "holds a lone surrogate, no Unicode text"
    except (TypeError, ValueError, RecursionError):
        reason = f"of type {type(value).__name__}, cannot be written as JSON; {_ACCEPTED}"
    # Raised out here, so that the encoder's own words, which may quote, are not chained to it.
    raise InvalidMessageError(f"{field} {reason}")
