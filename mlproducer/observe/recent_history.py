"""The last minutes of a producer, for the status page: rates, errors, dead letters.

Everything is bounded. Error texts and message ids are kept, and nothing of messages' content.
There is no lock: counts that one thread owns are plain numbers, and the others are `Cells`.

Runs on: events arrive on the thread on which they happen; samples are taken on the retry threads,
and on the thread that reads them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AnswerState
from mlproducer._core.events import Event
from mlproducer._core.interfaces import LossKind
from mlproducer._core.states import CircuitState
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.counters import Cells
from mlproducer.observe.sinks import Sink, Table

KEPT = 20
"""How many errors, and how many dead letters, are kept."""

HISTORY = 120.0
"""Seconds for which rates are kept."""

INTERVAL = 0.9
"""Seconds between two samples at least; the retry thread takes one each second."""

MAX_TEXT = 300
"""Characters that are kept of an error's text."""


@frozen
class Incident:
    """Something that went wrong.

    :ivar at: when, in UTC; the last time, where it happened several times
    :ivar kind: a fixed phrase, or the name of an error's class
    :ivar text: the details; they may be the broker's words, unescaped
    :ivar times: how often it happened
    :ivar of_connection: it is why there is no connection
    """

    at: datetime
    kind: str
    text: str
    times: int = 1
    of_connection: bool = False


@frozen
class Rates:
    """Messages per second, between one sample and the next.

    :ivar age: seconds since the second sample
    :ivar published: messages whose publisher called
    :ivar confirmed: messages that the broker confirmed
    :ivar deferred: messages whose publisher was answered ``DEFERRED``
    """

    age: float
    published: float
    confirmed: float
    deferred: float


@frozen
class RecentHistory:
    """The last minutes of one producer in this process.

    :ivar dead_lettered: messages whose dead letter the broker has confirmed, since the start
    :ivar rates: of the last two minutes, the oldest first
    :ivar errors: the last 20 different ones, the newest first
    :ivar dead_letters: the last 20, the newest first
    """

    dead_lettered: int
    rates: tuple[Rates, ...]
    errors: tuple[Incident, ...]
    dead_letters: tuple[Incident, ...]


