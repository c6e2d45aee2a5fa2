"""What is remembered of the last minutes: counted once, bounded, and in the right order."""

from __future__ import annotations

from typing import Any

import pytest

from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AnswerState
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._core.states import CircuitState
from mlproducer.errors import (
    CircuitOpenError,
    ConfirmTimeoutError,
    NackError,
    StoreError,
    UnroutableError,
)
from mlproducer.observe.recent_history import KEPT, MAX_TEXT, Rates, Recorder
from mlproducer.observe.sinks import Sink
from tests.helpers import make_delivery


class Second:
    """A recorder whose clock stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.inside: list[Delivery] = []
        self.recorder = Recorder(lambda: self.now)
        self.sink: Sink = self.recorder.sink(lambda: list(self.inside))
        self.recorder.sample()

    def rates(self, seconds: float = 1.0) -> Rates:
        """Let time pass, and return the rates in it."""
        self.now += seconds
        return self.recorder.recent().rates[-1]


def test_confirmed_at_once() -> None:
    """A message that is confirmed has been published and confirmed, once each."""
    second = Second()
    second.sink.take(events.Confirmed([make_delivery() for _ in range(6)], 0.0))
    assert second.rates(2.0) == Rates(age=0.0, published=3.0, confirmed=3.0, deferred=0.0)
    assert second.rates() == Rates(age=0.0, published=0.0, confirmed=0.0, deferred=0.0)


def test_deferred_then_confirmed() -> None:
    """A message counts as published when it is handed in, and not again when it is confirmed."""
    second, delivery = Second(), make_delivery()
    second.inside = [delivery]
    assert second.rates() == Rates(age=0.0, published=1.0, confirmed=0.0, deferred=0.0)
    delivery.answer = AnswerState.DEFERRED
    second.sink.take(events.Deferred(delivery))
    assert second.rates() == Rates(age=0.0, published=0.0, confirmed=0.0, deferred=1.0)
    second.inside = []
    second.sink.take(events.Confirmed([delivery], 0.0))
    assert second.rates() == Rates(age=0.0, published=0.0, confirmed=1.0, deferred=0.0)


def test_given_back() -> None:
    """A message that is refused was published, too; one that was ours is not counted again."""
    second, ours = Second(), make_delivery()
    second.sink.take(events.Failed(make_delivery(), CircuitOpenError()))
    assert second.rates() == Rates(age=0.0, published=1.0, confirmed=0.0, deferred=0.0)
    ours.answer = AnswerState.DEFERRED
    second.sink.take(events.Deferred(ours))
    second.sink.take(events.Failed(ours, NackError()))
    assert second.rates() == Rates(age=0.0, published=1.0, confirmed=0.0, deferred=1.0)


def test_samples_are_seconds_apart() -> None:
    """However often it is called, there is one rate a second, and two minutes of them."""
    second = Second()
    for _ in range(270):
        second.now += 0.5
        second.recorder.recent()
    ages = [rates.age for rates in second.recorder.recent().rates]
    assert ages == sorted(ages, reverse=True)
    assert ages[-1] < 1.0
    assert 115 <= ages[0] <= 120
    assert len(ages) <= 121


def test_threads_that_look_at_once() -> None:
    """A thread that is held up between clock and counts makes no rate of no time, or of less."""
    second = Second()
    sink: Any = second.sink
    counts, meanwhile = sink.counts, [second.recorder.sample]

    def held_up() -> tuple[int, int, int]:
        if meanwhile:
            second.now += 0.001
            meanwhile.pop()()  # another thread looks
            sink.take(events.Confirmed([make_delivery()] * 100, 0.0))
        return counts()  # type: ignore[no-any-return]

    sink.counts = held_up
    rates = [second.rates() for _ in range(3)]
    assert all(0.0 <= each.published <= 101.0 for each in rates)
    assert len(second.recorder.recent().rates) == 3
    assert sum(each.confirmed for each in second.recorder.recent().rates) == pytest.approx(100, 0.1)


def test_nothing_in_use() -> None:
    """A producer that is not in use has no rates, however often and late it is called."""
    now = 100.0
    recorder = Recorder(lambda: now)
    for _ in range(3):
        assert recorder.recent().rates == ()
        now += 1.0


def test_several_engines() -> None:
    """The engines of one producer are added up."""
    second = Second()
    other = second.recorder.sink(list)
    second.rates()
    second.sink.take(events.Confirmed([make_delivery()], 0.0))
    other.take(events.Confirmed([make_delivery()], 0.0))
    assert second.rates().confirmed == 2.0


def test_equal_errors_are_one() -> None:
    """An error that happens again is counted, and comes first again."""
    second = Second()
    for _ in range(3):
        second.sink.take(events.AttemptFailed(make_delivery(), ConfirmTimeoutError("no confirm")))
    second.sink.take(events.StoreFailed(StoreError("disk full")))
    second.sink.take(events.AttemptFailed(make_delivery(), ConfirmTimeoutError("no confirm")))
    errors = [(e.kind, e.text, e.times) for e in second.recorder.recent().errors]
    expected = [("ConfirmTimeoutError", "no confirm", 4), ("the store fails", "disk full", 1)]
    assert errors == expected


def test_bounds() -> None:
    """Of errors and dead letters the last twenty are kept, and of a text its beginning."""
    second = Second()
    for n in range(50):
        second.sink.take(events.ConnectFailed(Loss(f"{n} {'x' * 1000}")))
        letter = make_delivery(f"id-{n}")
        letter.reason = UnroutableError("y" * 1000)
        second.sink.take(events.DeadLettered(letter))
    recent = second.recorder.recent()
    assert [e.text.split()[0] for e in recent.errors] == [str(n) for n in range(49, 29, -1)]
    assert [e.text.split(":")[0] for e in recent.dead_letters] == [
        f"id-{n}" for n in range(49, 29, -1)
    ]
    assert {len(e.text) for e in (*recent.errors, *recent.dead_letters)} == {MAX_TEXT}
    assert {e.kind for e in recent.dead_letters} == {"UnroutableError"}
    assert (len(recent.errors), recent.dead_lettered) == (KEPT, 50)


def test_everything_that_goes_wrong() -> None:
    """Each event that may need an operator is remembered; no other is."""
    second, loss = Second(), Loss("words")
    sink = second.sink
    sink.take(events.Connected("b:1"))
    sink.take(events.Disconnected(Loss("closed by us", kind=LossKind.CLOSED)))
    sink.take(events.CircuitChanged(CircuitState.CLOSED))
    sink.take(events.FlowChanged(blocked=False, reason=""))
    sink.take(events.HealthChecked(alive=True))
    assert second.recorder.recent().errors == ()
    sink.take(events.Disconnected(loss))
    sink.take(events.GaveUp(10, loss))
    sink.take(events.ChannelLost(loss))
    sink.take(events.CircuitChanged(CircuitState.OPEN))
    sink.take(events.FlowChanged(blocked=True, reason="low on memory"))
    sink.take(events.HealthChecked(alive=False))
    sink.take(events.HealthFault("x", loss))
    sink.take(events.TopologyFault("q", loss))
    sink.take(events.LoopFailed(ValueError("may hold anything")))
    assert [(e.kind, e.text) for e in reversed(second.recorder.recent().errors)] == [
        ("disconnected", "words"),
        ("gave up connecting", "after 10 attempts: words"),
        ("channel closed", "words"),
        ("circuit breaker", "opened"),
        ("blocked by the broker", "low on memory"),
        ("health check", "no answer"),
        ("health check", "x: words"),
        ("cannot declare", "q: words"),
        ("the I/O loop failed", "ValueError"),
    ]
