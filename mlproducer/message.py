"""What is published, and what the publisher gets for it.

`Message` is what a user hands in where no task class fits; `Envelope` is any message in the form in
which it waits, travels and is stored: a route, encoded properties, a body. `Receipt` is what the
library answers. Nothing here knows how a message travels.

Runs on: any thread; nothing here is changed once it is made.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from attrs import define, field, frozen

from mlproducer.errors import PublishError
from mlproducer.latch import seconds

RAW_TASK_TYPE = "raw"


class Outcome(enum.Enum):
    """What became of a message whose `publish()` returned."""

    CONFIRMED = "confirmed"
    DEFERRED = "deferred"


@frozen(kw_only=True)
class Message:
    """A message of any content, published as it stands.

    Its fields are checked against AMQP by ``publish()``, on the caller's thread.

    :ivar body: the payload
    :ivar routing_key: at most 255 bytes of UTF-8, no control characters
    :ivar exchange: the exchange's name; ``""`` is the default exchange, ``None`` the settings' one
    :ivar headers: AMQP field table of str, bytes, bool, int (64 bit), None, list and dict
    :ivar priority: 0 to 255
    :ivar expiration: seconds until the broker may drop the message from a queue
        (RabbitMQ guide, *Time-To-Live*)
    :ivar persistent: written to disk by the broker (AMQP delivery mode 2)
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


@define(eq=False)
class Envelope:
    """A message ready to travel: everything checked, everything encoded.

    Nobody changes one; `attrs.frozen` would see to that at half a microsecond a message.

    Every attempt sends the same bytes, so that a consumer can tell a duplicate by its id.

    :ivar task_type: the metric label
    :ivar properties: AMQP property flags and values, up to the last, which names the attempt
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

    def __repr__(self) -> str:
        reason = f", reason={type(self.reason).__name__}" if self.reason else ""
        return (
            f"Receipt({self.outcome.name}, message_id={self.message_id!r}, "
            f"attempts={self.attempts}, elapsed={self.elapsed:.3f}{reason})"
        )
