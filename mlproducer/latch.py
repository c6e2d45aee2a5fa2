"""Waiting that an interrupt cannot break.

CPython looks for signals inside the Python code of ``threading.Condition``, and so of ``Event``
and of futures: a Ctrl-C there can leave their lock taken for ever, and whoever wants to tell the
waiter hangs. A plain lock is taken and released by C alone. So whatever the I/O thread has to touch
while a publisher waits stands on these.

Runs on: any thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable


class Latch:
    """Opened once, by one thread for another."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # guards: nothing; it is taken from the start, and releasing it lets the waiter through
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through, now or when it comes."""
        self._lock.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is open; false if it was not within ``timeout`` seconds."""
        return self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout))


class Watch:
    """Lets threads wait until something holds, looking again whenever it may have changed."""

    def __init__(self) -> None:
        self._latches: deque[Latch] = deque()

    def changed(self) -> None:
        """Let those who wait look again."""
        for _ in range(len(self._latches)):
            try:
                latch = self._latches.popleft()
            except IndexError:  # somebody else has let them look
                return
            latch.open()

    def wait_for(self, holds: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until ``holds()``; false if it did not by the monotonic deadline."""
        while not holds():
            latch = Latch()
            self._latches.append(latch)
            if holds():
                break
            timeout = None if deadline is None else deadline - time.monotonic()
            if not latch.wait(timeout):
                with contextlib.suppress(ValueError):
                    self._latches.remove(latch)
                return holds()
        return True


class Token:
    """Held by one thread at a time; a deque is its only state, so that no interrupt breaks it."""

    def __init__(self) -> None:
        self._free: deque[None] = deque([None])
        self._watch = Watch()

    def take(self, deadline: float | None) -> bool:
        """Take it, waiting until a monotonic deadline; false if it did not come free."""
        return self._watch.wait_for(self._pop, deadline)

    def give(self) -> None:
        """Give it back."""
        self._free.append(None)
        self._watch.changed()

    def _pop(self) -> bool:
        try:
            self._free.pop()
        except IndexError:
            return False
        return True
