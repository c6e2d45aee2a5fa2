"""A stopwatch for promises of time, which leaves out what a busy machine adds.

A limit of time is a promise of the program. Where other programs take the CPUs, a thread that could
run waits for one; how long, Linux counts for each thread, and for the machine how long programs
wait for a disk. `in_time` leaves both out, so a limit is as tight as what is promised and still
holds beside any load. On an idle machine it is next to nothing. A lock, a missed wake-up, a timer
or another program's answer that is waited for is never left out.

Elsewhere than on Linux nothing is left out.

Runs on: the tests' threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NANO, MICRO = 1e-9, 1e-6
TICK = 0.01
"""The unit of /proc/stat, in seconds."""

_ended: list[tuple[str, float]] = []
"""What threads of this process had waited when they ended; the kernel forgets it with them."""

_run = threading.Thread.run


def _run_and_note(thread: threading.Thread) -> None:
    try:
        _run(thread)
    finally:
        own = f"/proc/self/task/{threading.get_native_id()}"
        _ended.append((own, _waited(Path(own))))


threading.Thread.run = _run_and_note  # type: ignore[method-assign]


@contextmanager
def in_time(most: float, at_least: float = 0.0) -> Iterator[None]:
    """Fail where the block takes less than ``at_least`` seconds, or ``most`` and longer."""
    watch = Stopwatch()
    yield
    wall, own = watch.wall(), watch.own()
    assert at_least <= wall, f"took only {wall:.3f} s"
    assert own < most, f"took {wall:.3f} s, {wall - own:.3f} s of them without a CPU"


class Stopwatch:
    """Measures from when it is made; from any thread."""

    def __init__(self) -> None:
        self._ended = len(_ended)
        self._before = _waits()
        self._began = time.monotonic()

    def wall(self) -> float:
        """Return the seconds that have passed."""
        return time.monotonic() - self._began

    def own(self) -> float:
        """Return the seconds that have passed without those in which threads waited for a CPU."""
        return self.wall() - self.waited()

    def waited(self) -> float:
        """Return the seconds for which threads have waited for a CPU.

        Those that wait one after the other add up; two that wait at the same time count twice,
        which makes no promise look broken that was kept.
        """
        waits = [*_ended[self._ended :], *_waits().items()]
        return sum(max(0.0, now - self._before.get(each, 0.0)) for each, now in waits)


def _waits() -> dict[str, float]:
    """Return the seconds each thread has waited for a CPU, in this process and its children."""
    waits = {"machine": _taken_from_the_machine(), "disk": _spent_on_the_disk()}
    processes = ["/proc/self"]
    for process in processes:
        with suppress(OSError):  # it has ended
            for thread in Path(process, "task").iterdir():
                waits[str(thread)] = _waited(thread)
                children = (thread / "children").read_text(encoding="ascii")
                processes += [f"/proc/{child}" for child in children.split()]
    return waits


def _waited(thread: Path) -> float:
    """Return the seconds that a thread has waited for a CPU."""
    try:
        return int((thread / "schedstat").read_text(encoding="ascii").split()[1]) * NANO
    except OSError:  # it has ended, or this is no Linux
        return 0.0


def _spent_on_the_disk() -> float:
    """Return the seconds in which some program waited for a disk, as a server does that syncs."""
    try:
        some = Path("/proc/pressure/io").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:  # the kernel does not count it
        return 0.0
    return float(some.rpartition("=")[2]) * MICRO


def _taken_from_the_machine() -> float:
    """Return the seconds for which a virtual machine's CPUs were taken from it."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    return float(fields[8]) * TICK
