"""What has to be done in a forked child before it may use anything of this library.

Python runs hooks after ``os.fork``. A child that was forked by C code (uWSGI without
``py-call-osafterfork``, an extension) runs none; it is found out at the first call that comes in,
and then the same is done. Where there is no fork (Windows), nothing is.

Runs on: the only thread of a child; where no hooks were run, the first thread that calls in.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable
from typing import Protocol

from mlproducer._guard import guarded, write

logger = logging.getLogger(__name__)

_WIPE_ON_FORK = 18
"""``MADV_WIPEONFORK`` of Linux 4.14 (madvise(2)): however a child is forked, its copy is zero."""


class _Byte(Protocol):
    """One that is set in this process, and zero in a child that has not begun afresh."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class _Pid:
    """Tells it by the process id."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, _index: int, /) -> int:
        return self._pid == os.getpid()

    def __setitem__(self, _index: int, _value: int, /) -> None:
        self._pid = os.getpid()


def _byte() -> _Byte:
    """Have the kernel wipe it, where it does such a thing.

    Looking at it takes a tenth of the time of asking for the process id, a call of the system.
    """
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, TypeError, ValueError, OSError):  # not Linux, or an old or a small one
        return _Pid()
    return page


class _Process:
    """The process for which all was done that a fork asks for.

    :ivar pid: its id; not this process's own while a child has not begun afresh
    :ivar begun: set once that is done
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.pid = os.getpid()
        self.begun = _byte()
        self.begun[0] = 1
        self._begin_unlocked()

    def _begin_unlocked(self) -> None:
        # guards: pid, between the threads of a child that runs no hooks
        self._lock = threading.RLock()
        self._begins = False

    def forked(self) -> None:
        """Begin afresh where the hooks were run, and no other thread is left."""
        self._begin_unlocked()
        self.begin()

    def begin(self) -> None:
        """Do all steps once; one that fails keeps none of the others from being done."""
        with self._lock:
            if self._begins or self.pid == os.getpid():
                return  # a finaliser calls in from the middle of it, or another thread has done it
            self._begins = True
            try:
                for step in self.steps:
                    error = guarded(step)
                    if error is not None:
                        text = "a step after a fork failed; going on"
                        write(logger, logging.ERROR, text, error=error)
                self.pid = os.getpid()  # last: until then other threads have to wait for the lock
                self.begun[0] = 1
            finally:
                self._begins = False


_process = _Process()
begun = _process.begun
"""Its first byte is 0 in a child that is to call `notice`."""


def in_child(step: Callable[[], None]) -> None:
    """Have something done in every forked child, after what was registered before it."""
    _process.steps.append(step)


def notice() -> None:
    """Begin afresh if this is a child whose fork ran no hooks."""
    if not begun[0]:
        _process.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forked)
