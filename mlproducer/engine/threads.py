"""How threads begin and end: one way to start one, one deadline to join them all.

Runs on: any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable

_ordinals: dict[int, object] = {}


def take_ordinal(owner: object) -> int:
    """Give the lowest number that no open producer of this process has; 1 is the first."""
    free = (n for n in itertools.count(1) if _ordinals.setdefault(n, owner) is owner)
    return next(free)


def return_ordinal(ordinal: int) -> None:
    """Let another producer have the number."""
    _ordinals.pop(ordinal, None)


def spawn(role: str, ordinal: int, target: Callable[[], None]) -> threading.Thread:
    """Start a daemon named after its role, ``mlproducer-io`` say, and its producer's number.

    :raises RuntimeError: the interpreter is shutting down (Python 3.12 and later) or out of threads
    """
    name = f"mlproducer-{role}" if ordinal == 1 else f"mlproducer-{role}-{ordinal}"
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def join_all(threads: Iterable[threading.Thread], deadline: float) -> bool:
    """Join threads, all within one monotonic deadline; true if all of them ended."""
    me = threading.current_thread()
    others = [thread for thread in threads if thread is not me]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in others)
