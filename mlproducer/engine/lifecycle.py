"""When a producer's engine begins and ends: at its first use, and once.

`close` may come from anywhere, also from a signal handler that has interrupted the start, and so
takes no lock.

Runs on: the users' threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from mlproducer.engine.engine import Engine
from mlproducer.errors import NotConnectedError, ProducerClosedError, WouldDeadlockError
from mlproducer.status import CloseReport


class Lifecycle:
    """One engine's life in one process.

    :param make: makes the engine, not started
    :ivar engine: ``None`` until the first use
    """

    def __init__(self, make: Callable[[], Engine], *, closed: bool = False) -> None:
        self._make = make
        # guards: engine and _starter while the engine starts; never held while waiting for others
        self._lock = threading.Lock()
        self._starter: int | None = None
        self._first_close = [None]
        self._report: Future[CloseReport] = Future()
        self.engine: Engine | None = None
        self.closed = closed

    def running(self, *, blocking: bool = True) -> Engine:
        """Give the engine, started.

        :param blocking: the caller is going to wait, which it must not on one of our threads
        :raises ProducerClosedError: it is closed
        :raises WouldDeadlockError: the wait would never end
        """
        engine = self.engine
        if engine is None or self.closed:
            engine = self._start()
        if blocking and engine.runs_here():
            raise WouldDeadlockError("a blocking call on the producer's own thread")
        return engine

    def close(self, timeout: float) -> CloseReport:
        """Drain and close, or wait for whoever is at it."""
        self.closed = True
        try:
            self._first_close.pop()
        except IndexError:
            return self._report_of_the_first(timeout)
        report, engine = CloseReport(), self.engine
        if engine is not None:
            report = engine.close(0.0 if engine.runs_here() else timeout)
        self._report.set_result(report)
        return report

    def _report_of_the_first(self, timeout: float) -> CloseReport:
        try:
            return self._report.result(timeout)
        except FutureTimeoutError:
            return CloseReport()

    def _start(self) -> Engine:
        me = threading.get_ident()
        if self._starter == me:
            raise WouldDeadlockError("called in a signal handler that interrupted the start")
        made: Engine | None = None
        with self._lock:
            if self.engine is None and not self.closed:
                self._starter = me
                try:
                    made = self.engine = self._started()
                finally:
                    self._starter = None
        if made is not None:
            if self.closed:
                made.close(0.0)  # close() came while it started, and may not have seen it
            return made
        if self.closed or self.engine is None:
            raise ProducerClosedError("the producer is closed")
        return self.engine

    def _started(self) -> Engine:
        engine = self._make()
        try:
            engine.start()
        except RuntimeError as error:
            raise NotConnectedError(f"no thread can be started: {error}") from error
        return engine
