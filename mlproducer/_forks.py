"""Reset the library in a forked child, before it is used there.

Python runs hooks after ``os.fork``. A child that was forked by C code (uWSGI without
``py-call-osafterfork``, an extension) runs none; this is noticed at the first call into the
library, which then does the same. Since CPython 3.13 such a child may crash where threads of the
parent were waiting: the interpreter's own locks keep lists of them, which only its hook clears.
Where there is no fork (Windows), nothing happens.

A fork also waits until other threads have imported what the library imports when it is first used,
and keeps them from importing more before it is over: the child would have their half of the
modules, locked by threads that it has not.

Runs on: the thread that forks; the only thread of a child; if no hooks were run, the first thread
that calls the library.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from mlproducer import _clock as time
from mlproducer._foreign_calls import guarded, write
from mlproducer._synchronization import Watch

logger = logging.getLogger(__name__)

_WIPE_ON_FORK = 18
"""``MADV_WIPEONFORK`` of Linux 4.14 (madvise(2)): in every forked child the page is zero."""


IMPORT_LIMIT = 10.0
"""Seconds for which a fork waits for other threads' imports, and they for a fork."""


class _Byte(Protocol):
    """A byte that is set in this process, and zero in a child that has not been reset."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class _Pid:
    """Compares the process id."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, _index: int, /) -> int:
        return self._pid == os.getpid()

    def __setitem__(self, _index: int, _value: int, /) -> None:
        self._pid = os.getpid()


def _byte() -> _Byte:
    """Return a byte that the kernel clears in a child, if it can.

    Reading it takes a tenth of the time of ``os.getpid()``, which is a system call.
    """
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, TypeError, ValueError, OSError):  # not Linux, or an old kernel
        return _Pid()
    return page


class _Process:
    """The process for which all was done that a fork asks for.

    :ivar pid: its id; not this process's own while a child has not begun afresh
    :ivar begun: set once that is done
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.holds: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self.pid = os.getpid()
        self.begun = _byte()
        self.begun[0] = 1
        self._begin_unlocked()

    def _begin_unlocked(self) -> None:
        # guards: pid, between the threads of a child that runs no hooks
        self._lock = threading.RLock()
        self._begins = False

    def before(self) -> None:
        """Have what a child could not go on with come to an end."""
        try:
            _imports.hold()
        finally:  # also where a signal handler raises
            with ExitStack() as steps:
                # Read now: what has just been imported may have registered some.
                for hold, _ in self.holds:
                    steps.callback(hold)

    def in_parent(self) -> None:
        """Let what waited for the fork go on."""
        with ExitStack() as steps:
            steps.callback(_imports.let_go)
            for _, let_go in self.holds:
                steps.callback(let_go)

    def forked(self) -> None:
        """Reset, from the hook: the child has no other thread yet."""
        self.pid = 0  # in a namespace of its own the child may have its parent's id
        self._begin_unlocked()
        self.begin()

    def begin(self) -> None:
        """Run all steps once; a step that fails does not prevent the others."""
        with self._lock:
            if self._begins or self.pid == os.getpid():
                return  # called by a finalizer in the middle of this, or done by another thread
            self._begins = True
            try:
                for step in self.steps:
                    error = guarded(step)
                    if error is not None:
                        text = "a step after a fork failed; continuing"
                        write(logger, logging.ERROR, text, error=error)
                self.pid = os.getpid()  # last: until then other threads wait for the lock
                self.begun[0] = 1
            finally:
                self._begins = False


_process = _Process()
begun = _process.begun
"""Its first byte is 0 in a child that is to call `notice`."""


def in_child(step: Callable[[], None]) -> None:
    """Register a step for every forked child; steps run in the order of registration."""
    _process.steps.append(step)


def around(hold: Callable[[], None], let_go: Callable[[], None]) -> None:
    """Register what is held during each fork, and released in the parent; it knows if it is held.

    It may be registered in the middle of a fork, by a module that the fork waits for.
    """
    _process.holds.append((hold, let_go))


def notice() -> None:
    """Reset, if this is a child whose fork ran no hooks."""
    if not begun[0]:
        _process.begin()


class _Imports:
    """The threads that import modules of the library, or those that it needs; and those that fork.

    Each thread notes what it does before it looks at the others, so that one of two sees the other.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all, in a child, which has none of its parent's other threads."""
        self._threads: dict[int, None] = {}
        self._forking: dict[int, None] = {}
        self._over = Watch()

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Hold up forks by other threads until the end of the block, which imports modules."""
        thread = threading.get_ident()
        if thread in self._threads:  # in a signal handler: the end is that of the outer block
            yield
            return
        try:
            self._enter(thread)
            yield
        finally:
            self._leave(thread)

    def _enter(self, thread: int) -> None:
        """Begin, once no other thread is forking: it has looked already."""
        deadline = time.monotonic() + IMPORT_LIMIT
        while True:
            self._threads[thread] = None
            if _none_but(thread, self._forking) or time.monotonic() >= deadline:
                return
            self._leave(thread)
            self._over.wait_for(lambda: _none_but(thread, self._forking), deadline)

    def _leave(self, thread: int) -> None:
        self._threads.pop(thread, None)
        self._over.changed()

    def hold(self) -> None:
        """Wait, before a fork, for all threads but this one, and keep them from importing."""
        own = threading.get_ident()
        self._forking[own] = None
        deadline = time.monotonic() + IMPORT_LIMIT
        if not self._over.wait_for(lambda: _none_but(own, self._threads), deadline):
            self._threads.clear()  # they hang, or an interrupt has left them: hold up no other fork

    def let_go(self) -> None:
        """Let other threads import, after a fork, in the parent."""
        self._forking.pop(threading.get_ident(), None)
        self._over.changed()


def _none_but(thread: int, threads: dict[int, None]) -> bool:
    return all(each == thread for each in list(threads))


_imports = _Imports()
importing = _imports.importing
in_child(_imports.begin)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_process.before,
        after_in_parent=_process.in_parent,
        after_in_child=_process.forked,
    )
