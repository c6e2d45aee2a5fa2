"""What a scenario is made of: trials, each of which does one thing and says what it saw.

Runs on: the main thread.
"""

from __future__ import annotations

import contextlib
import enum
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import frozen

LOOK = 0.01
"""Seconds between two looks at a state that no event tells of."""


class Need(enum.Enum):
    """What a trial needs of the broker; the value says why it is skipped where that is missing."""

    NOTHING = ""
    PATH = "goes through a proxy, under whose name a broker with TLS is not trusted"
    NODE = "needs a broker and queues that may be harmed: unset RABBITMQ_URL"


class UnexpectedError(Exception):
    """Something else was seen than was expected; the text says what."""


@frozen
class Trial:
    """One thing to do.

    :ivar run: does it, and gives what was seen; raises `UnexpectedError`
    """

    done: str
    expected: str
    run: Callable[[Any], str]
    need: Need = Need.NODE


@frozen
class Scenario:
    """Trials that belong together, on one broker."""

    name: str
    summary: str
    trials: tuple[Trial, ...]


@frozen
class Step:
    """What came of a trial.

    :ivar ok: ``None`` where it was skipped
    """

    done: str
    expected: str
    seen: str
    ok: bool | None
    seconds: float = 0.0


def expect(well: bool, seen: str) -> str:
    """Return what was seen.

    :raises UnexpectedError: it was not well
    """
    if not well:
        raise UnexpectedError(seen)
    return seen


def wait_for_event(events: queue.SimpleQueue[Any], limit: float, what: str) -> float:
    """Wait for an event, and return how many seconds it took.

    :raises UnexpectedError: it did not come within ``limit`` seconds
    """
    started = time.monotonic()
    try:
        events.get(timeout=limit)
    except queue.Empty:
        raise UnexpectedError(f"not {what} within {limit:.1f} s") from None
    return time.monotonic() - started


def wait_until(come_about: Callable[[], bool], limit: float, what: str) -> float:
    """Look until something has come about, and return how many seconds it took.

    :raises UnexpectedError: it did not within ``limit`` seconds
    """
    started, never = time.monotonic(), threading.Event()
    while not come_about():
        if time.monotonic() - started > limit:
            raise UnexpectedError(f"not {what} within {limit:.1f} s")
        never.wait(LOOK)
    return time.monotonic() - started


def waited_for_cpu() -> float:
    """Return the seconds for which threads of this process, while they could run, had no CPU.

    Any of them may hold the interpreter's lock meanwhile. Elsewhere than on Linux it is 0.
    """
    waited, threads = 0, Path("/proc/self/task")
    for thread in threads.iterdir() if threads.is_dir() else ():
        with contextlib.suppress(OSError):  # it has ended
            waited += int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    return waited / 1e9
