"""Wakes the breaker when its cooldown, or the time of its probe, is over; without any traffic.

Runs on: the breaker thread; `BreakerTimer.wait_until` on the I/O thread.
"""

from __future__ import annotations

from functools import partial

from mlproducer._engine.roles import Post
from mlproducer._engine.threads import TimerThread


class BreakerTimer:
    """Sleeps until the breaker has something to do."""

    def __init__(self, post: Post) -> None:
        self.thread = TimerThread(self._over)
        self._post = post

    def wait_until(self, when: float) -> None:
        """Wake at a monotonic time."""
        self.thread.order(partial(self._set, when))

    def _set(self, when: float) -> None:
        self.thread.due = when

    def _over(self) -> None:
        self.thread.due = None
        self._post.order(self._post.cool)
