"""What a producer remembers of the last minutes, for people: rates, errors, dead letters.

Everything here is bounded. It knows error texts and message ids, and nothing of what messages say.
There is no lock: counts that belong to one thread are plain numbers, and the others are cells.

Runs on: events arrive on the thread on which they happen; samples are taken on the retry threads,
and by whoever looks.
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
"""Errors, and dead letters, that are remembered."""

HISTORY = 120.0
"""Seconds for which rates are remembered."""

INTERVAL = 0.9
"""Seconds between two samples at least; the retry thread takes one each second."""

MAX_TEXT = 300
"""Characters that are remembered of what others say."""


@frozen
class Incident:
    """Something that went wrong.

    :ivar at: when, in UTC; the last time, where it happened several times
    :ivar kind: a few words that are always the same, or the name of an error's class
    :ivar text: what is known of it; it may be the broker's words, which nobody has escaped
    :ivar times: how often
    """

    at: datetime
    kind: str
    text: str
    times: int = 1


@frozen
class Rates:
    """Messages per second, between one sample and the next.

    :ivar age: seconds since then
    :ivar published: were handed in
    :ivar confirmed: the broker has taken
    :ivar deferred: the library went on with, without the publisher
    """

    age: float
    published: float
    confirmed: float
    deferred: float


@frozen
class Recent:
    """The last minutes of one producer in this process.

    :ivar dead_lettered: messages whose dead letter the broker has taken, since the start
    :ivar rates: of the last two minutes, the oldest first
    :ivar errors: the last 20 different ones, the newest first
    :ivar dead_letters: the last 20, the newest first
    """

    dead_lettered: int
    rates: tuple[Rates, ...]
    errors: tuple[Incident, ...]
    dead_letters: tuple[Incident, ...]


class Recorder:
    """Remembers for one producer, however many connections it has.

    :param clock: monotonic seconds
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sinks: list[RecorderSink] = []
        self._errors: dict[tuple[str, str], Incident] = {}
        self._letters: deque[Incident] = deque(maxlen=KEPT)
        self._samples: deque[tuple[float, list[int]]] = deque(maxlen=round(HISTORY / INTERVAL))

    def sink(self, inside: Callable[[], Iterable[Delivery]]) -> EventSink:
        """Give a sink for the events of one engine.

        :param inside: gives the deliveries that it has under way
        """
        sink = RecorderSink(self, inside)
        self._sinks.append(sink)
        return sink

    def sample(self) -> None:
        """Note how many messages there have been so far, if a second has passed."""
        now = self._clock()
        if not self._sinks:
            return  # not in use yet
        if not self._samples or now - self._samples[-1][0] >= INTERVAL:
            counts = [sink.counts() for sink in self._sinks]
            self._samples.append((now, [sum(each) for each in zip(*counts, strict=True)]))

    def recent(self) -> Recent:
        """Give what is remembered."""
        self.sample()
        return Recent(
            dead_lettered=sum(sink.dead_letters for sink in self._sinks),
            rates=tuple(_rates(list(self._samples), self._clock())),
            errors=tuple(reversed(list(self._errors.values()))),
            dead_letters=tuple(reversed(list(self._letters))),
        )

    def note(self, kind: str, text: str) -> None:
        """Remember an error; one that is known already is counted, and is the newest again."""
        key = (kind, text[:MAX_TEXT])
        known = self._errors.pop(key, None)
        times = 1 if known is None else known.times + 1
        self._errors[key] = Incident(_now(), *key, times)
        for oldest in list(self._errors)[:-KEPT]:
            self._errors.pop(oldest, None)

    def bury(self, delivery: Delivery) -> None:
        """Remember a dead letter."""
        reason, message_id = delivery.reason, delivery.envelope.message_id
        kind = type(reason).__name__ if reason is not None else "unknown reason"
        text = f"{message_id}: {reason or ''}"[:MAX_TEXT]
        self._letters.append(Incident(_now(), kind, text))


_UNTOLD = (AnswerState.WITHDRAWABLE, AnswerState.WAITING)


