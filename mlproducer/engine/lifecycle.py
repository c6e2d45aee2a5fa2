"""When a producer's engines begin and end: at their first use, and once.

`close` may come from anywhere, also from a signal handler that has interrupted the start, and so
takes no lock.

Runs on: the users' threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

from mlproducer.engine import threads
from mlproducer.errors import NotConnectedError, ProducerClosedError, WouldDeadlockError
from mlproducer.status import CloseReport

if TYPE_CHECKING:
    from mlproducer.engine.fleet import Fleet


class Lifecycle:
    """The life of a producer's engines in one process.

    :param make: makes the engines, not started
    :ivar fleet: ``None`` until the first use
    """

    def __init__(self, make: Callable[[], Fleet], *, closed: bool = False) -> None:
        self._make = make
        # guards: fleet and _starter while the engines start; never held while waiting for others
        self._lock = threading.Lock()
        self._starter: int | None = None
        self._first_close = [None]
        self._report: Future[CloseReport] = Future()
        self.fleet: Fleet | None = None
        self.closed = closed

    def running(self, *, blocking: bool = True) -> Fleet:
        """Give the fleet, started.

        :param blocking: the caller is going to wait, which it must not on one of our threads
        :raises ProducerClosedError: it is closed
        :raises WouldDeadlockError: the wait would never end
        """
        fleet = self.fleet
        if fleet is None or self.closed:
            fleet = self._start()
        if blocking and threads.here.owner is fleet:
            raise WouldDeadlockError("a blocking call on the producer's own thread")
        return fleet

    def close(self, timeout: float) -> CloseReport:
        """Drain and close, or wait for whoever is at it."""
        self.closed = True
        try:
            self._first_close.pop()
        except IndexError:
            return self._report_of_the_first(timeout)
        report, fleet = CloseReport(), self.fleet
        if fleet is not None:
            report = fleet.close(0.0 if threads.here.owner is fleet else timeout)
        self._report.set_result(report)
        return report

    def _report_of_the_first(self, timeout: float) -> CloseReport:
        try:
            return self._report.result(timeout)
        except FutureTimeoutError:
            return CloseReport()

    def _start(self) -> Fleet:
        me = threading.get_ident()
        if self._starter == me:
            raise WouldDeadlockError("called in a signal handler that interrupted the start")
        made: Fleet | None = None
        with self._lock:
            if self.fleet is None and not self.closed:
                self._starter = me
                try:
                    made = self.fleet = self._started()
                finally:
                    self._starter = None
        if made is not None:
            if self.closed:
                made.close(0.0)  # close() came while it started, and may not have seen it
            return made
        if self.closed or self.fleet is None:
            raise ProducerClosedError("the producer is closed")
        return self.fleet

    def _started(self) -> Fleet:
        try:
            fleet = self._make()
        except (OSError, AssertionError) as error:  # pika asserts that it has its descriptors
            why = getattr(error, "strerror", None) or "out of descriptors"
            raise NotConnectedError(f"the producer cannot be started: {why}") from error
        try:
            fleet.start()
        except RuntimeError as error:
            raise NotConnectedError(f"no thread can be started: {error}") from error
        return fleet
