"""How long to wait before the next attempt.

Runs on: any thread.
"""

from __future__ import annotations

from attrs import frozen


@frozen
class Backoff:
    """Exponential delays with a cap, and jitter on top so that clients do not come in step.

    :ivar initial: seconds before the first attempt
    :ivar maximum: cap in seconds, before jitter
    :ivar jitter: the share of the delay that may be added at the most
    """

    initial: float
    maximum: float
    jitter: float = 0.0

    def delay(self, failures: int, chance: float = 0.0) -> float:
        """Seconds to wait after ``failures`` failures before this one.

        :param chance: a random number from 0 to 1
        """
        steps = min(failures, 64)  # 2.0 ** 64 is far past any cap; 2.0 ** 5000 would overflow
        return float(min(self.initial * 2.0**steps, self.maximum) * (1 + self.jitter * chance))
