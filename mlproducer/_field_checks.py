"""Checks of tasks' fields, and the tables of keys for ``content`` and ``options``.

A check takes a field's name and a value, and returns the value to be kept. An error has the field's
name with its path, the type that was given, and what is accepted; it never has content.

Runs on: any thread.
"""

from __future__ import annotations

import re
from calendar import timegm
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timezone
from decimal import Decimal
from math import isfinite
from typing import Any, NoReturn
from uuid import UUID

from attrs import field, frozen

from mlproducer.errors import InvalidTaskError

Check = Callable[[str, Any], Any]

JSON_TYPES = "str, bool, None, int, finite float, list, tuple or dict"
CELERY_TYPES = f"{JSON_TYPES}, UUID, datetime, date, time, Decimal or bytes"
TABLE_TYPES = "str, bytes, bool, int of 64 bits, finite float, datetime, None, list or dict"

EXTRA_ROUTES = ("BCC", "CC")
"""Headers that RabbitMQ reads as more routing keys (its guide to sender-selected distribution)."""

_CONTROL = frozenset(map(chr, [*range(32), 127]))
_MAX_INT = (1 << 63) - 1
_MAX_SECONDS = (1 << 31) - 1
_JSON_DEPTH = 200  # stock readers recurse, Python's to about 1,000
_TABLE_DEPTH = 32
_MAX_KEYS = 1000  # that are known to be good; a program has few, and they come with each message
_INT_END = 10**4300  # CPython refuses to read an int of more than 4,300 digits
_PLAIN = frozenset({bool, type(None)})
_MARKS = {"__type__", "__value__"}
_AS_KOMBU = (datetime, date, time, Decimal, UUID, bytes)


def refuse(name: str, value: object, accepted: str, why: str = "") -> NoReturn:
    """Raise the error for a field, without its value.

    :raises InvalidTaskError: always
    """
    given = "missing" if value is None else f"of type {type(value).__name__}{why}"
    raise InvalidTaskError(f"{name} is {given}; accepted is {accepted}")


def a_str(name: str, value: Any) -> Any:
    """Accept any str."""
    if not isinstance(value, str):
        refuse(name, value, "a str")
    return value


def an_int(name: str, value: Any) -> Any:
    """Accept any int, but not a bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(name, value, "an int")
    return value


def a_number(name: str, value: Any) -> Any:
    """Accept any int or float, but not a bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        refuse(name, value, "an int or a float")
    return value


def string(name: str, value: Any) -> Any:
    """Accept a str that UTF-8 can encode."""
    if not isinstance(value, str):
        refuse(name, value, "a str")
    _check_unicode(name, value)
    return value


def text(name: str, value: Any) -> Any:
    """Accept a non-empty str."""
    if not isinstance(value, str):
        refuse(name, value, "a non-empty str")
    if not value:
        refuse(name, value, "a non-empty str", " but empty")
    if not value.isascii():
        _check_unicode(name, value)
    return value


def line(name: str, value: Any) -> Any:
    """Accept a non-empty str without control characters."""
    if not _CONTROL.isdisjoint(text(name, value)):
        refuse(name, value, "a str without them", " with control characters")
    return value


def short(name: str, value: Any) -> Any:
    """Accept what AMQP 0-9-1 calls a short string: at most 255 bytes, no control characters."""
    if not isinstance(value, str):
        refuse(name, value, "a str")
    if not _CONTROL.isdisjoint(value):
        refuse(name, value, "a str without them", " with control characters")
    _check_unicode(name, value)
    size = len(value) if value.isascii() else len(value.encode())
    if size > 255:
        refuse(name, value, "at most 255 bytes", f" and has {size} bytes in UTF-8")
    return value


def task_id(name: str, value: Any) -> Any:
    """Accept a non-empty short string."""
    return short(name, text(name, value))


