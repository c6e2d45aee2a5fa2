"""The circuit breaker, by itself and against a model."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlproducer._core.breaker import LONGEST, SHORTEST, Adaptive, Breaker, Consecutive, Trip
from mlproducer._core.delivery import Delivery
from mlproducer._core.states import CircuitState
from mlproducer.message import Envelope

THRESHOLD, COOLDOWN, PATIENCE = 10, 30.0, 5.0
OPEN, HALF_OPEN, CLOSED = CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.CLOSED


def delivery() -> Delivery:
    """Make something to send."""
    envelope = Envelope("id", "raw", "", "q", b"", b"")
    return Delivery(envelope, Future(), started=0.0, deadline=5.0)


class Watched(Breaker):
    """A breaker that notes its moves, and when it wants to be woken."""

    def __init__(self, trip: Trip | None = None) -> None:
        self.moves: list[CircuitState] = [CLOSED]
        self.wakes: list[float] = []
        trip = trip or Consecutive(THRESHOLD)
        super().__init__(trip, COOLDOWN, PATIENCE, self.moves.append, self.wakes.append)


def opened(at: float = 0.0, trip: Trip | None = None) -> Watched:
    """Make one that has just opened."""
    made = Watched(trip)
    while made.state is CLOSED:
        made.failed(delivery(), at)
    return made


@pytest.mark.parametrize("threshold", [1, THRESHOLD])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_opens_at_exactly_the_threshold(threshold: int, more: int) -> None:
    """Nine failures in a row do not open it, the tenth does, the eleventh changes nothing."""
    made, failures = Watched(Consecutive(threshold)), threshold + more
    for _ in range(failures):
        made.failed(delivery(), 1.0)
    assert made.moves[1:] == ([OPEN] if more >= 0 else [])
    assert made.refuses() is (more >= 0)
    assert made.failures == failures


def test_a_success_in_between_starts_the_count_over() -> None:
    """Only failures in a row count."""
    made = Watched()
    for _ in range(THRESHOLD - 1):
        made.failed(delivery(), 1.0)
    made.succeeded([delivery()], 1.0)
    for _ in range(THRESHOLD - 1):
        made.failed(delivery(), 1.0)
    assert made.state is CLOSED


def test_switched_off() -> None:
    """With a threshold of 0 it never opens, and goes on counting."""
    made = Watched(Consecutive(0))
    for _ in range(1000):
        made.failed(delivery(), 1.0)
    assert made.state is CLOSED
    assert made.failures == 1000


def test_cools_after_the_cooldown_and_not_before() -> None:
    """Half-open comes with time alone; a timer that is early by a moment is set again."""
    made = opened(at=100.0)
    assert made.wakes == [100.0 + COOLDOWN]
    made.cool(100.0 + COOLDOWN - 0.001)
    assert made.state is OPEN
    assert made.wakes == [100.0 + COOLDOWN] * 2
    made.cool(100.0 + COOLDOWN)
    assert made.state is HALF_OPEN


@pytest.mark.parametrize("cooled", [False, True])
def test_a_confirm_closes_it(cooled: bool) -> None:
    """Of any message, while it is open as well as half-open, and beside a probe."""
    made = opened()
    if cooled:
        made.cool(COOLDOWN)
        made.sent(delivery(), COOLDOWN)
    made.succeeded([delivery()], COOLDOWN)
    assert made.state is CLOSED
    assert not made.refuses()
    assert made.failures == 0


def test_lets_one_probe_through() -> None:
    """Half-open, the first message is the probe, and all others are refused."""
    made = opened()
    made.cool(COOLDOWN)
    assert not made.refuses()
    made.sent(delivery(), COOLDOWN)
    assert made.refuses()


def test_the_probe_decides() -> None:
    """Its confirm closes, its failure opens for a cooldown, an end that says nothing frees."""
    made = opened()
    made.reconnected()
    unsaid, failing, good = delivery(), delivery(), delivery()
    made.sent(unsaid, 1.0)
    made.released(unsaid)
    assert made.state is HALF_OPEN
    assert not made.refuses()
    made.sent(failing, 1.0)
    made.failed(failing, 50.0)
    assert made.state is OPEN
    assert made.reopens_at == 50.0 + COOLDOWN
    made.cool(made.reopens_at)
    made.sent(good, made.reopens_at)
    made.succeeded([good], made.reopens_at)
    assert made.state is CLOSED


def test_the_time_of_a_probe() -> None:
    """Without a confirm in its time it has failed, once, also where its publisher waits on."""
    made = opened()
    made.cool(COOLDOWN)
    probe = delivery()
    made.sent(probe, 40.0)
    assert made.wakes[-1] == 40.0 + PATIENCE
    made.cool(40.0 + PATIENCE - 0.001)
    assert made.state is HALF_OPEN
    assert made.wakes[-2:] == [40.0 + PATIENCE] * 2
    made.cool(40.0 + PATIENCE)
    assert made.state is OPEN
    assert probe.counted
    assert made.reopens_at == 40.0 + PATIENCE + COOLDOWN


def test_others_do_not_decide_against_the_probe() -> None:
    """While a probe is out, failures of others change nothing; one to connect fails it too."""
    made = opened()
    made.reconnected()
    made.sent(delivery(), 1.0)
    made.failed(delivery(), 1.0)
    assert made.state is HALF_OPEN
    made.failed(None, 1.0)
    assert made.state is OPEN


def test_when_to_try_again() -> None:
    """The end of the cooldown, or of the probe's time, and never no time at all."""
    made = opened(at=10.0)
    assert made.retry_after(12.0) == COOLDOWN - 2.0
    assert made.retry_after(10.0 + COOLDOWN + 1.0) == SHORTEST
    made.cool(10.0 + COOLDOWN)
    made.sent(delivery(), 41.0)
    assert made.retry_after(42.0) == PATIENCE - 1.0


