"""Wakes the breaker when its cooldown, or the time of its probe, is over; without any traffic.

Runs on: the breaker thread; `BreakerTimer.wait_until` on the I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mlproducer._engine.threads import TimerThread


class BreakerTimer:
    """Sleeps until the breaker has something to do.

    :param cool: has the breaker look at the time, on the I/O thread
    """

    def __init__(self, cool: Callable[[], object]) -> None:
        self.thread = TimerThread(self._over)
        self._cool = cool

    def wait_until(self, when: float) -> None:
        """Wake at a monotonic time."""
        self.thread.order(partial(self._set, when))

    def _set(self, when: float) -> None:
        self.thread.due = when

    def _over(self) -> None:
        self.thread.due = None
        self._cool()
