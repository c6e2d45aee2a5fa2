"""Messages and receipts.

A user publishes a `Message` where no task class fits. An `Envelope` is any message in its encoded
form, in which it is queued, sent and stored: route, properties, body. A `Receipt` is the answer to
the publisher; what is still open then comes as its `Fate`.

Runs on: any thread; a `Fate` is resolved on the I/O thread, and nothing else is changed once it is
made.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime
from typing import Any

from attrs import define, field, frozen

from mlproducer import _clock as time
from mlproducer import _field_checks as checks
from mlproducer._field_checks import Check
from mlproducer._synchronization import Watch, seconds
from mlproducer.errors import PublishError, frameless_init

RAW_TASK_TYPE = "raw"

ORPHANED = 0.05
"""Seconds after which a future's lock, usually held for microseconds, counts as lost."""


class Outcome(enum.Enum):
    """The outcome of a message whose `publish()` returned."""

    CONFIRMED = "confirmed"
    DEFERRED = "deferred"


@frameless_init
@frozen(kw_only=True, slots=False)
class Message:
    """A message of any content, published unchanged.

    Types are checked when it is made; the limits of AMQP, such as lengths, by ``publish()``.

    :ivar body: the payload
    :ivar routing_key: at most 255 bytes of UTF-8 without control characters, like the other short
        texts
    :ivar exchange: ``""`` is the default exchange, ``None`` the exchange of the settings
    :ivar headers: AMQP field table of str, bytes, bool, int (64 bit), finite float, datetime (to
        the second), None, list and dict
    :ivar priority: 0 to 255
    :ivar expiration: seconds until the broker may drop the message from a queue
        (RabbitMQ guide, *Time-To-Live*)
    :ivar persistent: the broker writes it to disk (AMQP delivery mode 2)
    :ivar mandatory: if no queue gets the message, the broker returns it, which is an
        `UnroutableError`; otherwise the broker drops and confirms it
    :ivar timestamp: when it was made: a datetime with a time zone, or seconds since 1970
    :ivar user_id: the broker rejects any but the connection's own user (RabbitMQ guide,
        *Validated User-ID*)
    :raises InvalidTaskError: a field has a wrong type; the text names the field, the type, and what
        is accepted
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
        """Check types, and copy what the caller may change later."""
        if type(self.body) is not bytes:
            object.__setattr__(self, "body", checks.body("body", self.body))
        checks.a_str("routing_key", self.routing_key)
        checks.boolean("persistent", self.persistent)
        checks.boolean("mandatory", self.mandatory)
        if self.headers is not None:
            object.__setattr__(self, "headers", checks.headers("headers", self.headers))
        given = vars(self)
        for name in _TEXTS:
            value = given[name]
            if value is not None and type(value) is not str:
                checks.a_str(name, value)
        for name, check in _NUMBERS:
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
        return None if self.timestamp is None else checks.timestamp("timestamp", self.timestamp)

    def payload(self) -> bytes:
        """Return the body, as the consumer gets it; for tests."""
        return self.body


_TEXTS = (
    *("exchange", "content_type", "content_encoding", "message_id", "correlation_id"),
    *("type", "reply_to", "app_id", "user_id"),
)
_NUMBERS: tuple[tuple[str, Check], ...] = (
    ("priority", checks.an_int),
    ("expiration", checks.a_number),
    ("timestamp", checks.timestamp),
)


@define(eq=False)
class Envelope:
    """A message that is checked and encoded.

    It is never changed; `attrs.frozen` would enforce that, for half a microsecond a message. Every
    attempt sends the same bytes, so that a consumer recognizes a duplicate by its id.

    :ivar task_type: the metric label
    :ivar properties: AMQP property flags and values, without the last value, which identifies the
        attempt (`mlproducer._wire.amqp.properties`)
    """

    message_id: str
    task_type: str
    exchange: str
    routing_key: str
    properties: bytes = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of properties and body: about the size in memory and on the wire."""
        return len(self.properties) + len(self.body)

    def unloaded(self) -> Envelope:
        """Return it without properties and body."""
        return Envelope(self.message_id, self.task_type, self.exchange, self.routing_key, b"", b"")


