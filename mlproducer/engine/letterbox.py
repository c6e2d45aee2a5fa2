"""Reads the dead-letter queue, for the commands: a blocking channel, and letters held until acked.

Runs on: the thread of a command.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from mlproducer.engine.link import Route, blocking_channel
from mlproducer.message import Message

DEATH_HEADERS = (
    "x-death-reason",
    "x-attempts",
    "x-original-exchange",
    "x-original-routing-key",
    "x-first-failed-at",
)


@frozen
class Letter:
    """A dead letter.

    :ivar message: what was to be delivered, as it was before its death
    :ivar where: ``queue`` or ``store``
    """

    message_id: str
    reason: str
    attempts: int
    exchange: str
    routing_key: str
    first_failed_at: str
    where: str
    message: Message = field(repr=False)
    tag: int = field(default=0, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Give what the commands print."""
        return {
            "message_id": self.message_id,
            "reason": self.reason,
            "attempts": self.attempts,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "first_failed_at": self.first_failed_at,
            "where": self.where,
        }


class Letterbox:
    """The dead-letter queue, opened; what was taken and not acked goes back when it is closed."""

    def __init__(self, route: Route, queue: str) -> None:
        self._queue = queue
        self._channel = blocking_channel(route)

    def __enter__(self) -> Letterbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.connection.close()

    def take(self) -> Iterator[Letter]:
        """Take letters one by one, until none is left that was there at the start."""
        found = self._channel.queue_declare(self._queue, passive=True).method.message_count
        for _ in itertools.repeat(None, found):
            method, properties, body = self._channel.basic_get(self._queue)
            if method is None:
                return
            yield _letter(method, properties, body)

    def ack(self, letter: Letter) -> None:
        """Delete a letter that was taken."""
        self._channel.basic_ack(letter.tag)


def _letter(method: Any, properties: Any, body: bytes) -> Letter:
    headers = dict(properties.headers or {})
    headers.pop("x-delivery-count", None)  # the queue's own note
    reason, attempts, exchange, routing_key, since = (
        headers.pop(name, None) for name in DEATH_HEADERS
    )
    message = Message(
        body=body,
        routing_key=str(routing_key or method.routing_key),
        exchange=str(exchange or ""),
        headers=headers,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        priority=properties.priority,
        expiration=int(properties.expiration) / 1000 if properties.expiration else None,
        message_id=properties.message_id,
        correlation_id=properties.correlation_id,
        type=properties.type,
        persistent=properties.delivery_mode == 2,
    )
    return Letter(
        message_id=str(properties.message_id),
        reason=str(reason),
        attempts=int(attempts or 0),
        exchange=message.exchange or "",
        routing_key=message.routing_key,
        first_failed_at=str(since),
        where="queue",
        message=message,
        tag=method.delivery_tag,
    )
