"""AMQP 0-9-1 values: short strings, field tables and the property list of a message.

Encoding is also the check: what AMQP cannot carry is refused here, on the caller's thread, with an
error that shows the field's name and type, never its content. Accepted values are encoded byte for
byte as pika encodes them.

The property list ends before the value of its last property, ``cluster-id``, which AMQP reserves
and brokers pass on unchanged. Each attempt adds its delivery tag there, so that a returned message
is matched to its attempt, even where several messages have one id.

Runs on: any thread.
"""

from __future__ import annotations

import struct
from calendar import timegm
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from math import isfinite
from typing import Any

from mlproducer._field_checks import EXTRA_ROUTES, NO_HISTORY, is_history
from mlproducer.errors import InvalidMessageError, MessageTooLargeError

FRAME_MAX = 131_072
"""The frame size that RabbitMQ and pika negotiate by default, in bytes."""

FRAME_OVERHEAD = 8  # type, channel, size, end octet
CONTENT_HEADER = 12  # class, weight, body size
ATTEMPT_MAX = 21  # a short string of the longest delivery tag
DEATH_HEADERS = 1024
"""Bytes that are left for the headers that a dead letter adds."""

LETTER_MAX = FRAME_MAX - FRAME_OVERHEAD - CONTENT_HEADER - ATTEMPT_MAX
PROPERTIES_MAX = LETTER_MAX - DEATH_HEADERS

MAX_EXPIRATION = 4_294_967
"""Seconds; RabbitMQ takes a message's time to live in milliseconds, as 32 bits."""

_MAX_DEPTH = 32
_ACCEPTED = (
    "accepted are str, bytes, bool, int of 64 bits, finite float, datetime, None, list and dict"
)
_CONTROL = frozenset(map(chr, [*range(32), 127]))

_FLAG_CLUSTER_ID = 1 << 2
NOT_MANDATORY = 1 << 1
"""A flag to which AMQP assigns no property. In an envelope, and so in a store, it marks a message
that is not mandatory; `FrameWriter` clears it, since brokers require zero."""

_pack_flags = struct.Struct(">H").pack
_pack_long = struct.Struct(">I").pack
_pack_tagged_long = struct.Struct(">cI").pack
_pack_int = struct.Struct(">ci").pack
_pack_long_int = struct.Struct(">cq").pack
_pack_double = struct.Struct(">cd").pack
_pack_timestamp = struct.Struct(">cQ").pack
_pack_longlong = struct.Struct(">Q").pack


_MAX_KEYS = 1000
_keys: dict[str, bytes] = {}
"""Keys of tables, encoded: a program has few, and they come with each message."""


def short_string(field: str, value: str) -> bytes:
    """Encode a short string (AMQP 0-9-1, section 4.2.5.3): at most 255 bytes of UTF-8.

    :raises InvalidMessageError: it is not a str, too long, or holds control characters
    """
    if not isinstance(value, str):
        raise InvalidMessageError(f"{field} is {_kind(value)}; accepted is str")
    if not _CONTROL.isdisjoint(value):
        raise InvalidMessageError(f"{field} holds a control character; accepted is plain text")
    encoded = _utf8(field, value)
    if len(encoded) > 255:
        raise InvalidMessageError(
            f"{field} has {len(encoded)} bytes in UTF-8; accepted are at most 255"
        )
    return bytes((len(encoded),)) + encoded


_one_of_few = lru_cache(256)(short_string)


def table(field: str, mapping: Mapping[str, Any]) -> bytes:
    """Encode a field table (AMQP 0-9-1, section 4.2.5.5, with RabbitMQ's value types).

    :raises InvalidMessageError: a key or value that AMQP cannot carry
    """
    if not isinstance(mapping, Mapping):
        raise InvalidMessageError(f"{field} is {_kind(mapping)}; accepted is a mapping")
    entries = table_entries(field, mapping)
    return _pack_long(len(entries)) + entries


