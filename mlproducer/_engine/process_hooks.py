"""What happens to producers when their process forks or ends.

A producer that runs is held here until it is closed: its messages are delivered, also at the end of
the process, although nothing of the program holds it any more.

Runs on: the thread that forks, in the child; the main thread at exit.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._foreign_calls import write

logger = logging.getLogger(__name__)

MARGIN = 0.4
"""Seconds beyond their limit in which producers that have been drained come to their end."""


class Life(Protocol):
    """What has threads and descriptors that do not survive a fork, and messages at the exit.

    :ivar running: it has been started, and is not closed to the end
    :ivar exit_timeout: seconds for which the end of the process waits for it
    """

    @property
    def running(self) -> bool:
        """Whether there is something to end."""

    @property
    def exit_timeout(self) -> float:
        """Return the limit."""

    def forked(self) -> None:
        """Begin afresh in a child."""

    def disown(self) -> None:
        """Release, in a child, what is the parent's; after `forked` of all."""

    def drain(self, deadline: float) -> None:
        """Deliver what is in flight, until a monotonic deadline."""

    def end(self, deadline: float) -> None:
        """Have what runs end."""

    def join(self, deadline: float) -> object:
        """Wait until it has ended."""

    def lost(self) -> int:
        """Count the messages that are lost with this process."""


class _Lives:
    """The producers of this process.

    :ivar over: the process ends, and starts nothing any more
    """

    def __init__(self) -> None:
        self._known: dict[weakref.ref[Life], None] = {}
        self._running: dict[Life, None] = {}
        self.over = False

    def remember(self, life: Life) -> None:
        self._known[weakref.ref(life, self._forget)] = None

    def _forget(self, life: weakref.ref[Life]) -> None:
        self._known.pop(life, None)

    def hold(self, life: Life) -> None:
        self._running[life] = None

    def release(self, life: Life) -> None:
        self._running.pop(life, None)

    def forked(self) -> None:
        """Begin afresh in a child: all of them first, since letting go may fail."""
        known = [reference() for reference in list(self._known)]
        lives = dict.fromkeys(life for life in [*known, *self._running] if life is not None)
        self._running = {}
        self.over = False
        for step in ("forked", "disown"):
            for life in lives:
                _guarded(getattr(life, step))

    def exiting(self) -> None:
        """Close all that run, within one limit: drain all, end all, then join all."""
        self.over = True
        started, lives = time.monotonic(), [life for life in list(self._running) if life.running]
        deadlines = {life: started + life.exit_timeout for life in lives}
        interrupt: BaseException | None = None
        for step, grace in (("drain", 0.0), ("end", 0.0), ("join", MARGIN)):
            for life in lives:
                deadline = started if interrupt else deadlines[life]
                late = time.monotonic() if interrupt else 0.0
                try:
                    _guarded(getattr(life, step), max(deadline, late) + grace)
                except BaseException as error:  # noqa: BLE001 - Ctrl-C: wait no longer, but end all
                    interrupt = error
        lost = sum(life.lost() for life in lives)
        if lost:
            text = "the process ends: messages lost that lived in memory: %d"
            write(logger, logging.ERROR, text, lost)
        if interrupt is not None:
            raise interrupt


def _guarded(step: Callable[..., None], *arguments: float) -> None:
    """Take a step; one that fails must not keep other producers from theirs."""
    try:
        step(*arguments)
    except Exception as error:  # noqa: BLE001 - see the docstring
        text = "a producer could not be %s; going on with the others"
        write(logger, logging.ERROR, text, step.__name__, error=error)


_lives = _Lives()

remember = _lives.remember
"""Tell this one when the process forks or ends, for as long as something holds it."""

hold = _lives.hold
"""Hold one that is started."""

release = _lives.release
"""Forget one that is closed."""


def is_over() -> bool:
    """Whether the process ends, and producers have been closed for that."""
    return _lives.over


_finalizers: dict[str, Any] = {}
"""By module: one is enough for all producers; a child's are its own."""


def finish_in_children() -> None:
    """Be told of the end also where the process ends without ``atexit``.

    A process of multiprocessing, or of Celery's billiard, leaves by ``os._exit`` after finalizers
    of its own. A child of Celery's prefork pool runs neither: it has a signal for its end.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        module, finalizer = sys.modules.get(name), _finalizers.get(name)
        # Both forget all of them when the target of a process begins.
        if module is not None and (finalizer is None or not finalizer.still_active()):
            _finalizers[name] = module.Finalize(None, _lives.exiting, exitpriority=100)


forks.in_child(_lives.forked)
forks.in_child(_finalizers.clear)
atexit.register(_lives.exiting)
