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
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AnswerState
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._core.states import CircuitState
from mlproducer.errors import PublishError, StoreError
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.events import EventSink
from mlproducer.observe.tally import Cells

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
class Recent:
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

    def sink(self, inside: Callable[[], Iterable[Delivery]]) -> EventSink:
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

    def recent(self) -> Recent:
        """Return what is recorded."""
        self.sample()
        return Recent(
            dead_lettered=sum(sink.dead_letters for sink in self._sinks),
            rates=tuple(_rates(list(self._samples), self._clock())),
            errors=tuple(reversed(list(self._errors.values()))),
            dead_letters=tuple(reversed(list(self._letters))),
        )

    def note(self, kind: str, text: str, *, of_connection: bool = False) -> None:
        """Record an error; one that is known is counted, and becomes the newest."""
        key = (kind, text[:MAX_TEXT])
        known = self._errors.pop(key, None)
        times = 1 if known is None else known.times + 1
        self._errors[key] = Incident(_now(), *key, times, of_connection)
        for oldest in list(self._errors)[:-KEPT]:
            self._errors.pop(oldest, None)

    def note_dead_letter(self, delivery: Delivery) -> None:
        """Record a dead letter."""
        reason, message_id = delivery.reason, delivery.envelope.message_id
        kind = type(reason).__name__ if reason is not None else "unknown reason"
        text = f"{message_id}: {reason or ''}"[:MAX_TEXT]
        self._letters.append(Incident(_now(), kind, text))


_UNANSWERED = (AnswerState.WITHDRAWABLE, AnswerState.WAITING)


class RecorderSink(EventSink):
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
        self._given_back = Cells(catalog.TASKS_SENT)
        self.dead_letters = 0

    def counts(self) -> tuple[int, int, int]:
        """Return how many messages were published, confirmed and deferred so far."""
        at_once = self._confirmed - self._confirmed_later
        unanswered = sum(each.answer in _UNANSWERED for each in self._inside())
        answered = at_once + self._deferred + int(self._given_back.total()[0])
        return answered + unanswered, self._confirmed, self._deferred

    # --- messages ------------------------------------------------------------------------------

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Count the messages."""
        self._confirmed += len(deliveries)
        for each in deliveries:
            if each.answer is AnswerState.DEFERRED:
                self._confirmed_later += 1

    def deferred(self, delivery: Delivery) -> None:
        """Count the message."""
        self._deferred += 1

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """Count the message, unless its publisher had an answer already."""
        if delivery.answer is not AnswerState.DEFERRED:
            self._given_back.inc()

    def failed(self, delivery: Delivery, error: PublishError) -> None:
        """Record the error."""
        self._note(type(error).__name__, str(error))

    def dead_lettered(self, delivery: Delivery) -> None:
        """Record the dead letter."""
        self.dead_letters += 1
        self._note_dead_letter(delivery)

    # --- connections ---------------------------------------------------------------------------

    def disconnected(self, loss: Loss) -> None:
        """Record why, unless the producer closed the connection itself."""
        if loss.kind is not LossKind.CLOSED:
            self._note("disconnected", loss.text, of_connection=True)

    def connection_error(self, loss: Loss) -> None:
        """Record why."""
        self._note("cannot connect", loss.text, of_connection=True)

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Record it."""
        self._note("gave up connecting", f"after {attempts} attempts: {loss.text}")

    def channel_lost(self, loss: Loss) -> None:
        """Record why."""
        self._note("channel closed", loss.text)

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Record why the broker blocks."""
        if blocked:
            self._note("blocked by the broker", reason)

    def topology_fault(self, target: str, loss: Loss) -> None:
        """Record what could not be declared."""
        self._note("cannot declare", f"{target}: {loss.text}")

    # --- the rest ------------------------------------------------------------------------------

    def circuit_changed(self, state: CircuitState) -> None:
        """Record that the breaker opened."""
        if state is CircuitState.OPEN:
            self._note("circuit breaker", "opened")

    def health_checked(self, *, alive: bool) -> None:
        """Record that there was no answer."""
        if not alive:
            self._note("health check", "no answer")

    def health_fault(self, target: str, loss: Loss) -> None:
        """Record what is missing or forbidden."""
        self._note("health check", f"{target}: {loss.text}")

    def store_failed(self, error: StoreError) -> None:
        """Record why."""
        self._note("the store fails", str(error))

    def crashed(self, error: BaseException) -> None:
        """Record the name of the error's class."""
        self._note("the I/O loop failed", type(error).__name__)


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


def _now() -> datetime:
    return datetime.now(timezone.utc)