class RecorderSink(EventSink):
    """Takes the events of one engine.

    A message counts as published once its publisher has an answer, or while it waits for one.

    :ivar dead_letters: how many; the I/O thread's own number, like the others here
    """

    def __init__(self, recorder: Recorder, inside: Callable[[], Iterable[Delivery]]) -> None:
        self._note = recorder.note
        self._bury = recorder.bury
        self._inside = inside
        self._confirmed = 0
        self._confirmed_later = 0
        self._deferred = 0
        self._given_back = Cells(catalog.TASKS_SENT)
        self.dead_letters = 0

    def counts(self) -> tuple[int, int, int]:
        """Count what was published, confirmed and deferred so far."""
        at_once = self._confirmed - self._confirmed_later
        unanswered = sum(each.answer in _UNTOLD for each in self._inside())
        answered = at_once + self._deferred + int(self._given_back.total()[0])
        return answered + unanswered, self._confirmed, self._deferred

    # --- messages ------------------------------------------------------------------------------

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Count them."""
        self._confirmed += len(deliveries)
        for each in deliveries:
            if each.answer is AnswerState.DEFERRED:
                self._confirmed_later += 1

    def deferred(self, delivery: Delivery) -> None:
        """Count it."""
        self._deferred += 1

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """Count it, unless its publisher had an answer already."""
        if delivery.answer is not AnswerState.DEFERRED:
            self._given_back.inc()

    def failed(self, delivery: Delivery, error: PublishError) -> None:
        """Remember why."""
        self._note(type(error).__name__, str(error))

    def dead_lettered(self, delivery: Delivery) -> None:
        """Remember it."""
        self.dead_letters += 1
        self._bury(delivery)

    # --- connections ---------------------------------------------------------------------------

    def disconnected(self, loss: Loss) -> None:
        """Remember why, unless we closed it ourselves."""
        if loss.kind is not LossKind.CLOSED:
            self._note("disconnected", loss.text)

    def connection_error(self, loss: Loss) -> None:
        """Remember why."""
        self._note("cannot connect", loss.text)

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Remember it."""
        self._note("gave up connecting", f"after {attempts} attempts: {loss.text}")

    def channel_lost(self, loss: Loss) -> None:
        """Remember why."""
        self._note("channel closed", loss.text)

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Remember why the broker blocks."""
        if blocked:
            self._note("blocked by the broker", reason)

    def topology_fault(self, target: str, loss: Loss) -> None:
        """Remember what could not be declared."""
        self._note("cannot declare", f"{target}: {loss.text}")

    # --- the rest ------------------------------------------------------------------------------

    def circuit_changed(self, state: CircuitState) -> None:
        """Remember that it opened."""
        if state is CircuitState.OPEN:
            self._note("circuit breaker", "opened")

    def health_checked(self, *, alive: bool) -> None:
        """Remember that there was no answer."""
        if not alive:
            self._note("health check", "no answer")

    def health_fault(self, target: str, loss: Loss) -> None:
        """Remember what is missing or forbidden."""
        self._note("health check", f"{target}: {loss.text}")

    def store_failed(self, error: StoreError) -> None:
        """Remember why."""
        self._note("the store fails", str(error))

    def crashed(self, error: BaseException) -> None:
        """Remember it, by the name of the error's class."""
        self._note("the I/O loop failed", type(error).__name__)


def _rates(samples: Iterable[tuple[float, list[int]]], now: float) -> Iterable[Rates]:
    for (before, earlier), (at, later) in itertools.pairwise(_apart(samples)):
        if now - at <= HISTORY:
            gains = [max(0, b - a) for a, b in zip(earlier, later, strict=True)]
            yield Rates(now - at, *(gain / (at - before) for gain in gains))


def _apart(samples: Iterable[tuple[float, list[int]]]) -> Iterator[tuple[float, list[int]]]:
    """Put samples in order, and leave out those that are too close to the one before.

    Threads that look at the same moment each take one, and the thread that looked at the clock
    first may be the last to count.
    """
    last = -math.inf
    for at, counts in sorted(samples):
        if at - last >= INTERVAL:
            yield at, counts
            last = at


def _now() -> datetime:
    return datetime.now(timezone.utc)
