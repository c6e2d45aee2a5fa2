"""Small things that tests of several rings need: envelopes, deliveries, messages.

Runs on: the tests' threads.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future

from mlproducer import Message
from mlproducer.core.delivery import Delivery
from mlproducer.message import Envelope

LIMIT = 5.0
"""Seconds after which a test stops waiting for what ought to come."""

_numbers = itertools.count(1)


def make_envelope(
    message_id: str | None = None,
    *,
    exchange: str = "x",
    routing_key: str = "k",
    body: bytes = b"body",
) -> Envelope:
    """Give an envelope with an id of its own; its properties are no valid AMQP."""
    return Envelope(
        message_id or f"m{next(_numbers)}", "raw", exchange, routing_key, b"\x10\x00", body
    )


def make_delivery(
    message_id: str | None = None,
    *,
    exchange: str = "x",
    routing_key: str = "k",
    body: bytes = b"body",
    started: float = 0.0,
    deadline: float = 5.0,
    retry: bool = True,
    answer_deferral: bool = True,
) -> Delivery:
    """Give a delivery as `MLProducer.publish` makes it."""
    return Delivery(
        make_envelope(message_id, exchange=exchange, routing_key=routing_key, body=body),
        Future(),
        started=started,
        deadline=deadline,
        retry=retry,
        answer_deferral=answer_deferral,
    )


def make_message(message_id: str | None = None, *, body: bytes = b"body") -> Message:
    """Give a small message for a fake broker, which has every route."""
    return Message(body=body, routing_key="k", message_id=message_id)