def share(name: str, value: Any) -> str:
    """Accept a non-empty str, an int or a UUID, and return its text."""
    if type(value) is str:
        return value if value and value.isascii() else str(text(name, value))
    if isinstance(value, (int, UUID)) and not isinstance(value, bool):
        number = int(value)
        if not -(1 << 128) < number < 1 << 128:
            refuse(name, value, "an int of 128 bits", " but out of range")
        return str(value) if isinstance(value, UUID) else str(number)
    if not isinstance(value, str):
        refuse(name, value, "a non-empty str, an int or a UUID")
    return str(text(name, value))


def _check_unicode(name: str, value: str) -> None:
    if not value.isascii() and _lone_surrogate(value):
        refuse(name, value, "Unicode text", " with a lone surrogate")


def _lone_surrogate(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def boolean(name: str, value: Any) -> Any:
    """Accept a bool."""
    if not isinstance(value, bool):
        refuse(name, value, "a bool")
    return value


def one_of(*choices: str) -> Check:
    """Accept one of these words."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            why = " but not one of these words" if isinstance(value, str) else ""
            refuse(name, value, f"one of {', '.join(choices)}", why)
        return value

    return check


def integer(low: int, high: int = _MAX_INT) -> Check:
    """Accept an int within bounds, but not a bool."""

    def check(name: str, value: Any) -> Any:
        accepted = f"an int from {low} to {high}"
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(name, value, accepted)
        if not low <= value <= high:
            refuse(name, value, accepted, " but out of range")
        return value

    return check


def seconds(name: str, value: Any) -> Any:
    """Accept seconds from now: an int or a float from 0 to 2**31 - 1, as Celery does."""
    accepted = f"a number of seconds from 0 to {_MAX_SECONDS}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        refuse(name, value, accepted)
    if not 0 <= value <= _MAX_SECONDS:
        refuse(name, value, accepted, " but out of range")
    return value


def moment(name: str, value: Any) -> Any:
    """Accept a time, and return it in UTC: workers cannot parse every offset."""
    accepted = "a datetime with a time zone"
    if not isinstance(value, datetime):
        refuse(name, value, accepted)
    if value.utcoffset() is None:
        refuse(name, value, accepted, " but without one")
    try:
        return value.astimezone(timezone.utc)
    except OverflowError:
        why = " but outside of the years 1 to 9999 in UTC"
    return refuse(name, value, accepted, why)


def moment_or_seconds(name: str, value: Any) -> Any:
    """Accept what `moment` or `seconds` does."""
    return moment(name, value) if isinstance(value, datetime) else seconds(name, value)


def optional(check: Check, name: str, value: Any) -> Any:
    """Accept ``None``, or what the check does."""
    return None if value is None else check(name, value)


def limit(name: str, value: Any) -> Any:
    """Accept a time limit: seconds above 0."""
    if seconds(name, value) == 0:
        refuse(name, value, "a number of seconds above 0", " but 0")
    return value


def timestamp(name: str, value: Any) -> Any:
    """Accept a time since 1970: a datetime with a time zone, or seconds."""
    if isinstance(value, datetime):
        value = int(moment(name, value).timestamp())
        if value < 0:
            refuse(name, value, "a time since 1970", " but before")
        return value
    return integer(0)(name, value)


def body(name: str, value: Any) -> bytes:
    """Accept bytes, or a buffer of bytes, and return immutable bytes."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        refuse(name, value, "bytes")
    return bytes(value)


def json_sequence(name: str, value: Any) -> tuple[tuple[Any, ...], bool]:
    """Accept a list or tuple of Celery's types; return a copy, and whether JSON is enough."""
    if not isinstance(value, (list, tuple)):
        refuse(name, value, "a list or a tuple")
    copy, plain = _CELERY.copy(name, list(value))
    return tuple(copy), plain


def json_mapping(name: str, value: Any) -> tuple[dict[str, Any], bool]:
    """Accept a mapping of Celery's types; return a copy, and whether JSON is enough."""
    return _CELERY.copy(name, _mapping(name, value))


def mapping(name: str, value: Any) -> Any:
    """Accept a mapping of strict JSON's types (RFC 8259), and return a copy."""
    return _JSON.copy(name, _mapping(name, value))[0]


def headers(name: str, value: Any) -> Any:
    """Accept a mapping that an AMQP field table can carry, and return a copy."""
    copy, _ = _TABLE.copy(name, _mapping(name, value))
    for extra in EXTRA_ROUTES:
        if extra in copy:
            raise InvalidTaskError(
                f"{name} holds {extra}, which RabbitMQ reads as more routing keys; not accepted"
            )
    if "x-death" in copy and not is_history(copy["x-death"]):
        raise InvalidTaskError(f"{name}.x-death is {NO_HISTORY}")
    return copy


NO_HISTORY = (
    "not a list of tables with an int as count; it would crash the queue that dead-letters it"
)


def is_history(deaths: Any) -> bool:
    """Return whether a header ``x-death`` has the form on which RabbitMQ relies.

    A queue that dead-letters a message adds to this list. Over an entry that is not a table, or a
    count that is not an int, its process crashes, again and again, until RabbitMQ (seen with 3.10)
    stops its quorum queues: after one such message the whole node accepts none.
    """
    if not isinstance(deaths, list):
        return not isinstance(deaths, tuple)  # RabbitMQ ignores what is not a list
    return all(isinstance(each, dict) and _is_count(each.get("count", 1)) for each in deaths)


def _is_count(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool)


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    """Return a mapping as a dict, which is the caller's own where that is one."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Mapping):
        refuse(name, value, "a mapping")
    return dict(value)


class _WrongError(Exception):
    """A value is not accepted; its path is added where the error is caught."""


class _Grammar:
    """What a value of free form may contain.

    :param leaf: checks a value, raises `_WrongError`, and returns whether JSON alone can carry it
    :param key: checks a key of a mapping, and raises `_WrongError`
    :param kinds: the types of containers, which are copied
    :param depth: how deep containers may be nested
    """

    def __init__(
        self,
        leaf: Callable[[Any], bool],
        key: Callable[[Any], None],
        kinds: tuple[type[Any], ...],
        depth: int,
    ) -> None:
        self._leaf = leaf
        self._key = key
        self._kinds = kinds
        self._depth = depth
        self._marks = tuple in kinds  # for JSON, not for AMQP
        self._remembers = not self._marks  # headers are the same ones, and short
        self._known: set[str] = set()

    def copy(self, name: str, value: Any) -> tuple[Any, bool]:
        """Check a value, and copy its containers, which the caller may change later.

        It does not recurse, since the caller's stack may be deep already. A value that contains
        itself is infinitely deep, and refused as such.
        """
        root, plain = [value], True
        levels: list[tuple[Iterator[Any], Any]] = [(iter([(0, value)]), root)]
        path: list[Any] = []
        key: Any = None
        try:
            while levels:
                items, parent = levels[-1]
                for key, item in items:
                    kind = type(item)
                    if kind is str:
                        if not item.isascii():
                            self._leaf(item)
                    elif kind in _PLAIN or (kind is int and -_MAX_INT <= item <= _MAX_INT):
                        continue
                    elif isinstance(item, self._kinds):
                        copy, inner = self._open(item)
                        parent[key] = copy
                        levels.append((inner, copy))
                        path.append(key)
                        if len(levels) > self._depth + 1:
                            raise _WrongError(
                                f"contains itself or is nested deeper than {self._depth} levels"
                            )
                        break
                    elif not self._leaf(item):
                        plain = False
                else:
                    levels.pop()
                    if path:
                        path.pop()
        except _WrongError as wrong:
            words = str(wrong)
            deep = len(levels) > self._depth + 1
            where = name if deep else _path(name, [*path[1:], *([key] if path else [])])
        else:
            return root[0], plain
        raise InvalidTaskError(f"{where} {words}")

    def _open(self, item: Any) -> tuple[Any, Iterator[Any]]:
        if isinstance(item, dict):
            copy: Any = dict(item)
            if not self._known.issuperset(copy):
                for key in copy:
                    self._key(key)
                if self._remembers and len(self._known) < _MAX_KEYS:
                    self._known.update(copy)
            if self._marks and copy.keys() == _MARKS:
                raise _WrongError(
                    "is a mapping with __type__ and __value__, which kombu decodes as another "
                    "type; pass the value itself"
                )
            return copy, iter(copy.items())
        copy = list(item)
        return copy, iter(enumerate(copy))


def _path(name: str, keys: list[Any]) -> str:
    """Return the path of a place in a value; keys are shown if they are short plain words."""
    steps = [f"[{key}]" if isinstance(key, int) else f".{word(key)}" for key in keys]
    return name + "".join(steps)


def word(key: str) -> str:
    """Return a key that is a short plain word; anything else may be content."""
    return key if len(key) <= 24 and key.isascii() and key.isidentifier() else "(key)"


def _json_leaf(item: Any) -> bool:
    if isinstance(item, str):
        if _lone_surrogate(item):
            raise _WrongError("holds a lone surrogate, which UTF-8 cannot encode")
    elif isinstance(item, float):
        if not isfinite(item):
            raise _WrongError(f"is a float that is not finite; accepted is {JSON_TYPES}")
    elif isinstance(item, int):
        if not -_INT_END < item < _INT_END:
            raise _WrongError("is an int of more than 4300 digits, which Python cannot decode")
    else:
        raise _WrongError(f"is of type {type(item).__name__}; accepted is {JSON_TYPES}")
    return True


def _celery_leaf(item: Any) -> bool:
    if isinstance(item, _AS_KOMBU):
        return False
    if isinstance(item, (str, float, int)):
        return _json_leaf(item)
    raise _WrongError(f"is of type {type(item).__name__}; accepted is {CELERY_TYPES}")


def _json_key(key: Any) -> None:
    if not isinstance(key, str):
        raise _WrongError(f"holds a key of type {type(key).__name__}; accepted is a str")
    if not key.isascii() and _lone_surrogate(key):
        raise _WrongError("holds a key with a lone surrogate, which UTF-8 cannot encode")


def _table_leaf(item: Any) -> bool:
    if isinstance(item, str):
        if _lone_surrogate(item):
            raise _WrongError("holds a lone surrogate, which UTF-8 cannot encode")
    elif isinstance(item, int):
        if not -(1 << 63) <= item < 1 << 63:
            raise _WrongError(f"is an int of more than 64 bits; accepted is {TABLE_TYPES}")
    elif isinstance(item, float):
        if not isfinite(item):
            raise _WrongError("is a float that is not finite, which RabbitMQ cannot decode")
    elif isinstance(item, datetime):
        if item.year < 1970 or timegm(item.utctimetuple()) < 0:
            raise _WrongError("is a datetime before 1970, which AMQP cannot carry")
    elif not isinstance(item, bytes):
        raise _WrongError(f"is of type {type(item).__name__}; accepted is {TABLE_TYPES}")
    return True


def _table_key(key: Any) -> None:
    if type(key) is str and key.isascii() and key.isidentifier() and len(key) <= 255:
        return  # as nearly all of Celery's
    if not isinstance(key, str):
        raise _WrongError(f"holds a key of type {type(key).__name__}; accepted is a str")
    if not _CONTROL.isdisjoint(key) or (not key.isascii() and _lone_surrogate(key)):
        raise _WrongError("holds a key with a control character or a lone surrogate")
    size = len(key.encode())
    if size > 255:
        raise _WrongError(f"holds a key of {size} bytes in UTF-8; accepted are at most 255")


_JSON = _Grammar(_json_leaf, _json_key, (dict, list, tuple), _JSON_DEPTH)
_CELERY = _Grammar(_celery_leaf, _json_key, (dict, list, tuple), _JSON_DEPTH)
_TABLE = _Grammar(_table_leaf, _table_key, (dict, list), _TABLE_DEPTH)


@frozen
class Key:
    """One key of a `Schema`.

    :ivar name: as documented; its snake_case spelling is accepted too
    :ivar wire: the key on the wire
    :ivar default: the value where none, or ``None``, is given
    """

    name: str
    check: Check
    default: Any = None
    required: bool = False
    wire: str = field()

    @wire.default
    def _wire(self) -> str:
        return self.name

    @property
    def spellings(self) -> tuple[str, ...]:
        """Both spellings, the documented one first; equal if the name is one word."""
        return self.name, re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", self.name)


class Schema:
    """A table of keys, by which mappings are checked and converted."""

    def __init__(self, *keys: Key) -> None:
        self._rows = [
            (key.wire, f".{key.name}", key.check, key.default, key.required) for key in keys
        ]
        self._spellings = {spelling: key.wire for key in keys for spelling in key.spellings}
        self._accepted = ", ".join(key.name for key in keys)
        needed = [row for row in self._rows if row[4] or row[3] is not None]
        self._may_be_empty = not needed
        self._needed = needed[0] if len(needed) == 1 else None

    def read(self, name: str, given: Any) -> dict[str, Any]:
        """Check a mapping, and return it as on the wire: in the table's order, with defaults.

        :raises InvalidTaskError: a key is unknown or missing, or a value is not accepted
        """
        if type(given) is not dict and not isinstance(given, Mapping):
            refuse(name, given, f"a mapping with {self._accepted}")
        if not given and self._may_be_empty:
            return {}
        if self._needed is not None and len(given) == 1:  # most have only what they must have
            wire, label, check, _, _ = self._needed
            value = given.get(wire)
            if value is not None:
                return {wire: check(name + label, value)}
        found = self._by_wire(name, given)
        result = {}
        for wire, label, check, default, required in self._rows:
            value = found.get(wire)
            if value is None:
                value = default
            if value is not None or required:
                result[wire] = check(name + label, value)
        return result

    def _by_wire(self, name: str, given: Mapping[Any, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for spelling, value in given.items():
            wire = self._spellings.get(spelling)
            if wire is None:
                raise InvalidTaskError(
                    f"{name} has an unknown key{_quoted(spelling)}; accepted are {self._accepted}"
                )
            if wire in found:
                raise InvalidTaskError(f"{name} has a key in both spellings: {spelling}")
            found[wire] = value
        return found


def _quoted(key: object) -> str:
    """Return a key that is a short plain word, probably a typo; anything else may be content."""
    if isinstance(key, str) and len(key) <= 24 and key.isascii() and key.isidentifier():
        return f" {key!s}"
    return f" of type {type(key).__name__}"


_BACKEND = Key("backend", one_of("api", "local"))
SUMMARY_CONTENT = Schema(
    Key("text", text, required=True),
    Key("title", string),
    Key("url", text),
    Key("contentType", string),
)
SUMMARY_OPTIONS = Schema(
    Key("provider", one_of("openai", "anthropic", "local")),
    Key("model", string),
    Key("maxLength", integer(1)),
    Key("style", one_of("brief", "detailed", "bullets")),
    _BACKEND,
)
TRANSCRIPTION_OPTIONS = Schema(
    Key("language", string),
    _BACKEND,
    Key("normalize", boolean, default=True),
    Key("prompt", string),
)
EMBEDDING_CONTENT = Schema(
    Key("text", text, required=True),
    Key(
        "type",
        one_of("caption", "transcript", "article", "comment", "tweet"),
        default="caption",
    ),
    Key("metadata", mapping, default={}),
)
EMBEDDING_OPTIONS = Schema(
    Key(
        "embeddingType",
        one_of("content", "summary", "composite"),
        default="content",
        wire="embedding_type",
    ),
    Key("forceModel", string, wire="force_model"),
    Key(
        "chunkStrategy",
        one_of("none", "transcript", "paragraph", "sentence", "fixed"),
        default="none",
        wire="chunk_strategy",
    ),
    _BACKEND,
)
BATCH_ITEM = Schema(
    Key("share_id", lambda _name, value: value),
    Key("content", lambda _name, value: value),
    Key("options", lambda _name, value: value),
)
