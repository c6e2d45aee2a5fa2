"""Reads dead letters: out of a queue, in batches, each held until acked, or out of a store's row.

A letter is a message that this library, or the broker itself (RabbitMQ guide, *Dead Letter
Exchanges*), gave up; its headers tell how it died, and are taken off what may be sent again.
Anyone who may write to the queue can put anything there, so nothing is taken for granted: what
cannot be read, or would not be the same message when sent again, is a letter with a ``problem``.

Runs on: the thread of the command that asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from typing import Any

from attrs import evolve, field, frozen

from mlproducer._engine.pika_adapters import decode_properties
from mlproducer._engine.session import Session, Unreadable
from mlproducer._wire.amqp import MAX_EXPIRATION
from mlproducer._wire.dead_letter import EXPIRATION_HEADER
from mlproducer._wire.delay import is_level
from mlproducer.errors import InvalidTaskError, PublishError
from mlproducer.message import Envelope, Message

PATIENCE = 5.0
"""Seconds for the broker to hand out a letter that it has counted."""

OWN_HEADERS = (
    "x-death-reason",
    "x-attempts",
    "x-original-exchange",
    "x-original-routing-key",
    "x-first-failed-at",
    EXPIRATION_HEADER,
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
FURTHER_PROPERTIES = ("reply_to", "timestamp", "app_id", "user_id")


@frozen
class Letter:
    """A dead letter.

    :ivar reason: the last error's name and text, or the broker's word for what it did
    :ivar attempts: how often the message was sent, or how often the broker dead-lettered it
    :ivar exchange: where the message was to go; ``""`` is the default exchange
    :ivar first_failed_at: ISO 8601, or ``""`` where it is not known
    :ivar where: ``queue`` or ``store``
    :ivar task: the Celery task's name, or ``""``
    :ivar body: the payload
    :ivar headers: the names of the message's headers
    :ivar message: what was to be delivered, as it was before its death; ``None`` where that is
        not known
    :ivar problem: why it cannot be sent again as it is, or ``""``
    """

    message_id: str
    reason: str
    attempts: int
    exchange: str
    routing_key: str
    first_failed_at: str
    where: str
    task: str = ""
    body: bytes = field(default=b"", repr=False)
    headers: tuple[str, ...] = field(default=(), repr=False)
    content: str = ""
    type: str = ""
    message: Message | None = field(default=None, repr=False)
    problem: str = ""
    tag: int = field(default=0, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what the commands print."""
        return {
            "message_id": self.message_id,
            "reason": self.reason,
            "attempts": self.attempts,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "first_failed_at": self.first_failed_at,
            "where": self.where,
        }

    @property
    def since(self) -> datetime | None:
        """When it first failed, with a time zone, if that can be read."""
        try:
            moment = datetime.fromisoformat(self.first_failed_at.replace("Z", "+00:00"))
        except ValueError:
            return None
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


