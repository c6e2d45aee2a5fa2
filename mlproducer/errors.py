"""The exceptions of this library, as a tree.

    MLProducerError
    ├── ConfigurationError          a setting or variable is missing or invalid (also a ValueError)
    ├── InvalidTaskError            a task's field is invalid (also a ValueError)
    └── PublishError                the message was not delivered; see possibly_sent
        ├── ProducerClosedError     the producer is closed
        ├── WouldDeadlockError      called on the producer's own thread or in its callback
        ├── InvalidMessageError     AMQP or strict JSON cannot carry it (also a ValueError)
        │   └── MessageTooLargeError
        ├── BufferFullError         the in-flight window or the store is full
        ├── StoreError              the store is needed and cannot be used
        ├── CircuitOpenError        the breaker is open; retry_after
        ├── AuthenticationError     the broker refuses the credentials or the virtual host
        ├── NotConnectedError       no connection, nothing written
        ├── BrokerBlockedError      the broker blocks publishers (memory or disk alarm)
        ├── BrokerRejectedError     404, 403 or 406 for this message; reply_code, reply_text
        ├── UnroutableError         returned: no queue is bound; reply_code, reply_text
        ├── NackError               the broker nacked the message
        ├── ConfirmTimeoutError     no confirm in time (also a TimeoutError)
        ├── ConnectionLostError     connection or channel lost after the write
        └── RetriesExhaustedError   dead-lettered after the last retry

Errors of the connection have the fields ``kind``, ``address``, ``reply_code`` and ``reply_text``.

Facts about all instances of a class are class attributes: ``possibly_sent`` (the broker may have
the message), ``counts_for_breaker`` (it is a failure for the circuit breaker), ``deferrable`` (with
``retry=True`` the library keeps the message and tries again) and ``permanent`` (no later attempt
can succeed). An instance may override ``possibly_sent``. Texts never hold a payload or a secret.

Runs on: any thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

__all__ = [
    "AuthenticationError",
    "BrokerBlockedError",
    "BrokerRejectedError",
    "BufferFullError",
    "CircuitOpenError",
    "ConfigurationError",
    "ConfirmTimeoutError",
    "ConnectionLostError",
    "InvalidMessageError",
    "InvalidTaskError",
    "MLProducerError",
    "MessageTooLargeError",
    "NackError",
    "NotConnectedError",
    "ProducerClosedError",
    "PublishError",
    "RetriesExhaustedError",
    "StoreError",
    "UnroutableError",
    "WouldDeadlockError",
]


_Call = TypeVar("_Call", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


def frameless(call: _Call) -> _Call:
    """Decorate a function so that its `MLProducerError` is raised without the inner frames.

    Error reporters send the local variables of a traceback's frames, and the inner ones hold
    passwords or users' texts. For the same reason no other error stays chained. Where the arguments
    do not fit the function, the `TypeError` is of this frame, so its variables are deleted too.
    """

    @functools.wraps(call)
    def shielded(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except MLProducerError as error:
            problem = error.with_traceback(None)
        except BaseException:
            del args, kwargs
            raise
        del args, kwargs
        problem.__cause__ = problem.__context__ = None
        raise problem

    return shielded  # type: ignore[return-value] # the same signature, which wraps() loses


def frameless_init(cls: _Class) -> _Class:
    """Decorate an attrs class so that its constructor is `frameless`."""
    made: Any = cls
    made.__init__ = frameless(made.__init__)
    return cls


class MLProducerError(Exception):
    """The base class of every error that this library raises."""

    possibly_sent: bool = False


class ConfigurationError(MLProducerError, ValueError):
    """A setting or an environment variable is missing or invalid; the text names it."""


class InvalidTaskError(MLProducerError, ValueError):
    """A task's field is invalid; the text names the field, its type, and what is accepted."""


class PublishError(MLProducerError):
    """A message was not delivered.

    :ivar message_id: the message's id; ``None`` where it had none yet
    :ivar attempts: how many times the message was written to the wire
    :ivar possibly_sent: whether the broker may have the message already
    """

    counts_for_breaker: ClassVar[bool] = False
    deferrable: ClassVar[bool] = False
    permanent: ClassVar[bool] = False

    def __init__(
        self,
        text: str = "",
        *,
        message_id: str | None = None,
        attempts: int = 0,
        possibly_sent: bool | None = None,
    ) -> None:
        super().__init__(text)
        self.message_id = message_id
        self.attempts = attempts
        if possibly_sent is not None:
            self.possibly_sent = possibly_sent


