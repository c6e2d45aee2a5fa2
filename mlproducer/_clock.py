"""The monotonic clock, out of reach of libraries that stop or move time in tests.

freezegun replaces ``time.monotonic`` itself, in every module, and only for some threads: timers
that were set meanwhile would be due in years, and no heartbeat, retry or reconnect would follow.
The clock of the system is left alone.

It stands in for the standard module: ``from mlproducer import clock as time``.

Runs on: any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

__all__ = ["monotonic"]

_CLOCK = getattr(time, "CLOCK_MONOTONIC", None)

# A partial, since freezegun looks for the function itself among the names of each module.
monotonic: Callable[[], float] = (
    partial(time.clock_gettime, _CLOCK) if _CLOCK is not None else partial(time.monotonic)
)
"""Give seconds that only ever grow, by the pace of the real ones."""
