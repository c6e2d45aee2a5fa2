"""What a process can say about itself: memory, processor time of its threads, waits summed up.

Reads ``/proc``, so on Linux; elsewhere the figures that need it are absent or zero.

Runs on: any thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path


def resident() -> int:
    """Give the bytes of memory that the process has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_by_thread() -> dict[str, float]:
    """Give the seconds of processor time that each living thread has used, by its name."""
    spent = {}
    for thread in threading.enumerate():
        try:
            nanoseconds = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
        except OSError:
            continue
        spent[thread.name] = int(nanoseconds.split()[0]) / 1e9
    return spent


def summary(waits: Sequence[float]) -> dict[str, float]:
    """Give mean, median, 99th percentile and maximum of some waits; nothing for none."""
    if not waits:
        return {}
    ordered = sorted(waits)
    return {
        "mean": sum(ordered) / len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[len(ordered) * 99 // 100],
        "max": ordered[-1],
    }