@define(eq=False, repr=False)
class Receipt:
    """The library owns the message: the broker has confirmed it, or it will be retried.

    A ``DEFERRED`` receipt becomes ``CONFIRMED`` with a late confirm or a successful retry.
    """

    # Read by properties, and not frozen by attrs, whose check takes longer than all the rest.
    _message_id: str
    _attempts: int
    _elapsed: float
    _durable: bool = True
    _reason: PublishError | None = None
    _fate: Future[Receipt] | None = None

    @property
    def message_id(self) -> str:
        """The id that the message has in every attempt."""
        return self._message_id

    @property
    def attempts(self) -> int:
        """How many times the message had been written to the wire by then."""
        return self._attempts

    @property
    def elapsed(self) -> float:
        """Seconds from the call to the answer."""
        return self._elapsed

    @property
    def durable(self) -> bool:
        """Whether the message survives this process, on the broker or in a durable store."""
        return self._durable

    @property
    def reason(self) -> PublishError | None:
        """Why it was deferred; ``None`` where it was confirmed at once."""
        return self._reason

    @property
    def outcome(self) -> Outcome:
        """CONFIRMED once the broker has confirmed the message, otherwise DEFERRED."""
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
        :raises RetriesExhaustedError: the message was dead-lettered
        :raises ProducerClosedError: the producer was closed while the message was only in memory
        :raises TimeoutError: the fate is still open; at once where the message is in a durable
            store and the producer was closed
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
        """Pickle what is known now; a copy in another process does not follow the fate."""
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


class Fate(Future[Receipt]):
    """The fate of a message, to which receipts and futures refer: waiters may be interrupted.

    The standard library's wait is Python code that holds a lock: a Ctrl-C in it can turn into a
    RuntimeError, or leave the lock held for ever. Here waiters use latches. ``done()`` and
    callbacks still need the lock; if an interrupt left it held, it is replaced after a moment.

    :ivar delivery: kept alive as long as this is referenced and not resolved
    """

    delivery: object = None

    def __init__(self) -> None:
        super().__init__()
        self._resolved = Watch()

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt, or raise the error.

        :param timeout: seconds; ``None`` waits without a limit
        """
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error; return ``None`` if there is a receipt."""
        self._wait(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Withdraw the message; return false if the sender has taken it."""
        cancelled = super().cancel()
        if cancelled:
            self._conclude()
        return cancelled

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message, for the sender; return false if it was withdrawn."""
        self._replace_lost_lock()
        try:
            return super().set_running_or_notify_cancel()
        except RuntimeError:  # it was taken, or withdrawn, by a call that was cut after that
            return self.running()

    def set_result(self, result: Receipt) -> None:
        """Resolve it: the message was delivered."""
        self._replace_lost_lock()
        super().set_result(result)
        self._conclude()

    def set_exception(self, exception: BaseException | None) -> None:
        """Resolve it: the message was not delivered."""
        self._replace_lost_lock()
        super().set_exception(exception)
        self._conclude()

    def _conclude(self) -> None:
        """Drop the delivery, which refers to this, and wake the waiters."""
        self.delivery = None
        self._resolved.changed()

    def _wait(self, timeout: float | None) -> None:
        if timeout is not None:
            timeout = seconds(0.0 if timeout < 0 else timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._resolved.wait_for(self.done, deadline)

    def _replace_lost_lock(self) -> None:
        """Replace the lock if an interrupt has left it held.

        ``_condition`` is not part of the documented API of `Future`; without it the lock stays. If
        a thread still holds the old lock after all, in a long signal handler, it releases that one
        later: it then guards nothing, and no wait of this class uses it.
        """
        lock = getattr(self, "_condition", None)
        if lock is None:
            return
        if lock.acquire(timeout=ORPHANED):
            lock.release()
        else:
            # guards: the state of this future in the base class
            self._condition = threading.Condition()


def _thawed(
    message_id: str,
    attempts: int,
    elapsed: float,
    durable: bool,
    reason: PublishError | None,
    end: BaseException | str | None,
) -> Receipt:
    """Restore a pickled receipt; if its fate was open, it stays open."""
    fate: Future[Receipt] | None = None
    if isinstance(end, BaseException):
        fate = Future()
        fate.set_exception(end)
    elif end is not None:
        fate = Future()
        fate.cancel()
    return Receipt(message_id, attempts, elapsed, durable, reason, fate)
