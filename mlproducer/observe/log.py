"""Log state changes as lines with ``key=value`` fields; nothing for each message above DEBUG.

In a storm a limited number of lines of one kind is logged; the next line of any kind then follows
the number of those that were suppressed. Foreign text, such as the broker's, is escaped and cut.

Runs on: the thread on which the event happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.errors import PublishError, StoreError
from mlproducer.observe.events import EventSink
from mlproducer.observe.lines import Lines

logger = logging.getLogger(__name__)

MAX_WORDS = 200
"""Characters that are logged of a foreign text."""


LOGGERS = {
    "connected": "_engine.connection",
    "disconnected": "_engine.connection",
    "channel closed": "_engine.connection",
    "blocked by the broker": "_engine.connection",
    "unblocked by the broker": "_engine.connection",
    "cannot connect": "_engine.connector",
    "gave up connecting": "_engine.connector",
    "cannot declare": "topology",
    "health check": "_engine.health",
    "no answer to the health check; reconnecting": "_engine.health",
    "circuit breaker": "_core.breaker",
    "dead-lettered": "dead_letters",
    "the store fails": "stores",
    "confirm for a delivery tag that is not open": "_core.confirms",
    "the I/O loop failed; going on with a new one": "_engine.io_loop",
    "cannot hand over": "producer",
}
"""The logger for each kind of line: that of the module that the line is about."""

PRECONDITION_FAILED = 406
"""The broker has a queue or exchange of this name, with other arguments."""


class LogSink(EventSink):
    """Logs events for operators."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        loggers = {
            kind: logging.root.getChild(f"mlproducer.{name}") for kind, name in LOGGERS.items()
        }
        self._lines = Lines(logger, clock, loggers)
        self._log = self._lines.log

    def connected(self, address: str) -> None:
        """Log at INFO."""
        self._log(logging.INFO, "connected", "broker=%s", address)

    def disconnected(self, loss: Loss) -> None:
        """Log at WARNING, since messages wait; at INFO where the producer closed it."""
        level = logging.INFO if loss.kind is LossKind.CLOSED else logging.WARNING
        self._log(level, "disconnected", "kind=%s reason=%s", loss.kind.value, quoted(loss.text))

    def connection_error(self, loss: Loss) -> None:
        """Log at WARNING."""
        self._log(
            logging.WARNING,
            "cannot connect",
            "kind=%s reason=%s",
            loss.kind.value,
            quoted(loss.text),
        )

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Log at ERROR, and say what to do."""
        self._log(
            logging.ERROR,
            "gave up connecting",
            "attempts=%d reason=%s: check the broker; "
            "the next publish() or reconnect() starts over",
            attempts,
            quoted(loss.text),
        )

    def channel_lost(self, loss: Loss) -> None:
        """Log at WARNING."""
        self._log(
            logging.WARNING,
            "channel closed",
            "code=%d reason=%s",
            loss.reply_code,
            quoted(loss.text),
        )

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Log at WARNING when it begins, at INFO when it ends."""
        if blocked:
            self._log(logging.WARNING, "blocked by the broker", "reason=%s", quoted(reason))
        else:
            self._log(logging.INFO, "unblocked by the broker")

    def topology_fault(self, target: str, loss: Loss) -> None:
        """Log at ERROR: an operator has to repair it."""
        hint = ' hint="mlproducer topology"' if loss.reply_code == PRECONDITION_FAILED else ""
        self._log_fault("cannot declare", target, loss, hint)

    def health_fault(self, target: str, loss: Loss) -> None:
        """Log at ERROR: an operator has to repair it."""
        self._log_fault("health check", target, loss)

    def _log_fault(self, kind: str, target: str, loss: Loss, hint: str = "") -> None:
        fields = f"target=%s code=%d reason=%s{hint}"
        self._log(logging.ERROR, kind, fields, target, loss.reply_code, quoted(loss.text))

    def circuit_changed(self, state: CircuitState) -> None:
        """Log at WARNING when it opens, else at INFO."""
        level = logging.WARNING if state is CircuitState.OPEN else logging.INFO
        self._log(level, "circuit breaker", "state=%s", state.value)

    def dead_lettered(self, delivery: Delivery) -> None:
        """Log at ERROR: an operator has to look at it."""
        self._log(
            logging.ERROR,
            "dead-lettered",
            "message_id=%s attempts=%d reason=%s",
            quoted(delivery.envelope.message_id),
            delivery.attempts,
            type(delivery.reason).__name__,
        )

    def store_failed(self, error: StoreError) -> None:
        """Log at ERROR: deferred messages are not safe."""
        self._log(logging.ERROR, "the store fails", "reason=%s", quoted(str(error)))

    def health_checked(self, *, alive: bool) -> None:
        """Log at WARNING if there was no answer."""
        if not alive:
            self._log(logging.WARNING, "no answer to the health check; reconnecting")

    def stray_confirm(self, tag: int) -> None:
        """Log at WARNING: the broker breaks the protocol."""
        fields = "tag=%d"
        self._log(logging.WARNING, "confirm for a delivery tag that is not open", fields, tag)

    def refused(self, message_id: str, error: PublishError) -> None:
        """Log at ERROR: the application has continued, and the message is not sent."""
        fields = "message_id=%s reason=%s"
        name = type(error).__name__
        self._log(logging.ERROR, "cannot hand over", fields, quoted(message_id), name)

    def crashed(self, error: BaseException) -> None:
        """Log at CRITICAL, with the traceback."""
        self._log(logging.CRITICAL, "the I/O loop failed; going on with a new one", error=error)

    def state_changed(self, state: ConnectionState) -> None:
        """At the end, log the numbers of suppressed lines."""
        if state is ConnectionState.CLOSED:
            self._lines.close()


def quoted(text: str) -> str:
    """Return a foreign text cut and quoted, with all but printable characters escaped."""
    return repr(text[:MAX_WORDS])
