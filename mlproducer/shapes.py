"""What a task's fields may hold: checks, and the tables of keys for `content` and `options`.

A check takes a field's name and a value, and gives back what is kept. A refusal names the field,
the type that was given and what is accepted, and quotes nothing. What becomes of a task is not
known here.

Runs on: any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, NoReturn

from attrs import field, frozen

from mlproducer.errors import InvalidTaskError

Check = Callable[[str, Any], Any]

_CONTROL = frozenset(map(chr, [*range(32), 127]))
_MAX_INT = (1 << 63) - 1
_MAX_SECONDS = (1 << 31) - 1
_COPIED_LEVELS = 256
"""Deeper than strict JSON or AMQP accept, so that what is left uncopied is refused anyway."""


def refuse(name: str, value: object, accepted: str, why: str = "") -> NoReturn:
    """Say what is wrong with a field, without showing its value.

    :raises InvalidTaskError: always
    """
    given = "missing" if value is None else f"of type {type(value).__name__}{why}"
    raise InvalidTaskError(f"{name} is {given}; accepted is {accepted}")


def string(name: str, value: Any) -> Any:
    """Accept a str."""
    if not isinstance(value, str):
        refuse(name, value, "a str")
    return value


def text(name: str, value: Any) -> Any:
    """Accept a str that is not empty."""
    if not isinstance(value, str):
        refuse(name, value, "a non-empty str")
    if not value:
        refuse(name, value, "a non-empty str", " but empty")
    return value


def line(name: str, value: Any) -> Any:
    """Accept a str that is not empty and holds no control characters."""
    if not _CONTROL.isdisjoint(text(name, value)):
        refuse(name, value, "a str without them", " and holds control characters")
    return value


def boolean(name: str, value: Any) -> Any:
    """Accept a bool."""
    if not isinstance(value, bool):
        refuse(name, value, "a bool")
    return value


def one_of(*choices: str) -> Check:
    """Accept one of a few words."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            why = " but none of these words" if isinstance(value, str) else ""
            refuse(name, value, f"one of {', '.join(choices)}", why)
        return value

    return check


def integer(low: int, high: int = _MAX_INT) -> Check:
    """Accept an int within bounds, and no bool."""

    def check(name: str, value: Any) -> Any:
        accepted = f"an int from {low} to {high}"
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(name, value, accepted)
        if not low <= value <= high:
            refuse(name, value, accepted, " but out of range")
        return value

    return check


def seconds(name: str, value: Any) -> Any:
    """Accept seconds from now: an int or a float from 0 to what 32 bits hold, as in Celery."""
    accepted = f"a number of seconds from 0 to {_MAX_SECONDS}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        refuse(name, value, accepted)
    if not 0 <= value <= _MAX_SECONDS:
        refuse(name, value, accepted, " but out of range")
    return value


def moment(name: str, value: Any) -> Any:
    """Accept a point in time, and keep it in UTC: a worker could not parse each odd offset."""
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


def sequence(name: str, value: Any) -> Any:
    """Accept a list or a tuple, and keep a copy."""
    if not isinstance(value, (list, tuple)):
        refuse(name, value, "a list or a tuple")
    return tuple(copied(list(value)))


def mapping(name: str, value: Any) -> Any:
    """Accept a mapping with str keys, and keep a copy."""
    return copied(_with_str_keys(name, value))


def headers(name: str, value: Any) -> Any:
    """Accept a mapping with str keys, and keep a copy; tuples stay what AMQP refuses."""
    return copied(_with_str_keys(name, value), (dict, list))


