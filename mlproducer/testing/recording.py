"""`RecordingProducer`: a producer without a broker, for tests of programs that publish.

It checks and encodes tasks as every producer does, and records them instead of sending them. It
starts no thread and opens no connection or file, whatever its settings name.

Runs on: the caller's thread, callbacks included, before the call that caused them returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from mlproducer._core.states import ConnectionState
from mlproducer._synchronization import seconds
from mlproducer._wire.encode import Task
from mlproducer.errors import (
    BufferFullError,
    CircuitOpenError,
    InvalidMessageError,
    ProducerClosedError,
    PublishError,
    StoreError,
    WouldDeadlockError,
)
from mlproducer.message import Receipt
from mlproducer.observe.callbacks import (
    CallbackThread,
    DeliveryFuture,
    Dispatcher,
    Event,
    EventName,
)
from mlproducer.producer import MLProducer, Retry
from mlproducer.settings import Settings
from mlproducer.status import CloseReport, Status
from mlproducer.stores.protocol import Store
from mlproducer.testing.task_differences import differences
from mlproducer.topology import Declaration

__all__ = ["RecordingProducer"]

CLOSED = "the producer is closed"

AT_THE_CALL = (
    BufferFullError,
    CircuitOpenError,
    InvalidMessageError,
    ProducerClosedError,
    StoreError,
    WouldDeadlockError,
)
"""Errors that ``submit()`` itself raises; others are set on its future."""


class RecordingProducer(MLProducer):
    """Takes a producer's place in tests: nothing is published.

    It refuses what a producer refuses, with the same errors. Other tasks are confirmed at once, and
    recorded::

        producer = RecordingProducer()
        work(producer)
        assert producer.published == [SummarizationTask("7", {"text": "..."})]

    :param settings: ``None`` reads the environment, which need not name a broker
    :ivar published: the tasks that were published, in order, as they were handed in; for each,
        ``payload()`` gives what its worker would get
    :ivar declared: what was passed to `declare`
    """

    def __init__(
        self, settings: Settings | None = None, *, registry: Any = None, store: Store | None = None
    ) -> None:
        super().__init__(settings, registry=registry, store=store)
        self.published: list[Task] = []
        self.declared: list[Declaration] = []
        self._failures: list[PublishError] = []
        self._state = ConnectionState.DISCONNECTED
        self._calls = _Calls()

    def __enter__(self) -> RecordingProducer:
        return self

    def __repr__(self) -> str:
        return f"<RecordingProducer {len(self.published)} published>"

    # --- for tests -----------------------------------------------------------------------------

    def fail_next(self, error: PublishError) -> None:
        """Let the next message fail with an error, which is raised whatever its ``retry`` is.

        Called several times, it lets as many messages fail, in that order. A message that is
        invalid by itself uses none of them up.
        """
        if not isinstance(error, PublishError):
            raise TypeError(f"error must be a PublishError, got {type(error).__name__}")
        self._failures.append(error)

    def assert_published(self, *expected: Task) -> None:
        """Fail unless exactly these tasks were published, in this order.

        :raises AssertionError: the text shows where they differ, with the tasks' content
        """
        __tracebackhide__ = True
        if self.published != list(expected):
            counts = f"{len(self.published)} published, {len(expected)} expected"
            raise AssertionError("\n".join([counts, *differences(self.published, expected)]))

    def clear(self) -> None:
        """Forget what was published and declared, and the errors of `fail_next`."""
        self.published.clear()
        self.declared.clear()
        self._failures.clear()

    # --- publishing ----------------------------------------------------------------------------

    def publish(self, task: Task, *, timeout: float | None = None, retry: Retry = True) -> Receipt:
        """Record a task as published and confirmed.

        :raises PublishError: as a producer would, or the error of `fail_next`
        """
        return self._take(task, timeout, retry)

    async def apublish(
        self, task: Task, *, timeout: float | None = None, retry: Retry = True
    ) -> Receipt:
        """Record a task as published and confirmed, without waiting.

        :raises PublishError: as for `publish`
        """
        return self._take(task, timeout, retry)

    def submit(
        self, task: Task, *, timeout: float | None = None, retry: Retry = True
    ) -> DeliveryFuture:
        """Record a task as published; the future is resolved already.

        :raises PublishError: as a producer's ``submit()``; other errors are set on the future
        """
        future = DeliveryFuture(self._calls)
        future.set_running_or_notify_cancel()
        try:
            receipt = self._take(task, timeout, retry)
        except AT_THE_CALL:
            raise
        except PublishError as error:
            future.message_id = error.message_id or ""
            future.set_exception(error)
        else:
            future.message_id = receipt.message_id
            future.set_result(receipt)
        return future

    def publish_many(
        self, tasks: Iterable[Task], *, timeout: float | None = None, retry: Retry = True
    ) -> list[Receipt | PublishError]:
        """Record tasks as published; each fails alone.

        :returns: the receipt or error of each task, in order
        """
        self._check_usable()
        results: list[Receipt | PublishError] = []
        try:
            for task in tasks:
                try:
                    results.append(self._take(task, timeout, retry))
                except PublishError as error:
                    results.append(error)
        except Exception as error:
            vars(error)["results"] = results
            raise
        return results

    def _take(self, task: Task, timeout: float | None, retry: Retry) -> Receipt:
        self.start()
        _check(timeout)
        if retry is not True and retry is not False:
            self._checked(retry)
        envelope = (self._encode_hooked if self._hooks else self._encoder.encode)(task)
        if self._failures:
            error = self._failures.pop(0)
            error.message_id = error.message_id or envelope.message_id
            raise error
        self.published.append(task)
        self._tell(Event("confirmed", envelope.message_id))
        return Receipt(envelope.message_id, attempts=1, elapsed=0.0)

    def declare(self, declarations: Iterable[Declaration], *, timeout: float | None = None) -> bool:
        """Record what would be declared."""
        _check(timeout)
        self.start()
        self.declared.extend(declarations)
        return True

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Be connected from now on.

        :raises ProducerClosedError: it was closed
        """
        self._check_usable()
        if self._state is ConnectionState.DISCONNECTED:
            self._state = ConnectionState.CONNECTED
            self._tell(Event("connected", detail=self.status().broker))

    def wait_connected(self, timeout: float | None = None) -> bool:
        """Start; return true at once."""
        _check(timeout)
        self.start()
        return True

    def reconnect(self) -> None:
        """Start; there is nothing to connect to."""
        self.start()

    def flush(self, timeout: float | None = None) -> int:
        """Return 0: nothing is ever in flight."""
        _check(timeout)
        return 0

    def close(self, timeout: float | None = None) -> CloseReport:
        """Refuse further calls; ``published`` stays as it is."""
        _check(timeout)
        self._state = ConnectionState.CLOSED
        return CloseReport()

    def status(self) -> Status:
        """Return a healthy status, once it is started."""
        return Status(connection_state=self._state, broker="recording")

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._state is ConnectionState.CLOSED

    def _check_usable(self) -> None:
        if self._calls.under_way():
            raise WouldDeadlockError("a blocking call in a callback")
        if self.closed:
            raise ProducerClosedError(CLOSED)

    def _tell(self, event: Event) -> None:
        name: EventName = event.name
        for callback in self._callbacks.of(name):
            self._calls.events.call(partial(callback, event))


class _Calls(Dispatcher):
    """Makes calls at once, on the calling thread."""

    def __init__(self) -> None:
        super().__init__(_no_thread)
        self.making = threading.local()
        self.events = self.futures = _Here(self)  # type: ignore[assignment] # none is dropped

    def under_way(self) -> bool:
        """Return whether this thread is inside such a call."""
        return getattr(self.making, "now", False)


class _Here(CallbackThread):
    def __init__(self, calls: _Calls) -> None:
        super().__init__("calls", _no_thread)
        self._all = calls

    def call(self, function: Callable[[], object]) -> None:
        """Call it now; what it raises is logged."""
        before = self._all.under_way()
        self._all.making.now = True
        try:
            self._make(function)
        finally:
            self._all.making.now = before


def _check(timeout: float | None) -> None:
    if timeout is not None:
        seconds(timeout)


def _no_thread(role: str, _target: Callable[[], None]) -> threading.Thread:
    raise RuntimeError(f"a RecordingProducer starts no thread, and so none for {role}")
