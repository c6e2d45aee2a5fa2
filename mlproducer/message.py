"""What is published, and what the publisher gets for it.

`Message` is what a user hands in where no task class fits; `Envelope` is any message in the form in
which it waits, travels and is stored: a route, encoded properties, a body. `Receipt` is what the
library answers. Nothing here knows how a message travels.

Runs on: any thread; nothing here is changed once it is made.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime
from typing import Any

from attrs import define, field, frozen

from mlproducer import _clock as time
from mlproducer import _schema as shapes
from mlproducer._latch import seconds
from mlproducer._schema import Check
from mlproducer.errors import PublishError, frameless_init

RAW_TASK_TYPE = "raw"


class Outcome(enum.Enum):
    """What became of a message whose `publish()` returned."""

    CONFIRMED = "confirmed"
    DEFERRED = "deferred"


@frameless_init
@frozen(kw_only=True, slots=False)
class Message:
    """A message of any content, published as it stands.

    Types are checked when it is made; the limits of AMQP, such as lengths, by ``publish()``.

    :ivar body: the payload
    :ivar routing_key: at most 255 bytes of UTF-8, no control characters,
        like the other short texts here
    :ivar exchange: the exchange's name; ``""`` is the default exchange, ``None`` the settings' one
    :ivar headers: AMQP field table of str, bytes, bool, int (64 bit), finite float, datetime (to
        the second), None, list and dict
    :ivar priority: 0 to 255
    :ivar expiration: seconds until the broker may drop the message from a queue
        (RabbitMQ guide, *Time-To-Live*)
    :ivar persistent: written to disk by the broker (AMQP delivery mode 2)
    :ivar mandatory: a message that no queue gets is returned, and an `UnroutableError`; without it,
        the broker drops and confirms it
    :ivar timestamp: when it was made: a datetime with a time zone, or seconds since 1970
    :ivar user_id: the broker rejects any but the connection's own user (RabbitMQ guide,
        *Validated User-ID*)
    :raises InvalidTaskError: a field has a wrong type; the text names both, and what is accepted
    """

    body: bytes = field(repr=False)
    routing_key: str
    exchange: str | None = None
    headers: Mapping[str, Any] | None = field(default=None, repr=False)
    content_type: str | None = None
    content_encoding: str | None = None
    priority: int | None = None
    expiration: float | None = None
    message_id: str | None = None
    correlation_id: str | None = field(default=None, repr=False)
    type: str | None = None
    persistent: bool = True
    mandatory: bool = True
    reply_to: str | None = None
    timestamp: datetime | int | None = None
    app_id: str | None = None
    user_id: str | None = None

    def __attrs_post_init__(self) -> None:
        """Check types, and keep copies of what the caller may go on changing."""
        if type(self.body) is not bytes:
            object.__setattr__(self, "body", shapes.body("body", self.body))
        shapes.a_str("routing_key", self.routing_key)
        shapes.boolean("persistent", self.persistent)
        shapes.boolean("mandatory", self.mandatory)
        if self.headers is not None:
            object.__setattr__(self, "headers", shapes.headers("headers", self.headers))
        given = vars(self)
        for name, check in _OPTIONAL:
            value = given[name]
            if value is not None:
                check(name, value)

    @property
    def task_type(self) -> str:
        """The metric label."""
        return RAW_TASK_TYPE

    @property
    def seconds(self) -> int | None:
        """The timestamp in seconds since 1970."""
        return None if self.timestamp is None else shapes.timestamp("timestamp", self.timestamp)

    def payload(self) -> bytes:
        """Give the body, which the consumer gets, for tests."""
        return self.body


_OPTIONAL: tuple[tuple[str, Check], ...] = (
    *((name, shapes.a_str) for name in ("exchange", "content_type", "content_encoding")),
    *((name, shapes.a_str) for name in ("message_id", "correlation_id", "type", "reply_to")),
    *((name, shapes.a_str) for name in ("app_id", "user_id")),
    ("priority", shapes.an_int),
    ("expiration", shapes.a_number),
    ("timestamp", shapes.timestamp),
)


@define(eq=False)
class Envelope:
    """A message ready to travel: everything checked, everything encoded.

    Nobody changes one; `attrs.frozen` would see to that at half a microsecond a message.

    Every attempt sends the same bytes, so that a consumer can tell a duplicate by its id.

    :ivar task_type: the metric label
    :ivar properties: AMQP property flags and values, up to the last, which names the attempt
        (`mlproducer._wire.amqp.properties`)
    """

    message_id: str
    task_type: str
    exchange: str
    routing_key: str
    properties: bytes = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes that the message holds in memory, and about what it takes on the wire."""
        return len(self.properties) + len(self.body)


