"""Strict JSON (RFC 8259) in UTF-8: what any stock reader reads back as it was written.

Python's own encoder does the work; what it lets through and a reader would choke on or change is
refused. Values of a known shape need `dumps` alone; values of free form go through `check` first,
because the encoder turns ``{1: ...}`` and ``{"1": ...}`` into the same key and does not mind depth.
Error texts name a field and a type, never content, and never a key of the user's.

Runs on: any thread.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from mlproducer.errors import InvalidMessageError

MAX_DEPTH = 200
"""Lists and objects inside each other; stock readers recurse, Python's to about 1,000."""

_INT_END = 10**4300  # CPython refuses to read an int of more than 4,300 digits
_PLAIN = frozenset({str, bool, type(None)})
_ACCEPTED = "accepted are str, bool, None, int, finite float, list, tuple and dict"

_stock = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


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


def dumps(field: str, value: object) -> bytes:
    """Encode a value, compactly; tuples become arrays.

    Values of free form go through `check` before, since orjson takes more than JSON's types.

    :param field: what error texts call the value
    :raises InvalidMessageError: a type, a number or a text that strict JSON cannot carry
    """
    fast = _fast()
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
    check(field, value)
    raise InvalidMessageError(f"{field} {reason}")


def check(field: str, value: object) -> None:
    """Refuse what `dumps` would let through though it does not survive the journey.

    A value that holds itself is endlessly deep, and refused as such.

    :raises InvalidMessageError: a key that is no str, too deep, or a value that is not JSON's
    """
    levels = [iter((value,))]
    while levels:
        for item in levels[-1]:
            if type(item) in _PLAIN:
                continue
            children = _children(field, item)
            if children is not None:
                levels.append(children)
                break
        else:
            levels.pop()
        if len(levels) > MAX_DEPTH + 1:
            raise InvalidMessageError(
                f"{field} holds itself or is nested deeper than {MAX_DEPTH} levels"
            )


def _children(field: str, item: object) -> Iterator[object] | None:
    """Give what is inside a list or an object; ``None`` for anything else that is accepted."""
    if isinstance(item, dict):
        for key in item:
            if not isinstance(key, str):
                raise InvalidMessageError(
                    f"{field} holds a key of type {type(key).__name__}; accepted is str"
                )
        return iter(item.values())
    if isinstance(item, (list, tuple)):
        return iter(item)
    _check_scalar(field, item)
    return None


def _check_scalar(field: str, item: object) -> None:
    if isinstance(item, float):
        if not math.isfinite(item):
            raise InvalidMessageError(f"{field} holds a float that is not finite; {_ACCEPTED}")
    elif isinstance(item, int):
        if not -_INT_END < item < _INT_END:
            raise InvalidMessageError(
                f"{field} holds an int of more than 4300 digits, which readers refuse"
            )
    elif not isinstance(item, str):
        raise InvalidMessageError(f"{field} holds a {type(item).__name__}; {_ACCEPTED}")
