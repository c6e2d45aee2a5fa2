"""The form of a dead letter: the old message, with headers that say what happened."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import spec

from mlproducer._wire import amqp, raw
from mlproducer._wire.dead_letter import dead_letter
from mlproducer.message import Message

SAID: dict[str, str | int] = {"x-death-reason": "NackError: refused", "x-attempts": 4}
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@settings(max_examples=50)
@given(
    headers=st.none() | st.dictionaries(TEXT, st.integers(0, 9) | TEXT, max_size=3),
    content_type=st.none() | TEXT,
    content_encoding=st.none() | TEXT,
    priority=st.none() | st.integers(0, 255),
    correlation_id=st.none() | TEXT,
    type=st.none() | TEXT,
    expiration=st.none() | st.integers(0, 99),
    reply_to=st.none() | TEXT,
    timestamp=st.none() | st.integers(0, 2**40),
    app_id=st.none() | TEXT,
    user_id=st.none() | TEXT,
)
def test_adds_headers_and_changes_nothing_else(**fields: Any) -> None:
    """Whatever properties a message had, its dead letter has them too, and the headers of death."""
    headers = {key: value for key, value in (fields.pop("headers") or {}).items() if key != "CC"}
    headers = {key: value for key, value in headers.items() if key != "BCC"}
    message = Message(body=b"body", routing_key="q", headers=headers or None, **fields)
    alive = raw.encode(message, exchange="live")
    dead = dead_letter(alive, "dlx", SAID)
    before, after = (
        spec.BasicProperties().decode(envelope.properties + b"\x011") for envelope in (alive, dead)
    )
    expired = {} if before.expiration is None else {"x-original-expiration": before.expiration}
    assert after.headers == {**headers, **SAID, **expired}
    assert after.expiration is None
    before.headers = after.headers = before.expiration = None
    assert before == after
    assert (dead.exchange, dead.routing_key, dead.body) == ("dlx", "q", b"body")
    assert dead.message_id == alive.message_id


@pytest.mark.parametrize("free", [0, 1, 30, 200, 1023, 1024])
def test_a_letter_always_fits(free: int) -> None:
    """What is ours is cut or left out where the message's own headers leave no room."""
    longest = 4000
    shell = len(raw.encode(_filled(0), exchange="x").properties)
    alive = raw.encode(_filled(longest - shell - free), exchange="x")
    said = {"x-original-exchange": "x", "x-attempts": 4, "x-death-reason": "é" * 500}
    dead = dead_letter(alive, "dlx", said, longest)
    assert len(dead.properties) <= longest
    headers = spec.BasicProperties().decode(dead.properties + b"\x011").headers
    assert headers["h"] == "x" * (longest - shell - free)
    assert ("x-original-exchange" in headers) == (free >= 30)
    assert set(headers.get("x-death-reason", "")) <= {"é"}


def _filled(size: int) -> Message:
    return Message(body=b"", routing_key="q", headers={"h": "x" * size})


def test_the_largest_message_has_a_letter_with_all_its_headers() -> None:
    """The limit for a message's own headers leaves room for the longest names."""
    shell = len(raw.encode(_filled(0), exchange="x").properties)
    alive = raw.encode(_filled(amqp.PROPERTIES_MAX - shell), exchange="x")
    now = datetime(2030, 1, 31, tzinfo=timezone.utc).isoformat()
    said: dict[str, str | int] = {
        "x-original-exchange": "e" * 255,
        "x-original-routing-key": "k" * 255,
        "x-attempts": 2**40,
        "x-first-failed-at": now,
        "x-death-reason": "r" * 255,
    }
    dead = dead_letter(alive, "dlx", said)
    headers = spec.BasicProperties().decode(dead.properties + b"\x011").headers
    assert {name: headers[name] for name in said} == said
    assert len(dead.properties) <= amqp.LETTER_MAX


def test_a_letter_asks_for_a_return() -> None:
    """A message that need not be routed is, as a dead letter, one that must."""
    message = Message(body=b"", routing_key="k", mandatory=False)
    envelope = raw.encode(message, exchange="x")
    assert envelope.properties[1] & amqp.NOT_MANDATORY
    assert not dead_letter(envelope, "dlx", {"a": 1}).properties[1] & amqp.NOT_MANDATORY
