"""What happens to producers when their process forks or ends.

Runs on: the thread that forks, in the child; the main thread at exit.
"""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from typing import Protocol

from mlproducer import forks

EXIT_LIMIT = 5.0
"""Seconds for which the end of the process waits for what is in flight."""


class Owner(Protocol):
    """Who has threads and descriptors that do not survive a fork."""

    def forked(self) -> None:
        """Begin afresh in a child."""

    def exiting(self, deadline: float) -> None:
        """Deliver what is in flight, until a monotonic deadline."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def remember(owner: Owner) -> None:
    """Tell this owner when the process forks or ends."""
    _owners.add(owner)


def finish_in_children() -> None:
    """Be told of the end also where the process ends without ``atexit``.

    A process of multiprocessing, or of Celery's billiard, leaves by ``os._exit`` after finalizers
    of its own. A child of Celery's prefork pool runs neither: it has a signal for its end.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        module = sys.modules.get(name)
        if module is not None:
            module.Finalize(None, _at_exit, exitpriority=100)


def _in_child() -> None:
    for owner in list(_owners):
        owner.forked()


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_LIMIT
    for owner in list(_owners):
        owner.exiting(deadline)


forks.in_child(_in_child)
atexit.register(_at_exit)
