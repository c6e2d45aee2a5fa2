"""Reads dead letters: out of a queue, in batches, each held until acked, or out of a store's row.

A letter is a message that this library, or the broker itself (RabbitMQ guide, *Dead Letter
Exchanges*), gave up; its headers tell how it died, and are taken off what may be sent again.

Runs on: the thread of whoever asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from attrs import evolve, field, frozen

from mlproducer.engine.directory import Route
from mlproducer.engine.link import blocking_channel, decode_properties
from mlproducer.engine.losses import closed_by_broker, translate
from mlproducer.errors import MLProducerError, NotConnectedError
from mlproducer.message import Envelope, Message
from mlproducer.wire.dead_letter import EXPIRATION_HEADER

PATIENCE = 5.0
"""Seconds for the broker to hand out a letter that it has counted."""

DEATH_HEADERS = (
    "x-death-reason",
    "x-attempts",
    "x-original-exchange",
    "x-original-routing-key",
    "x-first-failed-at",
)
BROKERS_HEADERS = (
    "x-death",
    "x-first-death-reason",
    "x-first-death-queue",
    "x-first-death-exchange",
    "x-last-death-reason",
    "x-last-death-queue",
    "x-last-death-exchange",
    "x-delivery-count",
)
LOST_PROPERTIES = ("reply_to", "user_id", "app_id")
"""What a `Message` cannot carry; only letters of other publishers have it."""


@frozen
class Letter:
    """A dead letter.

    :ivar reason: the last error's name and text, or the broker's word for what it did
    :ivar exchange: where the message was to go; ``""`` is the default exchange
    :ivar first_failed_at: ISO 8601, or ``""`` where nobody wrote it down
    :ivar where: ``queue`` or ``store``
    :ivar message: what was to be delivered, as it was before its death
    :ivar lacks: properties that ``message`` cannot carry, so that it cannot be sent again
    """

    message_id: str
    reason: str
    attempts: int
    exchange: str
    routing_key: str
    first_failed_at: str
    where: str
    message: Message = field(repr=False)
    lacks: tuple[str, ...] = ()
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
    """A queue of letters, opened; what was taken and not acked goes back when it is closed.

    :param routes: brokers, the first of which that answers is used
    :param prefetch: letters in a batch
    :raises NotConnectedError: none of them answers, or the broker goes away meanwhile
    """

    def __init__(self, routes: Sequence[Route], queue: str, prefetch: int) -> None:
        self._queue = queue
        self._prefetch = prefetch
        self._route, self._channel = _open(routes)
        self._arrived: list[Letter] = []

    def __enter__(self) -> Letterbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lost = not self._channel.is_open
        if self._channel.connection.is_open:
            self._channel.connection.close()
        if lost and isinstance(error, Exception) and not isinstance(error, MLProducerError):
            raise NotConnectedError(self._explain(error)) from None

    def _explain(self, error: Exception) -> str:
        if hasattr(error, "reply_code"):
            return closed_by_broker(error, f"{self._route.broker.address}: ").text
        return translate(self._route.broker.address, error).text

    def take(self) -> Iterator[list[Letter]]:
        """Take letters, a batch at a time, until all that were there at the start are taken.

        Each batch has a consumer of its own, so that letters which stay, and so are never acked,
        do not use up the prefetch of those that come after them.
        """
        left = self._channel.queue_declare(self._queue, passive=True).method.message_count
        self._channel.basic_qos(prefetch_count=self._prefetch)
        while left > 0 and (batch := self._receive(min(left, self._prefetch))):
            left -= len(batch)
            yield batch

    def ack(self, letter: Letter) -> None:
        """Delete a letter that was taken."""
        self._channel.basic_ack(letter.tag)

    def _receive(self, count: int) -> list[Letter]:
        self._arrived = []
        consumer = self._channel.basic_consume(self._queue, self._on_letter)
        deadline = time.monotonic() + PATIENCE
        while len(self._arrived) < count and time.monotonic() < deadline:
            self._channel.connection.process_data_events(max(0.0, deadline - time.monotonic()))
        self._channel.basic_cancel(consumer)
        return self._arrived

    def _on_letter(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        letter = _letter(method.routing_key, properties, body, where="queue")
        self._arrived.append(evolve(letter, tag=method.delivery_tag))


def _open(routes: Sequence[Route]) -> tuple[Route, Any]:
    reasons = []
    for route in routes:
        try:
            return route, blocking_channel(route)
        except NotConnectedError as error:
            reasons.append(str(error))
    raise NotConnectedError("; ".join(reasons))


def stored_letter(envelope: Envelope) -> Letter:
    """Read a letter that waits in a store until the broker takes it."""
    properties = decode_properties(envelope)
    return _letter(envelope.routing_key, properties, envelope.body, where="store")


def _letter(own_key: str, properties: Any, body: bytes, where: str) -> Letter:
    headers = dict(properties.headers or {})
    history = _history(headers)
    reason, attempts, exchange, routing_key, since = (
        headers.pop(name, history.get(name)) for name in DEATH_HEADERS
    )
    expiration = str(properties.expiration or headers.pop(EXPIRATION_HEADER, ""))
    for name in BROKERS_HEADERS:
        headers.pop(name, None)
    message = Message(
        body=body,
        routing_key=str(routing_key or own_key),
        exchange=str(exchange or ""),
        headers=headers,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        priority=properties.priority,
        expiration=int(expiration) / 1000 if expiration.isdecimal() else None,
        message_id=properties.message_id,
        correlation_id=properties.correlation_id,
        type=properties.type,
        persistent=properties.delivery_mode == 2,
    )
    return Letter(
        message_id=properties.message_id or "",
        reason=str(reason or "unknown"),
        attempts=attempts if isinstance(attempts, int) else 0,
        exchange=message.exchange or "",
        routing_key=message.routing_key,
        first_failed_at=str(since or ""),
        where=where,
        message=message,
        lacks=tuple(name for name in LOST_PROPERTIES if getattr(properties, name) is not None),
    )


def _history(headers: dict[str, Any]) -> dict[str, Any]:
    """Say in our words what the broker notes of a message that it dead-lettered itself.

    Anybody can publish such a header, so nothing is taken for granted.
    """
    deaths = headers.get("x-death")
    if not (isinstance(deaths, list) and deaths and isinstance(deaths[-1], dict)):
        return {}
    first = deaths[-1]  # the latest stands first
    keys, since = first.get("routing-keys"), first.get("time")
    return {
        "x-death-reason": first.get("reason"),
        "x-attempts": first.get("count"),
        "x-original-exchange": first.get("exchange"),
        "x-original-routing-key": keys[0] if isinstance(keys, list) and keys else None,
        "x-first-failed-at": f"{since.isoformat()}+00:00" if isinstance(since, datetime) else None,
    }
