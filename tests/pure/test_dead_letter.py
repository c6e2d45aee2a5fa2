"""The form of a dead letter: the old message, with headers that say what happened."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pika import spec

from mlproducer.message import Message
from mlproducer.wire import raw
from mlproducer.wire.dead_letter import dead_letter

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
