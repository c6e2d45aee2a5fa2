"""What becomes of a message: a future whose waiters may be interrupted.

The stdlib's own wait is Python code that holds a lock; a Ctrl-C in it can come out as a
RuntimeError, or leave the lock taken for ever. Here waiters stand on latches. A lock that is lost
all the same, since `done` and callbacks need it, is replaced after a moment.

Runs on: any thread; it is settled on the I/O thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from mlproducer import _clock as time
from mlproducer._latch import Watch, seconds
from mlproducer.message import Receipt

ORPHANED = 0.05
"""Seconds after which a future's lock, which is held for microseconds, is taken for lost."""


class Fate(Future[Receipt]):
    """The fate of a message, for those who hold its receipt or future.

    :ivar delivery: is remembered as long as somebody holds this and it is not settled
    """

    delivery: object = None

    def __init__(self) -> None:
        super().__init__()
        self._settled = Watch()

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt, or for the error that is raised.

        :param timeout: seconds; ``None`` waits without a limit
        """
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error; ``None`` where there is a receipt."""
        self._wait(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Withdraw the message; false if it was taken over."""
        cancelled = super().cancel()
        if cancelled:
            self._conclude()
        return cancelled

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message over; false if it was withdrawn."""
        self._see_to_the_lock()
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Receipt) -> None:
        """Tell that it is delivered."""
        self._see_to_the_lock()
        super().set_result(result)
        self._conclude()

    def set_exception(self, exception: BaseException | None) -> None:
        """Tell that it is not."""
        self._see_to_the_lock()
        super().set_exception(exception)
        self._conclude()

    def _conclude(self) -> None:
        """Let go of the delivery, which holds this, and let those who wait look."""
        self.delivery = None
        self._settled.changed()

    def _wait(self, timeout: float | None) -> None:
        if timeout is not None:
            timeout = seconds(0.0 if timeout < 0 else timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._settled.wait_for(self.done, deadline)

    def _see_to_the_lock(self) -> None:
        """Put another lock in the place of one that an interrupt has left taken.

        A thread that holds it after all, in a long signal handler, goes on with the old one; that
        one guards nothing by then, and no wait of ours is made on it.
        """
        if self._condition.acquire(timeout=ORPHANED):
            self._condition.release()
        else:
            # guards: the stdlib's own state of this future
            self._condition = threading.Condition()
