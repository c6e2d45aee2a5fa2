"""Strict JSON (RFC 8259) in UTF-8, which every stock reader decodes to the same values.

Python's own encoder is used, or orjson's. The values of a task were checked when it was made
(`mlproducer._field_checks`); what still cannot be encoded is refused with an error that shows the
field's name and type, never its content. Types that JSON lacks are encoded as by kombu, whose
decoder in a stock Celery worker restores them.

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

from mlproducer import _forks as forks
from mlproducer.errors import InvalidMessageError

_SURROGATE = "holds a lone surrogate, which UTF-8 cannot encode"
_ACCEPTED = "accepted are str, bool, None, int, finite float, list, tuple and dict"


def _as_kombu(value: object) -> dict[str, object]:
    """Encode a value that JSON has no type for as ``kombu.utils.json`` does."""
    if isinstance(value, datetime):  # first, since a datetime is a date too
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
def fast() -> Callable[[object], bytes] | None:
    """Return orjson's encoder (the extra ``fast``), if installed: it takes a third of the time."""
    try:
        with forks.importing():
            import orjson  # noqa: PLC0415 - an extra, not needed before the first message
    except ImportError:
        return None
    dumps: Callable[[object], bytes] = orjson.dumps
    return dumps


def _reusable_encoder() -> Callable[[object, int], Iterable[str]]:
    """Return the stock encoder's C function, which ``JSONEncoder.encode`` makes for every call.

    It takes a value and an indent, and yields pieces of text. ``c_make_encoder`` is not part of
    the documented API; without it the documented one is used.
    """
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, _indent: _stock.iterencode(value)
    pieces: Callable[[object, int], Iterable[str]] = make(
        None, _stock.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
    )
    return pieces


_pieces = _reusable_encoder()


def dumps(field: str, value: object, *, plain: bool = True) -> bytes:
    """Encode a value, compactly; tuples become arrays.

    :param field: the value's name in error texts
    :param plain: the value has only JSON's own types; orjson encodes others in its own way
    :raises InvalidMessageError: a type, a number or a text that strict JSON cannot carry
    """
    orjson = fast() if plain else None
    if orjson is not None:
        with contextlib.suppress(
            TypeError
        ):  # it accepts less, such as smaller ints; the stock encoder decides
            encoded = orjson(value)
            if b"null" not in encoded:  # orjson writes null for a float that is not finite
                return encoded
    try:
        return "".join(_pieces(value, 0)).encode()
    except UnicodeEncodeError:
        reason = _SURROGATE
    except (TypeError, ValueError, RecursionError):
        reason = f"of type {type(value).__name__}, cannot be written as JSON; {_ACCEPTED}"
    # Raised outside of the handlers: the encoder's error, which may quote content, is not chained.
    raise InvalidMessageError(f"{field} {reason}")


_LONG = 100
"""Characters from which on a text is escaped faster by a few searches than one by one."""

_RARE = frozenset(range(32)) - frozenset(b"\n") | frozenset(b"\\")
_MARKED = bytes(255 if each in _RARE else each for each in range(256))
"""A translation that changes a text with characters that are to be escaped and are rare."""


def quoted(field: str, text: str) -> bytes:
    """Encode a text; a long one faster than `dumps`, which looks at each character.

    :raises InvalidMessageError: it has a lone surrogate
    """
    try:
        if len(text) >= _LONG:
            encoded = text.encode()
            if encoded.translate(_MARKED) is encoded:
                escaped = encoded.replace(b'"', b'\\"').replace(b"\n", b"\\n")
                return b"".join((b'"', escaped, b'"'))
        return json.encoder.encode_basestring(text).encode()
    except UnicodeEncodeError:
        pass
    raise InvalidMessageError(f"{field} {_SURROGATE}")
