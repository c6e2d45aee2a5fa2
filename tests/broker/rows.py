"""What the tests of the outcomes share: a message, how it failed, and whether that heals.

Runs on: the tests' threads.
"""

from __future__ import annotations

from typing import Any

import pytest

from mlproducer import Message, MLProducer, Outcome, Receipt
from mlproducer.errors import PublishError

EXCHANGE = "bookmarkai.ml"
QUEUE = "ml.embed"
HEALED = 60.0
"""Seconds within which what was deferred arrives once its fault is over, a restart included."""

both_ways = pytest.mark.parametrize("retry", [True, False], ids=["retry", "no retry"])


def message(name: str, **fields: Any) -> Message:
    """A small message to the queue of the embeddings."""
    return Message(**{"body": b"x", "routing_key": QUEUE, "message_id": name, **fields})


def failure(
    producer: MLProducer, given: Message, *, retry: bool, timeout: float = 5.0
) -> tuple[PublishError, Receipt | None]:
    """Publish what cannot be confirmed: the reason of its deferral, or the error raised.

    With ``retry`` the message must be ours, without it must be given back.
    """
    if not retry:
        with pytest.raises(PublishError) as caught:
            producer.publish(given, timeout=timeout, retry=False)
        return caught.value, None
    receipt = producer.publish(given, timeout=timeout)
    assert receipt.outcome is Outcome.DEFERRED
    assert not receipt.durable
    assert receipt.message_id == given.message_id
    assert receipt.reason is not None
    assert receipt.attempts == receipt.reason.attempts
    return receipt.reason, receipt


def assert_error(
    error: BaseException | None,
    kind: type[PublishError],
    name: str | None,
    *,
    attempts: int,
    possibly_sent: bool,
) -> None:
    """Hold an error against its row of the table."""
    assert type(error) is kind
    assert isinstance(error, PublishError)
    assert error.message_id == name
    assert (error.attempts, error.possibly_sent) == (attempts, possibly_sent)


def assert_healed(receipt: Receipt, *, attempts: int) -> None:
    """The fault is over: the message that was ours is confirmed."""
    settled = receipt.result(HEALED)
    assert settled.outcome is receipt.outcome is Outcome.CONFIRMED
    assert settled.attempts == attempts
