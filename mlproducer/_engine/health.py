"""Asks the broker whether it is there, and gives a silent one up.

A broker that is frozen, or a path that is dead in one direction, keeps its TCP connection; only a
question that is not answered shows it (RabbitMQ guide, *Heartbeats*, detects it far later).

Runs on: the health thread; `Health.check_soon` on any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial

from mlproducer import _clock as time
from mlproducer._engine.threads import TimerThread

ANSWER_LIMIT = 5.0
"""Seconds that a broker has for its answer; a shorter freeze costs no connection."""


class Health:
    """Checks at each interval, and at once when a confirm is late.

    :param interval: seconds between checks
    :param order: has something done on the I/O thread; false if that has ended
    :param probe: asks the broker; the future is resolved when it answers
    :param silent: is told that it has not answered in time
    """

    def __init__(
        self,
        interval: float,
        order: Callable[[Callable[[], None]], bool],
        probe: Callable[[Future[None]], None],
        silent: Callable[[Future[None]], None],
    ) -> None:
        self.thread = TimerThread(self.check)
        self.thread.due = time.monotonic() + interval
        self._order = order
        self._probe = probe
        self._silent = silent
        self._interval = interval
        self._asked = False
        self._reply: Future[None] | None = None

    def stop(self) -> None:
        """End the thread, also if it waits for an answer."""
        self.thread.stop()
        reply = self._reply
        if reply is not None:
            settle(reply)

    def check_soon(self) -> None:
        """Check without waiting for the interval; once, however often it is asked for."""
        if not self._asked:
            self._asked = True
            self.thread.order(self.check)

    def check(self) -> None:
        """Ask, wait for the answer, and have the connection replaced if there is none."""
        self.thread.due = time.monotonic() + self._interval
        self._asked = False  # before it asks: a confirm that is late after that has it asked again
        reply: Future[None] = Future()
        self._reply = reply
        if not self._order(partial(self._probe, reply)):
            return
        try:
            reply.result(ANSWER_LIMIT)
        except FutureTimeoutError:
            self._order(partial(self._silent, reply))


def settle(reply: Future[None]) -> None:
    """Resolve it, unless another thread has."""
    with contextlib.suppress(InvalidStateError):
        reply.set_result(None)
