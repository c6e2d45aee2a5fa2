"""Log lines: a limited number of each kind in a storm, whatever logging handlers do.

A logging handler is a user's code: it may raise, or try to publish the line itself.

Runs on: the thread that logs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer.observe.limiter import Limiter


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
