"""The circuit breaker, by itself and against a model."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlproducer.core.breaker import Breaker
from mlproducer.core.delivery import Delivery
from mlproducer.core.states import CircuitState
from mlproducer.message import Envelope

THRESHOLD, COOLDOWN = 10, 30.0


def delivery() -> Delivery:
    """Make something to send."""
    envelope = Envelope("id", "raw", "", "q", b"", b"")
    return Delivery(envelope, Future(), started=0.0, deadline=5.0)


def breaker(states: list[CircuitState] | None = None) -> Breaker:
    """Make a breaker that notes its moves."""
    return Breaker(THRESHOLD, COOLDOWN, [].append if states is None else states.append)


def opened(at: float = 0.0) -> Breaker:
    """Make one that has just opened."""
    made = breaker()
    for _ in range(THRESHOLD):
        made.failed(delivery(), at)
    return made


@pytest.mark.parametrize("failures", [THRESHOLD - 1, THRESHOLD, THRESHOLD + 1])
def test_opens_at_exactly_the_threshold(failures: int) -> None:
    """Nine failures in a row do not open it, the tenth does, the eleventh changes nothing."""
    states: list[CircuitState] = []
    made = breaker(states)
    for _ in range(failures):
        made.failed(delivery(), 1.0)
    assert states == ([CircuitState.OPEN] if failures >= THRESHOLD else [])
    assert made.refuses() is (failures >= THRESHOLD)


def test_a_success_in_between_starts_the_count_over() -> None:
    """Only failures in a row count."""
    made = breaker()
    for _ in range(THRESHOLD - 1):
        made.failed(delivery(), 1.0)
    made.succeeded([delivery()])
    for _ in range(THRESHOLD - 1):
        made.failed(delivery(), 1.0)
    assert made.state is CircuitState.CLOSED


def test_cools_after_the_cooldown_and_not_before() -> None:
    """Half-open comes with time alone, and a late success does not bring it sooner."""
    made = opened(at=100.0)
    made.succeeded([delivery()])
    made.cool(100.0 + COOLDOWN - 0.001)
    assert made.state is CircuitState.OPEN
    made.cool(100.0 + COOLDOWN)
    assert made.state is CircuitState.HALF_OPEN


def test_lets_one_probe_through() -> None:
    """Half-open, the first message is the probe, and all others are refused."""
    made = opened()
    made.cool(COOLDOWN)
    assert not made.refuses()
    made.sent(delivery())
    assert made.refuses()


def test_the_probe_decides() -> None:
    """Its confirm closes, its failure opens for a cooldown, an end that says nothing frees."""
    made = opened()
    made.reconnected()
    unsaid, failing, good = delivery(), delivery(), delivery()
    made.sent(unsaid)
    made.released(unsaid)
    assert made.state is CircuitState.HALF_OPEN
    assert not made.refuses()
    made.sent(failing)
    made.failed(failing, 50.0)
    assert made.state is CircuitState.OPEN
    assert made.reopens_at == 50.0 + COOLDOWN
    made.cool(made.reopens_at)
    made.sent(good)
    made.succeeded([good])
    assert made.state is CircuitState.CLOSED
    assert made.failures == 0


def test_others_do_not_decide_for_the_probe() -> None:
    """While a probe is out, late confirms and failures of others change nothing."""
    made = opened()
    made.reconnected()
    probe = delivery()
    made.sent(probe)
    made.succeeded([delivery()])
    made.failed(delivery(), 1.0)
    assert made.state is CircuitState.HALF_OPEN
    made.succeeded([probe])
    assert made.state is CircuitState.CLOSED


class BreakerMachine(RuleBasedStateMachine):
    """Any order of outcomes and of time, against the documented rules (I17)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.moves: list[CircuitState] = [CircuitState.CLOSED]
        self.breaker = breaker(self.moves)
        self.in_row = 0
        self.out: Delivery | None = None

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        """The breaker thread looks at the clock."""
        self.now += seconds
        self.breaker.cool(self.now)

    @rule()
    def a_message_fails(self) -> None:
        """A message that is not the probe fails."""
        self.in_row += 1
        self.breaker.failed(delivery(), self.now)

    @rule()
    def a_message_is_confirmed(self) -> None:
        """A message that is not the probe is confirmed."""
        self.in_row = 0
        self.breaker.succeeded([delivery()])

    @precondition(lambda self: not self.breaker.refuses())
    @rule(outcome=st.sampled_from(["confirmed", "failed", "returned"]))
    def a_message_is_sent(self, outcome: str) -> None:
        """A message goes out, and finds its end."""
        sent = delivery()
        self.breaker.sent(sent)
        if outcome == "confirmed":
            self.in_row = 0
            self.breaker.succeeded([sent])
        elif outcome == "failed":
            self.in_row += 1
            self.breaker.failed(sent, self.now)
        else:
            self.breaker.released(sent)

    @rule()
    def a_connection_is_made(self) -> None:
        """A new connection ends the cooldown."""
        self.breaker.reconnected()

    @invariant()
    def counts_failures_in_a_row(self) -> None:
        """The gauge is the number of failures since the last success."""
        assert self.breaker.failures == self.in_row

    @invariant()
    def moves_along_its_edges(self) -> None:
        """Closed opens, open cools, half-open closes or opens; nothing else."""
        edges = set(zip(self.moves, self.moves[1:], strict=False))
        assert edges <= {
            (CircuitState.CLOSED, CircuitState.OPEN),
            (CircuitState.OPEN, CircuitState.HALF_OPEN),
            (CircuitState.HALF_OPEN, CircuitState.CLOSED),
            (CircuitState.HALF_OPEN, CircuitState.OPEN),
        }

    @invariant()
    def is_closed_below_the_threshold(self) -> None:
        """It is never closed with as many failures in a row as open it."""
        assert self.breaker.state is not CircuitState.CLOSED or self.in_row < THRESHOLD


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=40, stateful_step_count=30)
TestBreakerMachine = BreakerMachine.TestCase