class _BrokerReplyError(PublishError):
    """An error that the broker itself reported.

    :ivar reply_code: AMQP 0-9-1 reply code, such as 404 (section 1.5.2.5 of its reference)
    :ivar reply_text: the broker's words, cut and free of control characters
    """

    def __init__(
        self, text: str = "", *, reply_code: int = 0, reply_text: str = "", **common: Any
    ) -> None:
        super().__init__(text, **common)
        self.reply_code = reply_code
        self.reply_text = reply_text


class _ConnectionError(_BrokerReplyError):
    """An error of the connection.

    :ivar kind: what failed, in one word: ``dns``, ``refused``, ``timeout``, ``tls``,
        ``authentication``, ``heartbeat``, ``lost`` ...; ``""`` where it is not known
    :ivar address: ``host:port`` of the broker; ``""`` where it is not known
    :ivar reply_code: the broker's AMQP reply code, such as 403 or 530; 0 where it sent none
    :ivar reply_text: the broker's words, cut and free of control characters
    """

    def __init__(self, text: str = "", *, kind: str = "", address: str = "", **common: Any) -> None:
        super().__init__(text, **common)
        self.kind = kind
        self.address = address


class ProducerClosedError(PublishError):
    """The producer is closed, or was closed while it still held the message in memory."""

    permanent = True


class WouldDeadlockError(PublishError):
    """A blocking method was called on one of the producer's own threads, or in a callback."""


class InvalidMessageError(PublishError, ValueError):
    """AMQP 0-9-1 or strict JSON (RFC 8259) cannot carry the message; nothing was sent."""

    permanent = True


class MessageTooLargeError(InvalidMessageError):
    """The body is longer than ``max_message_bytes``, or the headers do not fit a frame."""


class BufferFullError(PublishError):
    """The in-flight window or the store is full; nothing was sent."""


class StoreError(PublishError):
    """The store is needed, and is unreachable, locked or unreadable; the text names it."""


class CircuitOpenError(PublishError):
    """The circuit breaker is open; nothing was sent.

    :ivar retry_after: seconds until the breaker lets a probe through
    """

    deferrable = True

    def __init__(self, text: str = "", *, retry_after: float = 0.0, **common: Any) -> None:
        super().__init__(text, **common)
        self.retry_after = retry_after


class AuthenticationError(_ConnectionError):
    """The broker refuses the credentials (403) or the virtual host (530).

    With ``retry=True`` a durable store keeps the message until they are corrected.
    """

    deferrable = True


class NotConnectedError(_ConnectionError):
    """There is no connection to a broker; nothing was written."""

    counts_for_breaker = True
    deferrable = True


class BrokerBlockedError(PublishError):
    """The broker has blocked publishers: a memory or disk alarm (RabbitMQ guide, *Alarms*)."""

    deferrable = True


class BrokerRejectedError(_BrokerReplyError):
    """The broker closed the channel over this message: 404, 403 or 406."""

    permanent = True


class UnroutableError(_BrokerReplyError):
    """The broker returned the message: no queue is bound for its route (AMQP 312)."""

    deferrable = True


class NackError(PublishError):
    """The broker nacked the message; another queue it was routed to may hold it."""

    possibly_sent = True
    counts_for_breaker = True
    deferrable = True


class ConfirmTimeoutError(PublishError, TimeoutError):
    """No confirm came within the timeout."""

    possibly_sent = True
    counts_for_breaker = True
    deferrable = True


class ConnectionLostError(_ConnectionError):
    """The connection or channel was lost after the message had been written."""

    possibly_sent = True
    counts_for_breaker = True
    deferrable = True


class RetriesExhaustedError(PublishError):
    """The last retry failed and the message was dead-lettered.

    :ivar reason: the error of the last attempt
    """

    permanent = True

    def __init__(
        self, text: str = "", *, reason: PublishError | None = None, **common: Any
    ) -> None:
        super().__init__(text, **common)
        self.reason = reason
