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


class Relay:
    """Opens latches one after another: each next one is opened by who came through the last.

    Threads that are let through together stand in line for the interpreter's lock, where each of
    them falls asleep and is woken once or twice more.

    :param remind: has `hurry` called soon, in case that somebody is slow to pass on
    """

    def __init__(self, remind: Callable[[], None]) -> None:
        self._remind = remind
        self._reminded = False
        self._line: deque[Latch] = deque()
        self._running = False

    def open(self, latch: Latch) -> None:
        """Open it now if nobody is on the way, else when its turn has come; by one thread only."""
        self._line.append(latch)
        if not self._running:
            self.pass_on()
        elif not self._reminded:
            self._reminded = True
            self._remind()

    def pass_on(self) -> None:
        """Open the next one; called by everybody who has come through."""
        self._running = True
        if not self._open_next():
            self._running = False
            if self._line:  # it came just now, for somebody who seemed to be on the way
                self.pass_on()

    def hurry(self) -> None:
        """Open all that wait: whoever is on the way is slow, or was interrupted."""
        self._reminded = False
        while self._open_next():
            pass
        self._running = False

    def _open_next(self) -> bool:
        try:
            latch = self._line.popleft()
        except IndexError:
            return False
        latch.open()
        return True


class Watch:
    """Lets threads wait until something holds, looking again whenever it may have changed."""

    def __init__(self) -> None:
        self._latches: list[Latch] = []  # empty, it is a tenth of a deque

    def changed(self) -> None:
        """Let those who wait look again."""
        for _ in range(len(self._latches)):
            try:
                latch = self._latches.pop(0)
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
    """Held by one thread at a time, and handed on to whoever has waited longest."""

    def __init__(self) -> None:
        self._free: deque[None] = deque([None])
        self._waiting: deque[Latch] = deque()

    def take(self, deadline: float) -> bool:
        """Take it, waiting until a monotonic deadline; false if it was not handed on by then."""
        if not self._waiting and self._pop():
            return True
        latch = Latch()
        self._waiting.append(latch)
        if self._pop():  # it came free before the latch could be seen
            self._waiting.remove(latch)
            return True
        try:
            taken = latch.wait(deadline - time.monotonic())
        except BaseException:  # an interrupt
            if not self._leave(latch):
                self.give()
            raise
        return taken or not self._leave(latch)

    def give(self) -> None:
        """Hand it on, or leave it for whoever comes."""
        while True:
            try:
                latch = self._waiting.popleft()
            except IndexError:
                self._free.append(None)
                if self._waiting and self._pop():
                    continue  # somebody came meanwhile
                return
            latch.open()
            return

    def _leave(self, latch: Latch) -> bool:
        """Wait no longer; false if it was handed on at that very moment."""
        try:
            self._waiting.remove(latch)
        except ValueError:
            return False
        return True

    def _pop(self) -> bool:
        try:
            self._free.pop()
        except IndexError:
            return False
        return True
