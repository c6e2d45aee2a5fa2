"""Log state changes as lines with ``key=value`` fields; nothing for each message above DEBUG.

`LINES` has the line for each kind of event.

In a storm a limited number of lines of one kind is logged; the next line of any kind then follows
the number of those that were suppressed. Foreign text, such as the broker's, is escaped and cut.

Runs on: the thread on which the event happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from logging import CRITICAL, ERROR, INFO, WARNING
from typing import Any

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.events import Event
from mlproducer._core.interfaces import LossKind
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.observe.sinks import Sink, Table

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
    "a dead letter stays in the store": "dead_letters",
    "the store fails": "stores",
    "confirm for a delivery tag that is not open": "_core.send_queue",
    "the I/O loop failed; going on with a new one": "_engine.io_loop",
    "cannot hand over": "producer",
}
"""The logger for each kind of line: that of the module that the line is about."""

PRECONDITION_FAILED = 406
"""The broker has a queue or exchange of this name, with other arguments."""


@frozen
class Line:
    """One line of the log.

    :ivar kind: how it begins, by which it is limited and has its logger
    :ivar fields: what follows, with a place for each of the values
    :ivar error: an error whose traceback is logged too
    """

    level: int
    kind: str
    fields: str = ""
    values: tuple[object, ...] = ()
    error: BaseException | None = None


def quoted(text: str) -> str:
    """Return a foreign text cut and quoted, with all but printable characters escaped."""
    return repr(text[:MAX_WORDS])


def _fault(kind: str, event: events.TopologyFault | events.HealthFault, hint: str = "") -> Line:
    """Return the line of what an operator has to repair."""
    loss = event.loss
    fields = f"target=%s code=%d reason=%s{hint}"
    return Line(ERROR, kind, fields, (event.target, loss.reply_code, quoted(loss.text)))


def _cannot_declare(event: events.TopologyFault) -> Line:
    there = event.loss.reply_code == PRECONDITION_FAILED
    return _fault("cannot declare", event, ' hint="mlproducer topology"' if there else "")


def _flow(event: events.FlowChanged) -> Line:
    if event.blocked:
        return Line(WARNING, "blocked by the broker", "reason=%s", (quoted(event.reason),))
    return Line(INFO, "unblocked by the broker")


LINES: Mapping[type[Event], Callable[[Any], Line | None]] = {
    events.Connected: lambda event: Line(INFO, "connected", "broker=%s", (event.address,)),
    # Messages wait, unless the producer closed it.
    events.Disconnected: lambda event: Line(
        INFO if event.loss.kind is LossKind.CLOSED else WARNING,
        "disconnected",
        "kind=%s reason=%s",
        (event.loss.kind.value, quoted(event.loss.text)),
    ),
    events.ConnectFailed: lambda event: Line(
        WARNING,
        "cannot connect",
        "kind=%s reason=%s",
        (event.loss.kind.value, quoted(event.loss.text)),
    ),
    events.GaveUp: lambda event: Line(
        ERROR,
        "gave up connecting",
        "attempts=%d reason=%s: check the broker; the next publish() or reconnect() starts over",
        (event.attempts, quoted(event.loss.text)),
    ),
    events.ChannelLost: lambda event: Line(
        WARNING,
        "channel closed",
        "code=%d reason=%s",
        (event.loss.reply_code, quoted(event.loss.text)),
    ),
    events.FlowChanged: _flow,
    events.TopologyFault: _cannot_declare,
    events.HealthFault: lambda event: _fault("health check", event),
    events.HealthChecked: lambda event: (
        None if event.alive else Line(WARNING, "no answer to the health check; reconnecting")
    ),
    events.CircuitChanged: lambda event: Line(
        WARNING if event.state is CircuitState.OPEN else INFO,
        "circuit breaker",
        "state=%s",
        (event.state.value,),
    ),
    events.DeadLettered: lambda event: Line(
        ERROR,
        "dead-lettered",
        "message_id=%s attempts=%d reason=%s",
        (
            quoted(event.delivery.envelope.message_id),
            event.delivery.attempts,
            type(event.delivery.reason).__name__,
        ),
    ),
    events.LetterKept: lambda event: Line(
        ERROR,
        "a dead letter stays in the store",
        "message_id=%s reason=%s",
        (quoted(event.delivery.envelope.message_id), quoted(str(event.error))),
    ),
    events.StoreFailed: lambda event: Line(
        ERROR, "the store fails", "reason=%s", (quoted(str(event.error)),)
    ),
    # The broker breaks the protocol.
    events.UnknownTag: lambda event: Line(
        WARNING, "confirm for a delivery tag that is not open", "tag=%d", (event.tag,)
    ),
    # The application has continued, and the message is not sent.
    events.Refused: lambda event: Line(
        ERROR,
        "cannot hand over",
        "message_id=%s reason=%s",
        (quoted(event.message_id), type(event.error).__name__),
    ),
    events.LoopFailed: lambda event: Line(
        CRITICAL, "the I/O loop failed; going on with a new one", error=event.error
    ),
}
"""The line for each kind of event that has one; at ERROR what an operator has to look at."""


class LogSink(Sink):
    """Logs events for operators."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        loggers = {
            kind: logging.root.getChild(f"mlproducer.{name}") for kind, name in LOGGERS.items()
        }
        self._lines = LimitedLogger(logger, clock, loggers)

    def table(self) -> Table:
        """Return what logs lines, and what ends with the producer."""
        return {**dict.fromkeys(LINES, self._log), events.StateChanged: self._state_changed}

    def _log(self, event: Event) -> None:
        line = LINES[type(event)](event)
        if line is not None:
            self._lines.log(line.level, line.kind, line.fields, *line.values, error=line.error)

    def _state_changed(self, event: events.StateChanged) -> None:
        """At the end, log the numbers of suppressed lines."""
        if event.state is ConnectionState.CLOSED:
            self._lines.close()
