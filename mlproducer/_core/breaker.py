"""The circuit breaker: while the broker fails, fail fast until a probe has succeeded.

What opens it is a `Trip`: so many failures in a row, or so large a share of the last seconds'
attempts. Only what says something about the broker's health is counted, each attempt once. In the
half-open state one message, and no more, is the probe; whatever else comes in meanwhile is refused.
A confirm of any message, a late one too, shows that the broker is well, and closes the breaker.

Runs on: the I/O thread, its only owner; publishers read `Breaker.refuses`, `Breaker.retry_after`
and `Breaker.state`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from mlproducer._core.delivery import Delivery
from mlproducer._core.states import CIRCUIT_MOVES, CircuitEvent, CircuitState, Machine

SHORTEST = 0.1
"""Seconds that `Breaker.retry_after` gives at least, so that no caller tries in a tight loop."""

LONGEST = 10
"""The cooldown grows to so many times its first length."""


class Trip(Protocol):
    """What opens the breaker."""

    growth: int
    """By how much each failed probe multiplies the cooldown."""

    is_told_once: bool
    """Whether a success that follows another one is no news."""

    def succeeded(self, count: int, now: float) -> None:
        """Note attempts that were confirmed."""

    def failed(self, now: float) -> bool:
        """Note an attempt that failed; true if the breaker is to open."""

    def reset(self) -> None:
        """Forget what was counted: the breaker opens or closes."""


class Consecutive:
    """Opens after failures in a row.

    :param threshold: how many; 0: never
    """

    growth = 1
    is_told_once = True

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._in_row = 0

    def succeeded(self, count: int, now: float) -> None:
        """Start over."""
        self._in_row = 0

    def failed(self, now: float) -> bool:
        """Count one more."""
        self._in_row += 1
        return 0 < self._threshold <= self._in_row

    def reset(self) -> None:
        """Start over."""
        self._in_row = 0


class Adaptive:
    """Opens when at least half of the last ten seconds' attempts failed, of 20 or more.

    So it opens also where a part of the messages still gets through, and not over a few failures
    among little traffic.
    """

    growth = 2
    is_told_once = False

    WINDOW = 10.0
    BUCKET = 0.1
    FEWEST = 20
    SHARE = 0.5

    def __init__(self) -> None:
        # [when it began, attempts, failures], the oldest first: a hundred however many attempts
        self._buckets: deque[list[float]] = deque()
        self._attempts = self._failures = 0.0

    def succeeded(self, count: int, now: float) -> None:
        """Note attempts that were confirmed."""
        self._add(count, 0, now)

    def failed(self, now: float) -> bool:
        """Note an attempt that failed; true if too many have."""
        self._add(1, 1, now)
        enough = self._attempts >= self.FEWEST
        return enough and self._failures >= self.SHARE * self._attempts

    def reset(self) -> None:
        """Forget all attempts."""
        self._buckets.clear()
        self._attempts = self._failures = 0.0

    def _add(self, attempts: int, failures: int, now: float) -> None:
        buckets = self._buckets
        while buckets and buckets[0][0] <= now - self.WINDOW:
            _, old_attempts, old_failures = buckets.popleft()
            self._attempts -= old_attempts
            self._failures -= old_failures
        if not buckets or now - buckets[-1][0] >= self.BUCKET:
            buckets.append([now, 0, 0])
        buckets[-1][1] += attempts
        buckets[-1][2] += failures
        self._attempts += attempts
        self._failures += failures


class Breaker:
    """Counts outcomes, and says whether a message may be sent.

    :param trip: what opens it
    :param cooldown: seconds that it stays open
    :param patience: seconds that a probe has for its confirm, also one whose publisher would wait
        longer or, like that of a ``submit()``, for ever
    :param changed: told each new state
    :param wake: told the monotonic time at which `cool` has something to do
    :ivar is_told_once: `succeeded` changes nothing where it is closed and there are no failures
    :ivar failures: in a row, whatever opens it
    """

    def __init__(
        self,
        trip: Trip,
        cooldown: float,
        patience: float,
        changed: Callable[[CircuitState], None],
        wake: Callable[[float], None],
    ) -> None:
        self._trip = trip
        self.is_told_once = trip.is_told_once
        self._first_cooldown = self._cooldown = cooldown
        self._patience = patience
        self._changed = changed
        self._wake = wake
        self._machine = Machine(CIRCUIT_MOVES, CircuitState.CLOSED)
        self.state = CircuitState.CLOSED
        self._probe: Delivery | None = None
        self._probe_ends = 0.0
        self.reopens_at = 0.0
        self.failures = 0

    def refuses(self) -> bool:
        """Whether nothing more may be sent now."""
        # Publishers ask without a lock. The answer may be out of date by the next moment: what gets
        # through all the same, the I/O thread refuses.
        if self.state is CircuitState.CLOSED:
            return False
        return self.state is CircuitState.OPEN or self._probe is not None

    def retry_after(self, now: float) -> float:
        """Return the seconds after which it is worth while to try again; never 0."""
        ends = self.reopens_at if self.state is CircuitState.OPEN else self._probe_ends
        return max(SHORTEST, ends - now)

    def sent(self, delivery: Delivery, now: float) -> None:
        """Note a write; in the half-open state it is the probe."""
        if self.state is CircuitState.HALF_OPEN:
            self._probe = delivery
            self._probe_ends = now + self._patience
            self._wake(self._probe_ends)

    def succeeded(self, deliveries: Collection[Delivery], now: float) -> None:
        """Note confirms, whose messages need not be the probe: the broker is well."""
        self.failures = 0
        self._trip.succeeded(len(deliveries), now)
        if self.state is not CircuitState.CLOSED:
            self._cooldown = self._first_cooldown
            self._step(CircuitEvent.CONFIRMED)

    def failed(self, delivery: Delivery | None, now: float) -> None:
        """Note a failure that counts; the probe's opens the breaker again.

        :param delivery: ``None``: an attempt to connect has failed
        """
        self.failures += 1
        if self.state is CircuitState.CLOSED:
            if self._trip.failed(now):
                self._open(CircuitEvent.TRIPPED, now)
        elif self.state is CircuitState.HALF_OPEN and (
            delivery is None or self._probe in (None, delivery)
        ):
            longest = LONGEST * self._first_cooldown
            self._cooldown = min(self._cooldown * self._trip.growth, longest)
            self._open(CircuitEvent.PROBE_FAILED, now)

    def released(self, delivery: Delivery) -> None:
        """Note an end that says nothing; if it was the probe, the next message is."""
        if delivery is self._probe:
            self._probe = None

    def cool(self, now: float) -> None:
        """Do what is due: let a probe through after the cooldown, or wait for one no longer."""
        if self.state is CircuitState.OPEN:
            if now >= self.reopens_at:
                self._step(CircuitEvent.COOLED)
            else:  # a timer may be early by a moment, and must not be the last
                self._wake(self.reopens_at)
        elif self._probe is not None:
            if now >= self._probe_ends:
                self._probe.counted = True  # what becomes of this attempt is no second failure
                self.failed(self._probe, now)
            else:
                self._wake(self._probe_ends)

    def reconnected(self) -> None:
        """Let a probe through at once: what was wrong may have been the old connection."""
        if self.state is CircuitState.OPEN:
            self._step(CircuitEvent.COOLED)

    def _open(self, event: CircuitEvent, now: float) -> None:
        self.reopens_at = now + self._cooldown  # first: publishers who see OPEN read it
        self._step(event)
        self._wake(self.reopens_at)

    def _step(self, event: CircuitEvent) -> None:
        self._probe = None  # before the state: half-open with an old probe would refuse everything
        self._trip.reset()
        self.state = self._machine.step(event)
        self._changed(self.state)
