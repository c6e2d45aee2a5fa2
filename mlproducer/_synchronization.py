"""Primitives for waiting that an interrupt cannot break.

CPython handles signals inside the Python code of ``threading.Condition``, and so of ``Event`` and
of futures: a Ctrl-C there can leave their lock held for ever, and a thread that wants to notify the
waiter hangs. A plain lock is acquired and released in C. So everything that the I/O thread shares
with a waiting publisher is built on plain locks, and on operations of ``deque``, ``list`` and
``dict`` that are one step under the GIL.

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
"""Seconds that count as for ever: waits and deadlines have limits."""

HANDOVER = 1.0
"""Seconds, at most, between two steps of a thread that passes a token on."""


def seconds(timeout: float, name: str = "timeout") -> float:
    """Check a user's timeout, and limit it to `LONGEST`.

    :raises ConfigurationError: it is negative, not a number, or infinite
    """
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if is_number and 0 <= timeout < math.inf:
        return min(timeout, LONGEST)
    raise ConfigurationError(f"{name} must be a finite number of seconds, 0 or more")


class Latch:
    """Opened once, by one thread, for one waiting thread."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # guards: nothing; it is held from the start, and its release lets the waiter through
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiter through, now or when it waits."""
        self._lock.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is open; return false after ``timeout`` seconds."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(0.0, timeout), LONGEST))


class Bell:
    """Wakes a thread that waits for something to do; rings that it has not heard are one."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # guards: nothing; it is held from the start, and each release lets the waiter through
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Let the waiter through, now or when it waits."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:
                return  # another thread has rung at this very moment

    def wait(self, timeout: float) -> None:
        """Wait for a ring, or for ``timeout`` seconds."""
        self._lock.acquire(timeout=timeout)


class Relay:
    """Opens latches one after another: the thread that was let through opens the next.

    Threads that are let through at the same time compete for the GIL, and each sleeps and is woken
    once or twice more.

    :param remind: has `hurry` called soon, in case a thread is slow to pass on
    """

    def __init__(self, remind: Callable[[], None]) -> None:
        self._remind = remind
        self._reminded = False
        self._line: deque[Latch] = deque()
        self._running = False

    def open(self, latch: Latch) -> None:
        """Open it now if no thread is being let through, otherwise in its turn."""
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
        """Open the next latch; called by each thread that was let through."""
        self._running = True
        if not (self._line and self._open_next()):
            self._running = False
            # A latch that was added since _open_next() found none has seen _running, and relied on
            # it; without this second look it would stay closed.
            if self._line:
                self.pass_on()

    def hurry(self) -> None:
        """Open all latches: the thread that should pass on is slow, or was interrupted."""
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
    """Lets threads wait for a condition, which they check again after each change."""

    def __init__(self) -> None:
        # Read without a call, too, where there is usually no waiter. A thread that starts to wait
        # checks its condition again once its latch is in the list: one of the two sees the other.
        self.watched: list[Latch] = []  # an empty list has a tenth of the size of a deque

    def changed(self) -> None:
        """Have the waiting threads check their condition again."""
        for _ in range(len(self.watched)):
            try:
                latch = self.watched.pop(0)
            except IndexError:  # another thread has called this too
                return
            latch.open()

    def wait_for(self, holds: Callable[[], bool], deadline: float | None) -> bool:
        """Wait until ``holds()``; return false at the monotonic deadline."""
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
    """Held by one thread at a time, and passed on to the thread that has waited longest.

    A signal handler or finalizer that wants it on the thread that holds it does not get it: the
    holder could not release it before the handler returns. The holder is one key of a dictionary,
    since ``dict.setdefault`` tests and sets in one step, which no interrupt can divide.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}
        self._waiting: deque[_Turn] = deque()

    @property
    def is_here(self) -> bool:
        """Whether the current thread holds it."""
        return self._holder.get("thread") == threading.get_ident()

    def take(self, deadline: float) -> bool:
        """Take it, waiting until a monotonic deadline; return false if it was not free by then.

        Return false at once if the current thread holds it already.
        """
        if self.is_here:
            return False
        turn = _Turn(threading.get_ident())
        try:
            if not self._waiting and self._is_taken_by(turn):
                return True
            turn.queued = True
            self._waiting.append(turn)
            if self._is_taken_by(turn):  # it was released before this turn was in the queue
                self._hand_on()  # to the first in the queue
            return turn.latch.wait(deadline - time.monotonic()) or not self._leave(turn)
        except BaseException:  # an interrupt
            if turn.queued:
                self._leave(turn)
            self.give()
            raise

    def give(self) -> None:
        """Pass it on, or release it; nothing happens if the current thread does not hold it.

        Even if an interrupt ends this call, it is released.
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
                    return  # else a thread has queued that did not see it released
            else:
                self._holder["thread"] = turn.thread
                turn.latch.open()
                return

    def _leave(self, turn: _Turn) -> bool:
        """Stop waiting; return false if it was passed on at this very moment."""
        try:
            self._waiting.remove(turn)
        except ValueError:
            return not turn.latch.wait(HANDOVER)
        return True


class _Turn:
    """A thread that waits for a token."""

    __slots__ = ("latch", "queued", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.queued = False
        self.latch = Latch()
