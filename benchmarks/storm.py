"""A simulation of many producers that lose their broker at the same moment; no broker, no clock.

Each producer waits as its backoff says and tries to connect. While the broker is down an attempt
fails at once. Once it is back it takes so many connections in a second and refuses the rest, which
count as failures and go on backing off. After ten failures a producer gives up, as the library
does, and starts over with the next call; here that is after a second on average.

Runs on: the caller's thread.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence

from attrs import field, frozen

from mlproducer._core.backoff import Backoff

Delay = Callable[[int, random.Random], float]
"""Seconds before the next attempt, after so many failures before this one."""

INITIAL, MAXIMUM = 0.5, 32.0
GIVE_UP = 10
TRAFFIC = 1.0
"""Mean seconds until the next call of publish()."""

TICKS = 10
"""Slots of time in a second, by which attempts are counted."""


def on_top(jitter: float) -> Delay:
    """Give the library's own backoff: the delay, and up to a share of it on top."""
    backoff = Backoff(INITIAL, MAXIMUM, jitter)
    return lambda failures, chance: backoff.delay(failures, chance.random())


def full() -> Delay:
    """Give *full jitter*: anything from nothing to the delay."""
    backoff = Backoff(INITIAL, MAXIMUM)
    return lambda failures, chance: chance.uniform(0.0, backoff.delay(failures))


STRATEGIES: dict[str, Delay] = {
    "no jitter": on_top(0.0),
    "30 % on top": on_top(0.3),
    "100 % on top": on_top(1.0),
    "full jitter": full(),
}


@frozen(kw_only=True)
class Scenario:
    """What happens to the broker.

    :ivar outage: seconds for which it is down
    :ivar capacity: connections that it takes in a second, as many of them at once; ``None``: all
    """

    producers: int = 10_000
    outage: float
    capacity: int | None = None


@frozen
class Storm:
    """What the broker sees.

    :ivar slots: attempts in each tenth of a second, from the loss of the connections
    :ivar back: when each producer was connected again, in seconds from the broker's return
    """

    scenario: Scenario
    slots: Sequence[int] = field(repr=False)
    back: Sequence[float] = field(repr=False)

    def per_second(self) -> list[int]:
        """Give the attempts of the second that ends with each slot."""
        return [sum(self.slots[max(0, end - TICKS) : end]) for end in range(1, len(self.slots) + 1)]

    @property
    def peak(self) -> int:
        """The most attempts in a second that the broker sees once it is back."""
        first = int(self.scenario.outage * TICKS)
        return max(
            sum(self.slots[start : start + TICKS]) for start in range(first, len(self.slots))
        )

    def back_within(self, share: float) -> float:
        """Give the seconds from the broker's return until so many are connected."""
        return sorted(self.back)[round(share * len(self.back)) - 1]


class _Door:
    """What the broker takes: a bucket of tokens that fills up to a second's worth."""

    def __init__(self, scenario: Scenario) -> None:
        self._opens = self._seen = scenario.outage
        self._capacity = scenario.capacity
        self._tokens = float(scenario.capacity or 0)

    def takes(self, now: float) -> bool:
        """Whether an attempt at this time gets in; times do not go back."""
        if now < self._opens or self._capacity is None:
            return now >= self._opens
        filled = self._tokens + (now - self._seen) * self._capacity
        self._tokens, self._seen = min(float(self._capacity), filled), now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def simulate(scenario: Scenario, delay: Delay, seed: int) -> Storm:
    """Play it through, until all are connected."""
    chance = random.Random(seed)
    door = _Door(scenario)
    slots: Counter[int] = Counter()
    back: list[float] = []
    due = [(delay(0, chance), producer, 0) for producer in range(scenario.producers)]
    heapq.heapify(due)
    while due:
        now, producer, failures = heapq.heappop(due)
        slots[int(now * TICKS)] += 1
        if door.takes(now):
            back.append(now - scenario.outage)
            continue
        failures += 1
        if failures == GIVE_UP:
            failures, wait = 0, chance.expovariate(1 / TRAFFIC)
        else:
            wait = delay(failures, chance)
        heapq.heappush(due, (now + wait, producer, failures))
    return Storm(scenario, [slots[slot] for slot in range(max(slots) + 1)], back)