def _with_str_keys(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        refuse(name, value, "a mapping")
    for key in value:
        if not isinstance(key, str):
            refuse(f"a key of {name}", key, "a str")
    return dict(value)


def copied(value: Any, kinds: tuple[type[Any], ...] = (dict, list, tuple)) -> Any:
    """Copy what is mutable, so that the caller may go on changing the original.

    Tuples, which may hold something mutable, become lists. Loops and shared parts are kept as they
    are; what cannot travel is left for ``publish()`` to refuse.
    """
    root = [value]
    level: list[Any] = [root]
    copies: dict[int, Any] = {}
    for _ in range(_COPIED_LEVELS):
        level = [copy for parent in level for copy in _copy_children(parent, copies, kinds)]
        if not level:
            break
    return root[0]


def _copy_children(
    parent: Any, copies: dict[int, Any], kinds: tuple[type[Any], ...]
) -> list[dict[str, Any] | list[Any]]:
    """Put copies in the place of a container's containers; give back those made just now."""
    made = []
    pairs: Iterable[tuple[Any, Any]]
    pairs = parent.items() if isinstance(parent, dict) else enumerate(parent)
    for key, item in list(pairs):
        if isinstance(item, kinds):
            copy = copies.get(id(item))
            if copy is None:
                copy = copies[id(item)] = dict(item) if isinstance(item, dict) else list(item)
                made.append(copy)
            parent[key] = copy
    return made


@frozen
class Key:
    """One key of a `Shape`.

    :ivar name: as documented; its snake_case spelling is accepted as well
    :ivar wire: as it is kept and travels
    :ivar default: what is checked and kept where nothing, or ``None``, is given
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
        """Both spellings, the documented one first; equal where the name is one word."""
        return self.name, re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", self.name)


class Shape:
    """A table of keys, and what a mapping that follows it is turned into."""

    def __init__(self, *keys: Key) -> None:
        self._keys = keys
        self._spellings = {spelling: key.wire for key in keys for spelling in key.spellings}
        self._accepted = ", ".join(key.name for key in keys)
        self._may_be_empty = not any(key.required or key.default is not None for key in keys)

    def read(self, name: str, given: Any) -> dict[str, Any]:
        """Check a mapping and give it as it travels: in the table's order, with its defaults.

        :raises InvalidTaskError: an unknown or missing key, or a value that is not accepted
        """
        if type(given) is not dict and not isinstance(given, Mapping):
            refuse(name, given, f"a mapping with {self._accepted}")
        if not given and self._may_be_empty:
            return {}
        found = self._by_wire(name, given)
        result = {}
        for key in self._keys:
            value = found.get(key.wire)
            if value is None:
                value = key.default
            if value is not None or key.required:
                result[key.wire] = key.check(f"{name}.{key.name}", value)
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
                raise InvalidTaskError(f"{name} has a key in both of its spellings: {spelling}")
            found[wire] = value
        return found


def _quoted(key: object) -> str:
    """Quote a key that is a plain short word, most likely a slip; anything else may be content."""
    if isinstance(key, str) and len(key) <= 24 and key.isascii() and key.isidentifier():
        return f" {key!s}"
    return f" of type {type(key).__name__}"


_BACKEND = Key("backend", one_of("api", "local"))
SUMMARY_CONTENT = Shape(
    Key("text", text, required=True),
    Key("title", string),
    Key("url", text),
    Key("contentType", string),
)
SUMMARY_OPTIONS = Shape(
    Key("provider", one_of("openai", "anthropic", "local")),
    Key("model", string),
    Key("maxLength", integer(1)),
    Key("style", one_of("brief", "detailed", "bullets")),
    _BACKEND,
)
TRANSCRIPTION_OPTIONS = Shape(
    Key("language", string),
    _BACKEND,
    Key("normalize", boolean, default=True),
    Key("prompt", string),
)
EMBEDDING_CONTENT = Shape(
    Key("text", text, required=True),
    Key(
        "type",
        one_of("caption", "transcript", "article", "comment", "tweet"),
        default="caption",
    ),
    Key("metadata", mapping, default={}),
)
EMBEDDING_OPTIONS = Shape(
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
BATCH_ITEM = Shape(
    Key("share_id", lambda _name, value: value),
    Key("content", lambda _name, value: value),
    Key("options", lambda _name, value: value),
)
