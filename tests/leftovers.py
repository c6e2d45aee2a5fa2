"""What private servers leave behind: programs that run in a directory, and files there.

Runs on: the tests' threads.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.helpers import LIMIT


def left_behind(directory: Path) -> list[str]:
    """Return the programs that still run in a directory, and what else is in it."""
    found = [str(path) for path in directory.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place = (process / "cwd").readlink()
        except OSError:
            continue  # it has ended meanwhile
        if place.is_relative_to(directory):
            found.append(process.name)
    return found


def left_in_the_end(directory: Path) -> list[str]:
    """Wait for the guard of a server, a program of its own, which clears up after its owner."""
    deadline, pause = time.monotonic() + LIMIT, threading.Event()
    while (left := left_behind(directory)) and time.monotonic() < deadline:
        pause.wait(0.05)
    return left
