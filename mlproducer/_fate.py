"""The fate of a message: a future whose waiters may be interrupted.

The standard library's wait is Python code that holds a lock: a Ctrl-C in it can turn into a
RuntimeError, or leave the lock held for ever. Here waiters use latches. ``done()`` and callbacks
still need the lock; if an interrupt left it held, it is replaced after a moment.

Runs on: any thread; it is resolved on the I/O thread.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from mlproducer import _clock as time
from mlproducer._latch import Watch, seconds
from mlproducer.message import Receipt

ORPHANED = 0.05
"""Seconds after which a future's lock, usually held for microseconds, counts as lost."""


class Fate(Future[Receipt]):
    """The fate of a message, to which receipts and futures refer.

    :ivar delivery: kept alive as long as this is referenced and not resolved
    """

    delivery: object = None

    def __init__(self) -> None:
        super().__init__()
        self._resolved = Watch()

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt, or raise the error.

        :param timeout: seconds; ``None`` waits without a limit
        """
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the error; return ``None`` if there is a receipt."""
        self._wait(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Withdraw the message; return false if the sender has taken it."""
        cancelled = super().cancel()
        if cancelled:
            self._conclude()
        return cancelled

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message, for the sender; return false if it was withdrawn."""
        self._replace_lost_lock()
        return super().set_running_or_notify_cancel()

    def set_result(self, result: Receipt) -> None:
        """Resolve it: the message was delivered."""
        self._replace_lost_lock()
        super().set_result(result)
        self._conclude()

    def set_exception(self, exception: BaseException | None) -> None:
        """Resolve it: the message was not delivered."""
        self._replace_lost_lock()
        super().set_exception(exception)
        self._conclude()

    def _conclude(self) -> None:
        """Drop the delivery, which refers to this, and wake the waiters."""
        self.delivery = None
        self._resolved.changed()

    def _wait(self, timeout: float | None) -> None:
        if timeout is not None:
            timeout = seconds(0.0 if timeout < 0 else timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._resolved.wait_for(self.done, deadline)

    def _replace_lost_lock(self) -> None:
        """Replace the lock if an interrupt has left it held.

        ``_condition`` is not part of the documented API of `Future`. If a thread still holds the
        old lock after all, in a long signal handler, it releases that one later: it then guards
        nothing, and no wait of this class uses it.
        """
        if self._condition.acquire(timeout=ORPHANED):
            self._condition.release()
        else:
            # guards: the state of this future in the base class
            self._condition = threading.Condition()
