"""One attempt to start a producer's running part, whatever becomes of the threads that ask for it.

Runs on: the users' threads, which wait; the start on a thread ``mlproducer-start``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlproducer import _clock as time
from mlproducer._engine import threads
from mlproducer._synchronization import Watch
from mlproducer.errors import (
    ConfigurationError,
    MLProducerError,
    NotConnectedError,
    ProducerClosedError,
)

if TYPE_CHECKING:
    from mlproducer._engine.runtime import Runtime

START_LIMIT = 30.0
"""Seconds for which a call waits for the start, which takes a few milliseconds."""

CLAIM_LIMIT = 0.1
"""Seconds after which a thread that was to start it, and has not begun, is taken for lost."""


class Start:
    """One attempt to start, carried out once by the first of the threads that come to do it."""

    def __init__(self, make: Callable[[], Runtime]) -> None:
        self._make = make
        self._unclaimed = [None]
        self._runtime: Runtime | None = None
        self.error: Exception | None = None
        self.threads: list[threading.Thread] = []
        self.over = Watch()

    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self._runtime is not None or self.error is not None

    def wait(self, owner: object) -> Runtime | None:
        """Wait until it is over; ``None`` where it failed.

        A caller may be interrupted before it has a thread do it, or in the middle of having one do
        it; so each caller sees to it that there is one.
        """
        deadline = time.monotonic() + START_LIMIT
        while not self.is_over() and time.monotonic() < deadline:
            if self._unclaimed:
                try:
                    self.threads.append(threads.spawn("start", 1, self._run, owner))
                except RuntimeError as error:  # Python 3.12 and later at the end of the interpreter
                    self._fail(NotConnectedError(f"no thread can be started: {error}"))
                    break
            self.over.wait_for(self.is_over, time.monotonic() + CLAIM_LIMIT)
        return self._runtime

    def withdraw(self) -> bool:
        """Have it not made any more; false if it is under way, or over."""
        if not self._claim():
            return False
        self._fail(ProducerClosedError("the producer is closed"))
        self.over.changed()
        return True

    def _claim(self) -> bool:
        """Decide what becomes of it; true for one thread only."""
        try:
            self._unclaimed.pop()
        except IndexError:
            return False
        return True

    def _run(self) -> None:
        if not self._claim():
            return
        try:
            self._runtime = self._make()
        except MLProducerError as error:
            self._fail(error)
        except RuntimeError as error:
            self._fail(NotConnectedError(f"no thread can be started: {error}"))
        except (OSError, AssertionError) as error:  # pika asserts that it has its descriptors
            why = getattr(error, "strerror", None) or "out of descriptors"
            self._fail(NotConnectedError(f"the producer cannot be started: {why}"))
        except BaseException as error:  # noqa: BLE001 - the callers have to be told whatever it is
            self._fail(NotConnectedError(f"the producer cannot be started: {type(error).__name__}"))
        self.over.changed()

    def _fail(self, error: Exception) -> None:
        self.error = error


def fresh(error: Exception | None) -> Exception:
    """Give an error of its own to each caller."""
    if isinstance(error, (ConfigurationError, NotConnectedError, ProducerClosedError)):
        return type(error)(str(error))
    if error is not None:
        return error.with_traceback(None)
    return NotConnectedError("the start takes too long")
