"""How lines are logged: a limited number of each kind in a storm, and whatever handlers may do.

A logging handler is a user's code, and may raise, or publish the line and so be refused here.

Runs on: the thread that has something to say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mlproducer import _clock as time
from mlproducer._guard import write
from mlproducer.observe.limiter import Limiter


class Lines:
    """Log lines of several kinds, limited in a storm.

    :param to: the logger of the module whose lines they are
    :param clock: monotonic seconds
    :param speak_of: the loggers of other modules, by the kinds of lines that speak of these
    """

    def __init__(
        self,
        to: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        speak_of: Mapping[str, logging.Logger] = MappingProxyType({}),
    ) -> None:
        self._to = to
        self._clock = clock
        self._speak_of = speak_of
        self._limiter = Limiter()

    def log(
        self,
        level: int,
        kind: str,
        fields: str = "",
        *args: object,
        error: BaseException | None = None,
    ) -> None:
        """Log a line that begins with its kind, unless there were too many of them just now.

        :param error: whose traceback follows
        """
        now = self._clock()
        self._tell_suppressed(now)
        if self._limiter.admits(kind, now):
            text = f"{kind} {fields}" if fields else kind
            write(self._logger(kind), level, text, *args, error=error)

    def close(self) -> None:
        """Say what was left out and not told yet."""
        self._tell_suppressed(math.inf)

    def _tell_suppressed(self, now: float) -> None:
        for kind, count in self._limiter.suppressed(now):
            write(self._logger(kind), logging.WARNING, "%s suppressed=%d", kind, count)

    def _logger(self, kind: str) -> logging.Logger:
        return self._speak_of.get(kind, self._to)
