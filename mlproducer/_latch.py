"""Waiting that an interrupt cannot break.

CPython looks for signals inside the Python code of ``threading.Condition``, and so of ``Event``
and of futures: a Ctrl-C there can leave their lock taken for ever, and whoever wants to tell the
waiter hangs. A plain lock is taken and released by C alone. So whatever the I/O thread has to touch
while a publisher waits stands on these.

Runs on: any thread.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable

from mlproducer import _clock as time
from mlproducer.errors import ConfigurationError

LONGEST = min(threading.TIMEOUT_MAX, 366 * 86400.0)
"""Seconds that count as for ever: systems have limits for a wait, and clocks for a deadline."""

HANDING_ON = 1.0
"""Seconds at most between two steps of a thread that hands a token on."""


def seconds(timeout: float, name: str = "timeout") -> float:
    """Check a number of seconds that a user gives, and cut it to what can be waited for.

    :raises ConfigurationError: it is negative, not a number, or infinite
    """
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if is_number and 0 <= timeout < math.inf:
        return min(timeout, LONGEST)
    raise ConfigurationError(f"{name} must be a finite number of seconds from 0")


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
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(0.0, timeout), LONGEST))


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
        """Open it now if nobody is on the way, else when its turn has come."""
        if not (self._running or self._line):
            # `_running` is a hint, which two threads may set at once: then both open theirs.
            self._running = True
            latch.open()
            return
        self._line.append(latch)
        if not self._running:
            self.pass_on()
        elif not self._reminded:
            self._reminded = True
            self._remind()

    def pass_on(self) -> None:
        """Open the next one; called by everybody who has come through."""
        self._running = True
        if not (self._line and self._open_next()):
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
        # Read without a call, too, by whoever would wake nobody. A thread that begins to wait looks
        # again once its latch is in here, so that one of the two sees the other.
        self.watched: list[Latch] = []  # empty, it is a tenth of a deque

    def changed(self) -> None:
        """Let those who wait look again."""
        for _ in range(len(self.watched)):
            try:
                latch = self.watched.pop(0)
            except IndexError:  # somebody else has let them look
                return
            latch.open()

    def wait_for(self, holds: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until ``holds()``; false if it did not by the monotonic deadline."""
        while not holds():
            latch = Latch()
            self.watched.append(latch)
            if holds():
                break
            timeout = None if deadline is None else deadline - time.monotonic()
            if not latch.wait(timeout):
                with contextlib.suppress(ValueError):
                    self.watched.remove(latch)
                return holds()
        return True


class Token:
    """Held by one thread at a time, and handed on to the one that has waited longest.

    A signal handler or finaliser that asks for it on the thread that holds it does not get it: the
    holder could not give it before the handler returns. Who holds it is told by one key of a
    dictionary, whose ``setdefault`` asks and takes in one step that no interrupt divides.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}
        self._waiting: deque[_Turn] = deque()

    @property
    def is_here(self) -> bool:
        """Whether this thread holds it."""
        return self._holder.get("thread") == threading.get_ident()

    def take(self, deadline: float) -> bool:
        """Take it, waiting until a monotonic deadline; false if it was not handed on by then.

        It is also false, at once, where this thread holds it already.
        """
        if self.is_here:
            return False
        turn = _Turn(threading.get_ident())
        try:
            if not self._waiting and self._is_taken_by(turn):
                return True
            turn.queued = True
            self._waiting.append(turn)
            if self._is_taken_by(turn):  # it came free before this turn could be seen
                self._hand_on()  # to the first in line
            return turn.latch.wait(deadline - time.monotonic()) or not self._leave(turn)
        except BaseException:  # an interrupt
            if turn.queued:
                self._leave(turn)
            self.give()
            raise

    def give(self) -> None:
        """Hand it on, or leave it for the next one; nothing happens where this thread has it not.

        An interrupt in here does not keep it.
        """
        if self.is_here:
            try:
                self._hand_on()
            except BaseException:
                if self.is_here:
                    self._hand_on()
                raise

    def _is_taken_by(self, turn: _Turn) -> bool:
        return self._holder.setdefault("thread", turn.thread) == turn.thread

    def _hand_on(self) -> None:
        while True:
            try:
                turn = self._waiting.popleft()
            except IndexError:
                self._holder.pop("thread", None)
                if not self._waiting or not self._is_taken_by(_Turn(threading.get_ident())):
                    return  # else another thread has come meanwhile, and has not seen it free
            else:
                self._holder["thread"] = turn.thread
                turn.latch.open()
                return

    def _leave(self, turn: _Turn) -> bool:
        """Wait no longer; false if it was handed on at that very moment."""
        try:
            self._waiting.remove(turn)
        except ValueError:
            return not turn.latch.wait(HANDING_ON)
        return True


class _Turn:
    """A thread that waits for a token."""

    __slots__ = ("latch", "queued", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.queued = False
        self.latch = Latch()