# --- the share of attempts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "failures", "opens"),
    [
        (0, 19, False),
        (0, 20, True),
        (10, 10, True),
        (11, 10, False),
        (100, 99, False),
        (100, 100, True),
    ],
)
def test_half_of_twenty(successes: int, failures: int, opens: bool) -> None:
    """It opens when at least half of the attempts failed, and there were 20 or more."""
    made = Watched(Adaptive())
    if successes:
        made.succeeded([delivery()] * successes, 1.0)
    for number in range(failures):
        assert made.state is CLOSED, number
        made.failed(delivery(), 1.5)
    assert (made.state is OPEN) is opens


def test_what_is_past_does_not_count() -> None:
    """Attempts are forgotten after ten seconds, good ones and bad ones."""
    made = Watched(Adaptive())
    for _ in range(19):
        made.failed(delivery(), 0.0)
    made.succeeded([delivery()] * 100, 9.9)
    made.failed(delivery(), 10.0)
    for _ in range(60):
        made.failed(delivery(), 19.0)
    assert made.state is CLOSED
    for _ in range(39):
        made.failed(delivery(), 19.0)
    assert made.state is OPEN


def test_the_cooldown_grows() -> None:
    """Each failed probe doubles it, up to ten times its length, and a success brings it back."""
    made = opened(trip=Adaptive())
    lengths = [made.reopens_at]
    for _ in range(6):
        now = made.reopens_at
        made.cool(now)
        made.failed(None, now)
        lengths.append(made.reopens_at - now)
    assert lengths == [COOLDOWN * each for each in (1, 2, 4, 8, LONGEST, LONGEST, LONGEST)]
    made.succeeded([delivery()], 0.0)
    while made.state is CLOSED:
        made.failed(delivery(), 0.0)
    assert made.reopens_at == COOLDOWN


def test_it_starts_over_when_it_closes() -> None:
    """The failures that opened it do not open it again."""
    made = opened(trip=Adaptive())
    made.succeeded([delivery()], 1.0)
    for _ in range(19):
        made.failed(delivery(), 1.0)
    assert made.state is CLOSED


