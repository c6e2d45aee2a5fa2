"""The thread that looks up what attempts to connect need: addresses, credentials, TLS files.

One for a producer, and started with it: Python 3.12 starts no thread any more once the main thread
has ended, and there may be much to deliver then.

Runs on: any thread; what is handed in runs on the resolver's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from mlproducer import _clock as time
from mlproducer._core.interfaces import Loss
from mlproducer._engine.endpoints import (
    Endpoint,
    Endpoints,
    Identity,
    ResolvedEndpoint,
    UnreachableError,
)
from mlproducer._engine.threads import TimerThread, join_all
from mlproducer._foreign_calls import write

logger = logging.getLogger(__name__)

STUCK_LIMIT = 4
"""Threads that may wait for a name server, or for the user's callable, that does not answer."""

STUCK_AT_THE_END = 0.1
"""Seconds that a look-up under way may hold up the producer's end; it is of no use any more."""


class Resolver:
    """Looks things up, one after the other.

    :param spawn: starts a thread, given its role and what it runs
    :ivar threads: those that were started
    """

    def __init__(
        self, directory: Endpoints, spawn: Callable[[str, Callable[[], None]], threading.Thread]
    ) -> None:
        self.directory = directory
        self.threads: list[threading.Thread] = []
        self._spawn = spawn
        self._worker = TimerThread(_nothing)

    def start(self) -> None:
        """Start the thread.

        :raises RuntimeError: no thread can be started
        """
        self.threads.append(self._spawn("resolver", self._worker.run))

    def stop(self) -> None:
        """End the thread, once it has done what it was told so far."""
        self._worker.stop()

    def leave(self) -> None:
        """Do nothing more, in a forked child."""
        self._worker.leave()

    def join(self, deadline: float) -> None:
        """Wait for the thread, but hardly for one that is stuck in a look-up."""
        join_all(self.threads, min(deadline, time.monotonic() + STUCK_AT_THE_END))

    def find(self, turn: int, done: Callable[[ResolvedEndpoint | Loss], object]) -> None:
        """Look up the endpoint whose turn it is, and say what was found."""
        self._worker.order(partial(self._find, turn, done))

    def identify(self, endpoint: Endpoint, done: Callable[[Identity | Loss], object]) -> None:
        """Look up the user to connect as, and report what was found."""
        self._worker.order(partial(self._identify, endpoint, done))

    def replace(self) -> None:
        """Leave a thread that is stuck in a look-up to itself, and go on with another."""
        # Another list, not this one changed: a thread in `join` may be going through it.
        self.threads = [each for each in self.threads if each.is_alive()]
        if len(self.threads) >= STUCK_LIMIT:
            return
        stuck, self._worker = self._worker, TimerThread(_nothing)
        try:
            self.start()
        except RuntimeError:  # out of threads, or the main thread has ended: wait for the old one
            self._worker = stuck
        else:
            stuck.stop()

    def _find(self, turn: int, done: Callable[[ResolvedEndpoint | Loss], object]) -> None:
        try:
            found: ResolvedEndpoint | Loss = self.directory.find(turn)
        except UnreachableError as error:
            found = error.loss
        except BaseException as error:  # noqa: BLE001 - the user's callable may raise anything
            write(logger, logging.ERROR, "looking up a broker failed", error=error)
            found = Loss(f"looking up the broker failed ({type(error).__name__})")
        done(found)

    def _identify(self, endpoint: Endpoint, done: Callable[[Identity | Loss], object]) -> None:
        try:
            found: Identity | Loss = endpoint.identity()
        except UnreachableError as error:
            found = error.loss
        done(found)


def _nothing() -> None:
    """Do nothing: there is no job, only what is asked for."""