class DeadLetterReader:
    """A queue of letters, opened; what was taken and not acked goes back when it is closed.

    :param prefetch: letters in a batch
    """

    def __init__(self, session: Session, queue: str, prefetch: int) -> None:
        self._session = session
        self._queue = queue
        self._prefetch = prefetch
        self._arrived: list[Letter] = []

    def __enter__(self) -> DeadLetterReader:
        self._session.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._session.__exit__(kind, error, traceback)

    def take(self) -> Iterator[list[Letter]]:
        """Take letters, a batch at a time, until all that were there at the start are taken.

        Each batch has a consumer of its own, so that letters which stay, and so are never acked,
        do not use up the prefetch of those that come after them.
        """
        declared = self._session.ask("queue_declare", self._queue, passive=True)
        left = declared.method.message_count
        self._session.ask("basic_qos", prefetch_count=self._prefetch)
        while left > 0 and (batch := self._receive(min(left, self._prefetch))):
            left -= len(batch)
            yield batch

    def ack(self, letter: Letter) -> None:
        """Delete a letter that was taken."""
        self._session.ask("basic_ack", letter.tag)

    def _receive(self, count: int) -> list[Letter]:
        self._arrived = []
        consumer = self._session.ask("basic_consume", self._queue, self._on_letter)
        self._session.wait(lambda: len(self._arrived) >= count, PATIENCE)
        self._session.ask("basic_cancel", consumer)
        return self._arrived

    def _on_letter(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        letter = read(method.routing_key, properties, body, where="queue")
        self._arrived.append(evolve(letter, tag=method.delivery_tag))


def stored_letter(envelope: Envelope) -> Letter:
    """Read a letter that waits in a store until the broker takes it."""
    try:
        properties: Any = decode_properties(envelope)
    except Exception:  # noqa: BLE001 - pika raises what struct, codecs and datetime do
        properties = Unreadable()
    letter = read(envelope.routing_key, properties, envelope.body, where="store")
    return letter if letter.message_id else evolve(letter, message_id=envelope.message_id)


def read(own_key: str, properties: Any, body: bytes, where: str) -> Letter:
    """Read a letter.

    :param own_key: the routing key with which it came
    """
    headers = dict(properties.headers or {})
    history = _history(headers)
    own = {name: headers.pop(name, history.get(name)) for name in OWN_HEADERS}
    for name in BROKERS_HEADERS:
        headers.pop(name, None)
    routed = isinstance(own["x-original-routing-key"], str)
    exchange = _text(own["x-original-exchange"]) if routed else ""
    routing_key = _text(own["x-original-routing-key"]) if routed else own_key
    attempts = own["x-attempts"]
    letter = Letter(
        message_id=_text(properties.message_id),
        reason=_text(own["x-death-reason"]) or "unknown",
        attempts=int(attempts) if isinstance(attempts, int) else 0,
        exchange=exchange,
        routing_key=routing_key,
        first_failed_at=_text(own["x-first-failed-at"]),
        where=where,
        task=_text(headers.get("task")),
        body=body,
        headers=tuple(sorted(map(str, headers))),
        content=", ".join(
            filter(None, map(_text, (properties.content_type, properties.content_encoding)))
        ),
        type=_text(properties.type),
    )
    if isinstance(properties, Unreadable):
        return evolve(letter, problem="its properties cannot be read")
    try:
        message = _message(letter, headers, properties, own[EXPIRATION_HEADER])
    except (InvalidTaskError, PublishError) as error:
        return evolve(letter, problem=str(error))
    nowhere = "" if routed else "it does not say where it was to go: name exchange and routing key"
    return evolve(letter, message=message, problem=nowhere)


def _message(letter: Letter, headers: dict[str, Any], properties: Any, original: Any) -> Message:
    """Make the message that it was before its death."""
    further = {name: getattr(properties, name) for name in FURTHER_PROPERTIES}
    return Message(
        body=letter.body,
        routing_key=letter.routing_key,
        exchange=letter.exchange,
        headers=headers,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        priority=properties.priority,
        expiration=_seconds(properties.expiration or original),
        message_id=properties.message_id,
        correlation_id=properties.correlation_id,
        type=properties.type,
        persistent=properties.delivery_mode == 2,
        **further,
    )


def _seconds(milliseconds: Any) -> float | None:
    """Read an expiration; one that AMQP could not carry is none."""
    text = milliseconds if isinstance(milliseconds, str) else ""
    if not text.isdecimal() or not text.isascii() or len(text) > len(f"{MAX_EXPIRATION}000"):
        return None
    return min(int(text) / 1000, float(MAX_EXPIRATION))


def _text(value: Any) -> str:
    if isinstance(value, bytes):  # pika gives so what is not UTF-8
        return value.decode(errors="backslashreplace")
    return "" if value is None else str(value)


def _history(headers: Collection[Any] | dict[str, Any]) -> dict[str, Any]:
    """Say in our words what the broker notes of a message that it dead-lettered itself.

    The latest death stands first. Those in the levels of delayed delivery were no deaths, but they
    leave a route that ends in the queue alone: such a message goes back to its queue by name.
    """
    found = headers.get("x-death") if isinstance(headers, dict) else None
    deaths = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    real = [each for each in deaths if not is_level(_text(each.get("queue")))]
    if not real:
        return {}
    first = real[-1]
    keys, since = first.get("routing-keys"), first.get("time")
    key = keys[0] if isinstance(keys, list) and keys and isinstance(keys[0], str) else None
    exchange = first.get("exchange")
    if len(real) < len(deaths):
        exchange, key = "", _text(first.get("queue")) or None
    return {
        "x-death-reason": first.get("reason"),
        "x-attempts": first.get("count"),
        "x-original-exchange": exchange,
        "x-original-routing-key": key,
        "x-first-failed-at": _moment(since),
        EXPIRATION_HEADER: first.get("original-expiration"),
    }


def _moment(since: Any) -> str | None:
    """Return the broker's time, of which older pikas do not say that it is UTC."""
    if not isinstance(since, datetime):
        return None
    return (since if since.tzinfo else since.replace(tzinfo=timezone.utc)).isoformat()
