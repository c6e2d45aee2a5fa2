"""What a connected producer costs while nothing is published.

Processor time and wake-ups of all threads of its process, as Linux counts them: a thread that goes
back to sleep has switched voluntarily.

Runs on: the main thread.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

from attrs import frozen

from benchmarks.harness import BLOCKING, Player
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Report, at_most

SETTLE = 1.0
WINDOWS = 3


@frozen
class Usage:
    """What a process has used so far."""

    cpu: float
    switches: int


def run(lab: Lab) -> Report:
    """Look at it for several windows of time."""
    seconds = 2.0 if lab.scale.quick else 5.0
    contestant = lab.contestant(OURS)
    if contestant is None or not Path("/proc/self/task").is_dir():
        return Report(figures=[], notes=["left out: there is no /proc"])
    with contestant:
        Player(OURS, contestant, BLOCKING).play(100)
        threading.Event().wait(SETTLE)
        marks = [_usage(contestant.pid)]
        for _ in range(WINDOWS):
            threading.Event().wait(seconds)
            marks.append(_usage(contestant.pid))
    pairs = list(itertools.pairwise(marks))
    cpu = [(after.cpu - before.cpu) / seconds * 100 for before, after in pairs]
    wakes = [(after.switches - before.switches) / seconds for before, after in pairs]
    return Report(
        figures=[
            Figure("CPU", cpu, "%", at_most(0.3)),
            Figure("wake-ups of all threads", wakes, "1/s", at_most(3)),
        ]
    )


def _usage(pid: int) -> Usage:
    cpu, switches = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
        status = (task / "status").read_text()
        switches += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return Usage(cpu, switches)