class Recorder:
    """Records the last minutes of one producer, over all its connections.

    :param clock: returns monotonic seconds
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sinks: list[RecorderSink] = []
        self._errors: dict[tuple[str, str], Incident] = {}
        self._letters: deque[Incident] = deque(maxlen=KEPT)
        self._samples: deque[tuple[float, list[int]]] = deque(maxlen=round(HISTORY / INTERVAL))

    def sink(self, inside: Callable[[], Iterable[Delivery]]) -> Sink:
        """Return a sink for the events of one engine.

        :param inside: returns the deliveries that are in progress
        """
        sink = RecorderSink(self, inside)
        self._sinks.append(sink)
        return sink

    def sample(self) -> None:
        """Record how many messages there have been so far, once a second at most."""
        now = self._clock()
        if not self._sinks:
            return  # not in use yet
        if not self._samples or now - self._samples[-1][0] >= INTERVAL:
            counts = [sink.counts() for sink in self._sinks]
            self._samples.append((now, [sum(each) for each in zip(*counts, strict=True)]))

    def recent(self) -> RecentHistory:
        """Return what is recorded."""
        self.sample()
        return RecentHistory(
            dead_lettered=sum(sink.dead_letters for sink in self._sinks),
            rates=tuple(_rates(list(self._samples), self._clock())),
            errors=tuple(reversed(list(self._errors.values()))),
            dead_letters=tuple(reversed(list(self._letters))),
        )

    def note(self, kind: str, text: str) -> None:
        """Record an error; one that is known is counted, and becomes the newest."""
        # On any connection's thread, without a lock: of two that note the same error at once, one
        # may go uncounted; but each step is one under the GIL, so nothing is raised.
        key = (kind, text[:MAX_TEXT])
        known = self._errors.pop(key, None)
        times = 1 if known is None else known.times + 1
        self._errors[key] = Incident(datetime.now(timezone.utc), *key, times, kind in OF_CONNECTION)
        for oldest in list(self._errors)[:-KEPT]:
            self._errors.pop(oldest, None)

    def note_dead_letter(self, delivery: Delivery) -> None:
        """Record a dead letter."""
        reason, message_id = delivery.reason, delivery.envelope.message_id
        kind = type(reason).__name__ if reason is not None else "unknown reason"
        text = f"{message_id}: {reason or ''}"[:MAX_TEXT]
        self._letters.append(Incident(datetime.now(timezone.utc), kind, text))


INCIDENTS: Mapping[type[Event], Callable[[Any], tuple[str, str] | None]] = {
    events.AttemptFailed: lambda event: (type(event.error).__name__, str(event.error)),
    events.Disconnected: lambda event: (
        None if event.loss.kind is LossKind.CLOSED else ("disconnected", event.loss.text)
    ),
    events.ConnectFailed: lambda event: ("cannot connect", event.loss.text),
    events.GaveUp: lambda event: (
        "gave up connecting",
        f"after {event.attempts} attempts: {event.loss.text}",
    ),
    events.ChannelLost: lambda event: ("channel closed", event.loss.text),
    events.FlowChanged: lambda event: (
        ("blocked by the broker", event.reason) if event.blocked else None
    ),
    events.TopologyFault: lambda event: ("cannot declare", f"{event.target}: {event.loss.text}"),
    events.CircuitChanged: lambda event: (
        ("circuit breaker", "opened") if event.state is CircuitState.OPEN else None
    ),
    events.HealthChecked: lambda event: None if event.alive else ("health check", "no answer"),
    events.HealthFault: lambda event: ("health check", f"{event.target}: {event.loss.text}"),
    events.StoreFailed: lambda event: ("the store fails", str(event.error)),
    events.LoopFailed: lambda event: ("the I/O loop failed", type(event.error).__name__),
}
"""The kind and the text of what is recorded of each kind of event."""

OF_CONNECTION = {"disconnected", "cannot connect"}
"""The kinds that say why there is no connection."""

_UNANSWERED = (AnswerState.WITHDRAWABLE, AnswerState.WAITING)
_DEFERRED = AnswerState.DEFERRED


class RecorderSink(Sink):
    """Records the events of one engine.

    A message counts as published once its publisher has an answer, and while it waits for one.

    :ivar dead_letters: how many; owned by the I/O thread, like the other numbers
    """

    def __init__(self, recorder: Recorder, inside: Callable[[], Iterable[Delivery]]) -> None:
        self._note = recorder.note
        self._note_dead_letter = recorder.note_dead_letter
        self._inside = inside
        self._confirmed = 0
        self._confirmed_later = 0
        self._deferred = 0
        self._failed = Cells(catalog.TASKS_SENT)
        self.dead_letters = 0

    def counts(self) -> tuple[int, int, int]:
        """Return how many messages were published, confirmed and deferred so far."""
        at_once = self._confirmed - self._confirmed_later
        unanswered = sum(each.answer in _UNANSWERED for each in self._inside())
        answered = at_once + self._deferred + int(self._failed.total()[0])
        return answered + unanswered, self._confirmed, self._deferred

    def table(self) -> Table:
        """Return what counts messages, and what records errors."""
        return {
            **dict.fromkeys(INCIDENTS, self._record),
            events.Confirmed: self._on_confirmed,
            events.Deferred: self._on_deferred,
            events.Failed: self._on_failed,
            events.DeadLettered: self._on_dead_lettered,
        }

    def _record(self, event: Event) -> None:
        incident = INCIDENTS[type(event)](event)
        if incident is not None:
            self._note(*incident)

    def _on_confirmed(self, event: events.Confirmed) -> None:
        deliveries = event.deliveries
        self._confirmed += len(deliveries)
        for each in deliveries:
            if each.answer is _DEFERRED:
                self._confirmed_later += 1

    def _on_deferred(self, _event: events.Deferred) -> None:
        self._deferred += 1

    def _on_failed(self, event: events.Failed) -> None:
        """Count the message, unless its publisher had an answer already."""
        if event.delivery.answer is not _DEFERRED:
            self._failed.inc()

    def _on_dead_lettered(self, event: events.DeadLettered) -> None:
        self.dead_letters += 1
        self._note_dead_letter(event.delivery)


def _rates(samples: Iterable[tuple[float, list[int]]], now: float) -> Iterable[Rates]:
    for (before, earlier), (at, later) in itertools.pairwise(_apart(samples)):
        if now - at <= HISTORY:
            gains = [max(0, b - a) for a, b in zip(earlier, later, strict=True)]
            yield Rates(now - at, *(gain / (at - before) for gain in gains))


def _apart(samples: Iterable[tuple[float, list[int]]]) -> Iterator[tuple[float, list[int]]]:
    """Sort samples, and drop those that are too close to the one before.

    Threads may take a sample at the same moment, and the first to read the clock may be the last to
    append its sample.
    """
    last = -math.inf
    for at, counts in sorted(samples):
        if at - last >= INTERVAL:
            yield at, counts
            last = at