def table_entries(field: str, mapping: Mapping[str, Any], depth: int = 1) -> bytes:
    """Encode a table's entries without the leading length, so that others can be appended."""
    pieces, known = [], _keys.get
    for key, value in mapping.items():
        pieces.append(known(key) or _key(field, key, value, depth))
        # Most of Celery's headers are one of these: as `_none` and `_text`, without four calls.
        if value is None:
            pieces.append(b"V")
        elif type(value) is str and value.isascii():
            pieces.append(_pack_tagged_long(b"S", len(value)))
            pieces.append(value.encode())
        elif (encode := _ENCODERS.get(type(value))) is not None:
            pieces.append(encode(field, value, depth))
        else:
            pieces.append(_value(field, value, depth))
    return b"".join(pieces)


def _key(field: str, key: str, value: Any, depth: int) -> bytes:
    """Encode a key, and remember it, unless there is something to check about it each time."""
    if key in EXTRA_ROUTES and depth == 1:
        raise InvalidMessageError(
            f"{field} holds {key}, which RabbitMQ reads as more routing keys; not accepted"
        )
    if key == "x-death" and depth == 1 and not is_history(value):
        raise InvalidMessageError(f"{field}.x-death is {NO_HISTORY}")
    encoded = short_string(f"a key of {field}", key)
    plain = type(key) is str and key not in EXTRA_ROUTES and key != "x-death"
    if plain and len(_keys) < _MAX_KEYS:
        _keys[key] = encoded
    return encoded


def properties(
    *,
    content_type: str | None = None,
    content_encoding: str | None = None,
    headers: bytes | None = None,
    persistent: bool = True,
    priority: int | None = None,
    correlation_id: str | None = None,
    reply_to: str | None = None,
    expiration: float | None = None,
    message_id: str | None = None,
    timestamp: int | None = None,
    type: str | None = None,  # noqa: A002 - AMQP's own name
    user_id: str | None = None,
    app_id: str | None = None,
    mandatory: bool = True,
) -> bytes:
    """Encode a message's properties (AMQP 0-9-1, section 1.8.2), without the value of cluster-id.

    :param headers: a table, as `table` encodes it
    :param expiration: seconds
    :param timestamp: seconds since the epoch
    :param mandatory: if false, the flag `NOT_MANDATORY` is set
    :raises InvalidMessageError: a value is out of range
    :raises MessageTooLargeError: together they do not fit a frame
    """
    flags, pieces = _FLAG_CLUSTER_ID if mandatory else _FLAG_CLUSTER_ID | NOT_MANDATORY, [b""]
    if content_type is not None:
        flags |= 1 << 15
        pieces.append(_one_of_few("content_type", content_type))
    if content_encoding is not None:
        flags |= 1 << 14
        pieces.append(_one_of_few("content_encoding", content_encoding))
    if headers is not None:
        flags |= 1 << 13
        pieces.append(headers)
    flags |= 1 << 12
    pieces.append(b"\x02" if persistent else b"\x01")
    if priority is not None:
        flags |= 1 << 11
        pieces.append(_octet("priority", priority))
    if correlation_id is not None:
        flags |= 1 << 10
        pieces.append(correlation := short_string("correlation_id", correlation_id))
    if reply_to is not None:
        flags |= 1 << 9
        pieces.append(short_string("reply_to", reply_to))
    if expiration is not None:
        flags |= 1 << 8
        pieces.append(_milliseconds("expiration", expiration))
    if message_id is not None:
        flags |= 1 << 7
        same = message_id == correlation_id  # as in a task
        pieces.append(correlation if same else short_string("message_id", message_id))
    if timestamp is not None:
        flags |= 1 << 6
        pieces.append(_pack_longlong(timestamp))
    if type is not None:
        flags |= 1 << 5
        pieces.append(short_string("type", type))
    if user_id is not None:
        flags |= 1 << 4
        pieces.append(short_string("user_id", user_id))
    if app_id is not None:
        flags |= 1 << 3
        pieces.append(short_string("app_id", app_id))
    pieces[0] = _pack_flags(flags)
    return check_size(b"".join(pieces))


