"""The circuit breaker: after so many failures in a row, fail fast until a probe has succeeded.

Only what says something about the broker's health is counted, each attempt once. In the half-open
state one message, and no more, is the probe; whatever else comes in meanwhile is refused.

Runs on: the I/O thread, its only owner; publishers read `Breaker.refuses` and `Breaker.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from mlproducer.core.delivery import Delivery
from mlproducer.core.states import CIRCUIT_MOVES, CircuitEvent, CircuitState, Machine


class Breaker:
    """Counts outcomes, and says whether a message may be sent.

    :param threshold: consecutive failures that open it
    :param cooldown: seconds that it stays open
    :param changed: told each new state
    """

    def __init__(
        self, threshold: int, cooldown: float, changed: Callable[[CircuitState], None]
    ) -> None:
        self._threshold = threshold
        self._cooldown = cooldown
        self._changed = changed
        self._machine = Machine(CIRCUIT_MOVES, CircuitState.CLOSED)
        self.state = CircuitState.CLOSED
        self._probe: Delivery | None = None
        self._opened_at = 0.0
        self.failures = 0

    @property
    def reopens_at(self) -> float:
        """When the cooldown ends, in monotonic time."""
        return self._opened_at + self._cooldown

    def refuses(self) -> bool:
        """Whether nothing more may be sent now."""
        if self.state is CircuitState.CLOSED:
            return False
        return self.state is CircuitState.OPEN or self._probe is not None

    def sent(self, delivery: Delivery) -> None:
        """Note a write; in the half-open state it is the probe."""
        if self.state is CircuitState.HALF_OPEN:
            self._probe = delivery

    def succeeded(self, deliveries: Collection[Delivery]) -> None:
        """Note confirms; the probe's closes the breaker."""
        self.failures = 0
        if self._probe is not None and self._probe in deliveries:
            self._probe = None
            self._step(CircuitEvent.PROBE_SUCCEEDED)

    def failed(self, delivery: Delivery, now: float) -> None:
        """Note a failure that counts; the probe's opens the breaker again."""
        self.failures += 1
        if self.state is CircuitState.HALF_OPEN and self._probe in (None, delivery):
            self._open(CircuitEvent.PROBE_FAILED, now)
        elif self.state is CircuitState.CLOSED and self.failures >= self._threshold:
            self._open(CircuitEvent.TRIPPED, now)

    def released(self, delivery: Delivery) -> None:
        """Note an end that says nothing; if it was the probe, the next message is."""
        if delivery is self._probe:
            self._probe = None

    def cool(self, now: float) -> None:
        """Let a probe through, if the cooldown is over."""
        if self.state is CircuitState.OPEN and now >= self.reopens_at:
            self._step(CircuitEvent.COOLED)

    def reconnected(self) -> None:
        """Let a probe through at once: what was wrong may have been the old connection."""
        if self.state is CircuitState.OPEN:
            self._step(CircuitEvent.COOLED)

    def _open(self, event: CircuitEvent, now: float) -> None:
        self._probe = None
        self._opened_at = now
        self._step(event)

    def _step(self, event: CircuitEvent) -> None:
        self.state = self._machine.step(event)
        self._changed(self.state)
