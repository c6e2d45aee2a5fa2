"""Limit log lines of one kind: so many in a period, then the number of those that were suppressed.

Runs on: any thread; the time is passed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from attrs import define, field


@define(eq=False)
class _Window:
    began: float
    seen: Iterator[int] = field(factory=itertools.count)  # next() is one step under the GIL


class Limiter:
    """Limits lines by their kind.

    :param limit: lines of one kind that may be logged in a period
    :param period: seconds
    """

    def __init__(self, limit: int = 5, period: float = 10.0) -> None:
        self._limit = limit
        self._period = period
        self._windows: dict[str, _Window] = {}

    def admits(self, kind: str, now: float) -> bool:
        """Return whether a line of this kind may be logged at this (monotonic) time."""
        window = self._windows.setdefault(
            kind, _Window(now)
        )  # one for all threads that come at once
        return next(window.seen) < self._limit

    def suppressed(self, now: float) -> list[tuple[str, int]]:
        """Return each kind that was suppressed in a period that is over, with the number of lines.

        Each is returned once. With ``now`` infinite every period is over.
        """
        over = [kind for kind, w in self._windows.copy().items() if now - w.began >= self._period]
        windows = [(kind, self._windows.pop(kind, None)) for kind in over]
        counts = [(kind, next(w.seen) - self._limit) for kind, w in windows if w is not None]
        return [(kind, count) for kind, count in counts if count > 0]