def check_size(encoded: bytes) -> bytes:
    """Return an encoded property list if it fits one frame.

    Over a longer one the broker would close the connection, with all other messages on it.

    :raises MessageTooLargeError: it does not fit
    """
    if len(encoded) > PROPERTIES_MAX:
        raise MessageTooLargeError(
            f"headers and properties have {len(encoded)} bytes; accepted are {PROPERTIES_MAX}"
        )
    return encoded


def _octet(field: str, value: int) -> bytes:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise InvalidMessageError(f"{field} must be an int from 0 to 255, got {_shown(value)}")
    return bytes((value,))


def _milliseconds(field: str, value: float) -> bytes:
    """Encode seconds as RabbitMQ's TTL: whole milliseconds in decimal digits, 32 bits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidMessageError(f"{field} is {_kind(value)}; accepted are seconds from 0")
    if not 0 <= value <= MAX_EXPIRATION:
        raise InvalidMessageError(f"{field} must be a number of seconds from 0 to {MAX_EXPIRATION}")
    return short_string(field, str(round(value * 1000)))


def _value(field: str, value: object, depth: int) -> bytes:
    encode = _ENCODERS.get(type(value)) or _inherited(type(value))
    if encode is None:
        raise InvalidMessageError(f"{field} holds {_kind(value)}; {_ACCEPTED}")
    return encode(field, value, depth)


def _text(field: str, value: str, _depth: int) -> bytes:
    encoded = _utf8(field, value)
    return _pack_tagged_long(b"S", len(encoded)) + encoded


def _bytes(_field: str, value: bytes, _depth: int) -> bytes:
    return _pack_tagged_long(b"x", len(value)) + value


def _bool(_field: str, value: bool, _depth: int) -> bytes:
    return b"t\x01" if value else b"t\x00"


def _integer(field: str, value: int, _depth: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return _pack_int(b"I", value)
    if -(1 << 63) <= value < 1 << 63:
        return _pack_long_int(b"l", value)
    raise InvalidMessageError(f"{field} holds an int of more than 64 bits; {_ACCEPTED}")


def _float(field: str, value: float, _depth: int) -> bytes:
    if not isfinite(value):
        raise InvalidMessageError(f"{field} holds a float that is not finite; {_ACCEPTED}")
    return _pack_double(b"d", value)


def _datetime(field: str, value: datetime, _depth: int) -> bytes:
    """Encode whole seconds since the epoch; without a time zone it is taken as UTC, as in pika."""
    seconds = timegm(value.utctimetuple())
    if seconds < 0:
        raise InvalidMessageError(f"{field} holds a datetime before 1970, which AMQP cannot carry")
    return _pack_timestamp(b"T", seconds)


def _none(_field: str, _value: None, _depth: int) -> bytes:
    return b"V"


def _list(field: str, value: list[Any], depth: int) -> bytes:
    _check_depth(field, depth)
    encoded = b"".join([_value(field, item, depth + 1) for item in value])
    return _pack_tagged_long(b"A", len(encoded)) + encoded


def _dict(field: str, value: dict[str, Any], depth: int) -> bytes:
    _check_depth(field, depth)
    entries = table_entries(field, value, depth + 1)
    return _pack_tagged_long(b"F", len(entries)) + entries


_ENCODERS: dict[type, Callable[[str, Any, int], bytes]] = {
    str: _text,
    bytes: _bytes,
    bool: _bool,
    int: _integer,
    float: _float,
    datetime: _datetime,
    type(None): _none,
    list: _list,
    dict: _dict,
}


def _inherited(kind: type) -> Callable[[str, Any, int], bytes] | None:
    """Find the encoder of a subclass, such as an ``enum.IntEnum``."""
    return next((_ENCODERS[base] for base in kind.__mro__ if base in _ENCODERS), None)


def _check_depth(field: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidMessageError(f"{field} is nested deeper than {_MAX_DEPTH} levels")


def _utf8(field: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidMessageError(
            f"{field} holds a lone surrogate, which UTF-8 cannot encode"
        ) from None


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


def _shown(value: object) -> str:
    return repr(value) if type(value) is int and abs(value) < 10**9 else _kind(value)
