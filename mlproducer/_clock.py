"""The monotonic clock, out of reach of libraries that stop or move time in tests.

freezegun replaces ``time.monotonic`` in every module, and only for some threads: timers that were
set meanwhile would be due in years, and no heartbeat, retry or reconnect would happen. It does not
replace ``time.clock_gettime``.

Modules import it in place of the standard one: ``from mlproducer import _clock as time``.

Runs on: any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

__all__ = ["monotonic"]

_CLOCK = getattr(time, "CLOCK_MONOTONIC", None)

# A partial, since freezegun replaces the function itself wherever a module has it as an attribute.
monotonic: Callable[[], float] = (
    partial(time.clock_gettime, _CLOCK) if _CLOCK is not None else partial(time.monotonic)
)
"""Return monotonic seconds."""
