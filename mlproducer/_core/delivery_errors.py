"""Errors about one delivery: a fresh one each time, with what is known of its fate.

Runs on: the I/O thread, and publishers' where the store is silent; pure.
"""

from __future__ import annotations

from typing import Any, TypeVar

from mlproducer._core.delivery import Delivery, Doubt
from mlproducer.errors import (
    AuthenticationError,
    BrokerRejectedError,
    NotConnectedError,
    PublishError,
    RetriesExhaustedError,
    StoreError,
    UnroutableError,
)

E = TypeVar("E", bound=PublishError)


def failure(kind: type[E], delivery: Delivery, text: str, /, **facts: Any) -> E:
    """Make an error; whether the broker may have the message is read off the delivery."""
    return kind(
        text,
        **facts,
        message_id=delivery.envelope.message_id,
        attempts=delivery.attempts,
        possibly_sent=delivery.doubt is not Doubt.NONE or delivery.in_flight,
    )


def silent_store(delivery: Delivery, name: str) -> StoreError:
    """Make the error of a message that a store has not taken, or not deleted, in time."""
    return failure(StoreError, delivery, f"the store has not answered in time: {name}")


def unroutable(delivery: Delivery) -> UnroutableError:
    """Make the error of a message that the broker has returned."""
    reply_code, reply_text = delivery.returned
    error = failure(
        UnroutableError, delivery, f"the broker returned the message: {reply_code} {reply_text}"
    )
    error.reply_code, error.reply_text = reply_code, reply_text
    return error


def rejected(delivery: Delivery, reply_code: int, reply_text: str) -> BrokerRejectedError:
    """Make the error of a message over which the broker closed the channel.

    It was never routed, also where an earlier attempt went down with a channel that another message
    had closed; unless the broker has failed over it, or what it lacks now was there before.
    """
    error = failure(BrokerRejectedError, delivery, reply_text)
    error.possibly_sent = delivery.doubt is Doubt.POSSIBLE
    error.reply_code, error.reply_text = reply_code, reply_text
    return error


def unreachable(delivery: Delivery, why: PublishError) -> PublishError:
    """Make the error of a message for which there is no broker, like the one given."""
    error = failure(type(why), delivery, str(why))
    if isinstance(error, NotConnectedError | AuthenticationError) and isinstance(why, type(error)):
        error.kind, error.address = why.kind, why.address
        error.reply_code, error.reply_text = why.reply_code, why.reply_text
    return error


def exhausted(delivery: Delivery) -> RetriesExhaustedError:
    """Make the error of a message that was dead-lettered."""
    error = failure(RetriesExhaustedError, delivery, "dead-lettered after the last retry")
    error.reason = delivery.reason
    return error
