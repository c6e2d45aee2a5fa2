"""Log lines: a limited number of each kind in a storm, whatever logging handlers do.

A logging handler is a user's code: it may raise, or try to publish the line itself.

Runs on: the thread that logs.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from attrs import define, field

from mlproducer import _clock as time
from mlproducer._foreign_calls import write


class LimitedLogger:
    """Logs lines of several kinds, a limited number of each.

    :param to: the logger of the module
    :param clock: returns monotonic seconds
    :param loggers: other loggers, by the kinds of the lines that go to them
    """

    def __init__(
        self,
        to: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        loggers: Mapping[str, logging.Logger] = MappingProxyType({}),
    ) -> None:
        self._to = to
        self._clock = clock
        self._loggers = loggers
        self._limiter = Limiter()

    def log(
        self,
        level: int,
        kind: str,
        fields: str = "",
        *args: object,
        error: BaseException | None = None,
    ) -> None:
        """Log a line that begins with its kind, unless there were too many of that kind.

        :param error: an error whose traceback is logged too
        """
        now = self._clock()
        self._log_suppressed(now)
        if self._limiter.admits(kind, now):
            text = f"{kind} {fields}" if fields else kind
            write(self._logger(kind), level, text, *args, error=error)

    def close(self) -> None:
        """Log the numbers of suppressed lines that were not logged yet."""
        self._log_suppressed(math.inf)

    def _log_suppressed(self, now: float) -> None:
        for kind, count in self._limiter.suppressed(now):
            write(self._logger(kind), logging.WARNING, "%s suppressed=%d", kind, count)

    def _logger(self, kind: str) -> logging.Logger:
        return self._loggers.get(kind, self._to)


@define(eq=False)
class _Window:
    began: float
    seen: Iterator[int] = field(factory=itertools.count)  # next() is one step under the GIL


class Limiter:
    """Limits lines by their kind: so many in a period, then the number of the others.

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
