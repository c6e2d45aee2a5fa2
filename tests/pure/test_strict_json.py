"""Strict JSON: what passes is read back the same, all else is refused by type."""

from __future__ import annotations

import json
from enum import Enum, IntEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlproducer import _field_checks as checks
from mlproducer._wire import strict_json
from mlproducer._wire.strict_json import dumps, quoted
from mlproducer.errors import InvalidMessageError, InvalidTaskError

from .refusals import CANARY, refused
from .tables import each_row

MAX_DEPTH = 199
"""Of a value in a task's arguments, which are one level themselves."""


class Colour(str, Enum):
    """A str that is more than a str."""

    RED = "red"


class Size(IntEnum):
    """An int that is more than an int."""

    SMALL = 1


def nested(levels: int, kind: type = list) -> Any:
    """Build a value of so many levels."""
    value: Any = kind()
    for _ in range(levels - 1):
        value = [value] if kind is list else {CANARY: value}
    return value


def looped() -> list[Any]:
    """Build a list that holds itself twice, so that a careless walk would never end."""
    value: list[Any] = []
    value += [value, value]
    return value


def encode(value: Any) -> bytes:
    """Encode a value of free form, as a publisher does."""
    kept = checks.json_sequence("args", [value])[0]
    return dumps("args", kept[0])


texts = st.text('aé\u20ac\U0001f600\0\x1f\x7f"\\\u2028', max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(values)
def test_reads_back_the_same(value: Any) -> None:
    """Any JSON value comes back as it was, through a reader that insists on UTF-8."""
    assert json.loads(encode(value).decode("utf-8")) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2,)), b"[1,[2]]"),
        ({"a": None, "b": True}, b'{"a":null,"b":true}'),
        ("grüße \U0001f600", '"grüße \U0001f600"'.encode()),
        ({"a": Colour.RED, "b": Size.SMALL}, b'{"a":"red","b":1}'),
        (-0.0, b"-0.0"),
        ("\0\x1f", b'"\\u0000\\u001f"'),
    ],
)
def test_is_compact_utf8(value: Any, expected: bytes) -> None:
    """No spaces, no ASCII escapes that UTF-8 does not need; tuples are arrays."""
    assert encode(value) == expected


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from(["", "a" * 120, 'a "b"\n' * 20, "\u00e9" * 120, "\\\t" * 60]))
def test_a_text_is_quoted_as_by_the_stock_encoder(text: str, more: str) -> None:
    """A long text, which is escaped in another way, is encoded to the same bytes."""
    stock = json.JSONEncoder(ensure_ascii=False).encode
    for each in (text, more + text, text + more):
        assert quoted("text", each) == stock(each).encode()


@pytest.mark.parametrize("text", ["\ud800", "a" * 120 + "\udfff"])
def test_a_lone_surrogate_is_not_quoted(text: str) -> None:
    """UTF-8 cannot encode it."""
    refused(lambda: quoted("text", text), InvalidMessageError, "text", "surrogate", inside=True)


@pytest.mark.parametrize("kind", [list, dict])
def test_accepts_the_deepest_level(kind: type) -> None:
    """The limit itself is accepted."""
    assert encode(nested(MAX_DEPTH, kind))


def test_accepts_the_longest_int() -> None:
    """4,300 digits are what CPython reads back; a sign is no digit."""
    longest = -(10**4300 - 1)
    assert json.loads(encode(longest)) == longest


REFUSED = [
    ("set", {CANARY}, "set"),
    ("object", object(), "object"),
    ("nan", float("nan"), "finite"),
    ("infinity", [float("inf")], "finite"),
    ("minus infinity", {"a": float("-inf")}, "finite"),
    ("int key", {1: CANARY, "1": CANARY}, "key of type int"),
    ("none key", {None: CANARY}, "key of type NoneType"),
    ("tuple key", {(CANARY, 1): 1}, "key of type tuple"),
    ("key below", [{"a": ({True: CANARY},)}], "key of type bool"),
    ("int of 4,301 digits", 10**4300, "4300 digits"),
    ("int of 10,001 digits", [10**10_000], "4300 digits"),
    ("negative int", -(10**4300), "4300 digits"),
    ("lone surrogate", CANARY + "\ud800", "surrogate"),
    ("lone surrogate in a key", {CANARY + "\udfff": 1}, "surrogate"),
    ("201 lists", nested(MAX_DEPTH + 1), "200 levels"),
    ("201 objects", nested(MAX_DEPTH + 1, dict), "200 levels"),
    ("100,000 lists", nested(100_000), "200 levels"),
    ("itself", looped(), "contains itself"),
]


def test_refuses_what_json_cannot_carry() -> None:
    """Faults 63 and 64: a refusal names the field and the reason, at once, and no content."""

    def check(name: str, value: Any, word: str) -> None:
        refused(lambda: encode(value), InvalidTaskError, "args", word, inside=True)

    each_row(REFUSED, check)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"a": {CANARY}}, "dict"),
        ([float("nan")], "list"),
        (looped(), "list"),
        (nested(100_000), "list"),
        (CANARY + "\ud800", "surrogate"),
    ],
    ids=["set", "nan", "itself", "100,000 lists", "surrogate"],
)
def test_dumps_alone_refuses_what_the_encoder_cannot_write(value: Any, word: str) -> None:
    """What was changed after it was checked is refused by its type."""
    refused(lambda: dumps("content", value), InvalidMessageError, "content", word, inside=True)


def test_without_pythons_inner_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``json`` has no C encoder, its documented one writes and refuses the same."""
    values: list[Any] = [{"a": [1, 2.5, None, True, '\u2028"']}, [[]], Size.SMALL, "text"]
    usual = [dumps("args", value, plain=False) for value in values]
    monkeypatch.delattr(json.encoder, "c_make_encoder")
    pieces = strict_json._reusable_encoder()
    assert pieces is not strict_json._pieces
    monkeypatch.setattr(strict_json, "_pieces", pieces)
    assert [dumps("args", value, plain=False) for value in values] == usual
    for wrong in (object(), float("nan"), "\ud800"):
        with pytest.raises(InvalidMessageError):
            dumps("args", wrong, plain=False)