@frozen(eq=False, repr=False)
class Receipt:
    """The library owns the message: the broker has confirmed it, or it will be tried again.

    A receipt that was ``DEFERRED`` becomes ``CONFIRMED`` once a late confirm or a retry settles it.

    :ivar attempts: how often the message had been written to the wire when this was handed out
    :ivar elapsed: seconds from the call to the answer
    :ivar durable: the message survives this process (broker or durable store)
    :ivar reason: why it was deferred; ``None`` where it was confirmed at once
    """

    message_id: str
    attempts: int
    elapsed: float
    durable: bool = True
    reason: PublishError | None = None
    _fate: Future[Receipt] | None = None

    @property
    def outcome(self) -> Outcome:
        """CONFIRMED as soon as the broker has confirmed the message, else DEFERRED."""
        fate = self._fate
        if fate is None:
            return Outcome.CONFIRMED
        if fate.done() and not fate.cancelled() and fate.exception() is None:
            return fate.result(0).outcome
        return Outcome.DEFERRED

    @property
    def confirmed(self) -> bool:
        """Whether the broker has confirmed the message."""
        return self.outcome is Outcome.CONFIRMED

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the message's final fate.

        :param timeout: seconds; ``None`` waits without a limit
        :raises RetriesExhaustedError: it was dead-lettered
        :raises ProducerClosedError: the producer was closed while only memory held the message
        :raises TimeoutError: it is still undecided; at once where it is in a durable store and
            this producer was closed
        """
        if self._fate is None:
            return self
        if timeout is not None:
            timeout = seconds(0.0 if timeout < 0 else timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            settled = self._fate.result(timeout)
        except (FutureTimeoutError, CancelledError):
            raise TimeoutError(f"message {self.message_id} is still undecided") from None
        return settled.result(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def __copy__(self) -> Receipt:
        return self

    def __deepcopy__(self, _memo: object) -> Receipt:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Take along what is known now; a copy in another process does not follow the fate."""
        fate, end = self._fate, None
        if fate is not None and not self.confirmed:
            known = fate.done() and not fate.cancelled()
            end = (fate.exception(0) if known else None) or "undecided"
        return _thawed, (
            self.message_id, self.attempts, self.elapsed, self.durable, self.reason, end
        )  # fmt: skip

    def __repr__(self) -> str:
        reason = f", reason={type(self.reason).__name__}" if self.reason else ""
        return (
            f"Receipt({self.outcome.name}, message_id={self.message_id!r}, "
            f"attempts={self.attempts}, elapsed={self.elapsed:.3f}{reason})"
        )


def _thawed(
    message_id: str,
    attempts: int,
    elapsed: float,
    durable: bool,
    reason: PublishError | None,
    end: BaseException | str | None,
) -> Receipt:
    """Make a pickled receipt again; one that was undecided stays so."""
    fate: Future[Receipt] | None = None
    if isinstance(end, BaseException):
        fate = Future()
        fate.set_exception(end)
    elif end is not None:
        fate = Future()
        fate.cancel()
    return Receipt(message_id, attempts, elapsed, durable, reason, fate)
