"""What a loop has to do later, by the clock of the library.

pika's own timers read ``time.monotonic``, which libraries for tests stop or move: then no heartbeat
would be sent, and no connection be opened again.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from mlproducer import _clock as time

MANY_CANCELLED = 1000
"""Cancelled timers that may be kept until they would have been due."""


class Timer:
    """One call that is due; its ``callback`` is ``None`` once it was made or cancelled."""

    __slots__ = ("callback", "due", "number")

    def __init__(self, due: float, number: int, callback: Callable[[], None]) -> None:
        self.due = due
        self.number = number
        self.callback: Callable[[], None] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return (self.due, self.number) < (other.due, other.number)


class Timers:
    """Stands in for what pika's loop calls its timer, with the same methods."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._numbers = itertools.count()
        self._cancelled = 0

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Have something called after so many seconds."""
        timer = Timer(time.monotonic() + max(0.0, delay), next(self._numbers), callback)
        heapq.heappush(self._heap, timer)
        return timer

    def remove_timeout(self, timer: Timer) -> None:
        """Have it called no more; one that was called or cancelled is left as it is."""
        if timer.callback is None:
            return
        timer.callback = None
        self._cancelled += 1
        if self._cancelled > MANY_CANCELLED:
            self._heap = [each for each in self._heap if each.callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def get_remaining_interval(self) -> float | None:
        """Return the seconds until the next call; ``None``: there is none."""
        return max(0.0, self._heap[0].due - time.monotonic()) if self._heap else None

    def process_timeouts(self) -> None:
        """Make the calls that are due now; what they add is for the next time."""
        now, ready = time.monotonic(), []
        while self._heap and self._heap[0].due <= now:
            ready.append(heapq.heappop(self._heap))
        for timer in ready:
            callback, timer.callback = timer.callback, None
            if callback is not None:  # a call before it may have cancelled it
                callback()

    def close(self) -> None:
        """Forget all that is due."""
        self._heap.clear()