def test_what_was_forgotten_is_not_forgotten_twice() -> None:
    """Ten seconds after it closed, attempts count as ever."""
    made = opened(trip=Adaptive())
    made.succeeded([delivery()], 1.0)
    for _ in range(19):
        made.failed(delivery(), 20.0)
    assert made.state is CLOSED
    made.failed(delivery(), 20.0)
    assert made.state is OPEN


STEPS = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.integers(0, 12), st.integers(0, 12)), max_size=30
)


@hypothesis_settings(deadline=None)
@given(STEPS)
def test_the_share_against_a_plain_count(steps: list[tuple[float, int, int]]) -> None:
    """Counting in buckets differs from counting each attempt by no more than a bucket's age."""
    trip, now = Adaptive(), 0.0
    attempts: list[tuple[float, bool]] = []
    for seconds, good, bad in steps:
        now += seconds
        if good:
            trip.succeeded(good, now)
            attempts += [(now, False)] * good
        for _ in range(bad):
            attempts.append((now, True))
            said = trip.failed(now)
            counts = []
            for window in (10.0, 10.0 - Adaptive.BUCKET):
                last = [failed for at, failed in attempts if at > now - window]
                counts.append(len(last) >= 20 and 2 * sum(last) >= len(last))
            near_the_edge = any(
                now - 10.0 < at <= now - 10.0 + Adaptive.BUCKET for at, _ in attempts
            )
            assert said in counts or near_the_edge
            if not near_the_edge:
                assert said is counts[0]


class BreakerMachine(RuleBasedStateMachine):
    """Any order of outcomes and of time, against the documented rules (I17)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Watched()
        self.in_row = 0

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        """The breaker thread looks at the clock."""
        self.now += seconds
        probing = self.breaker.state is HALF_OPEN
        self.breaker.cool(self.now)
        self.in_row += probing and self.breaker.state is OPEN

    @rule()
    def a_message_fails(self) -> None:
        """A message that is not the probe fails."""
        self.in_row += 1
        self.breaker.failed(delivery(), self.now)

    @rule()
    def a_message_is_confirmed(self) -> None:
        """A message that is not the probe is confirmed."""
        self.in_row = 0
        self.breaker.succeeded([delivery()], self.now)

    @precondition(lambda self: not self.breaker.refuses())
    @rule(outcome=st.sampled_from(["confirmed", "failed", "returned", "forgotten"]))
    def a_message_is_sent(self, outcome: str) -> None:
        """A message goes out, and finds its end."""
        sent = delivery()
        self.breaker.sent(sent, self.now)
        if outcome == "confirmed":
            self.in_row = 0
            self.breaker.succeeded([sent], self.now)
        elif outcome == "failed":
            self.in_row += 1
            self.breaker.failed(sent, self.now)
        elif outcome == "returned":
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
        """Closed opens, open cools or closes, half-open closes or opens; nothing else."""
        moves = self.breaker.moves
        edges = set(itertools.pairwise(moves))
        legal = {(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED), (HALF_OPEN, OPEN)}
        assert edges <= legal | {(OPEN, CLOSED)}

    @invariant()
    def is_closed_by_a_confirm(self) -> None:
        """It is closed after every success, whatever it was before."""
        assert self.in_row or self.breaker.state is CLOSED

    @invariant()
    def somebody_wakes_it(self) -> None:
        """It is never shut without a time at which it is looked at, which is not far off."""
        if self.breaker.refuses():
            assert self.breaker.wakes
            assert self.breaker.wakes[-1] <= self.now + COOLDOWN
            assert self.breaker.retry_after(self.now) >= SHORTEST

    @invariant()
    def is_closed_below_the_threshold(self) -> None:
        """It is never closed with as many failures in a row as open it."""
        assert self.breaker.state is not CLOSED or self.in_row < THRESHOLD


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=40, stateful_step_count=30)
TestBreakerMachine = BreakerMachine.TestCase
