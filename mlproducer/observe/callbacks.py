"""Users' callbacks, run on a thread of their own, so that a slow or failing one harms nobody.

Runs on: events arrive on the I/O thread; callbacks run on the thread ``mlproducer-events``, which
starts with the first of them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from attrs import frozen

from mlproducer.core.delivery import Delivery
from mlproducer.core.ports import Loss
from mlproducer.core.states import CircuitState
from mlproducer.fate import Fate
from mlproducer.message import Receipt
from mlproducer.observe.events import EventSink
from mlproducer.observe.lines import Lines

logger = logging.getLogger(__name__)


EVENTS = (
    "connected",
    "disconnected",
    "blocked",
    "unblocked",
    "gave_up",
    "circuit_opened",
    "circuit_closed",
    "confirmed",
    "deferred",
    "dead_lettered",
)

_CIRCUIT_WORDS = {CircuitState.OPEN: "opened", CircuitState.CLOSED: "closed"}

MAX_QUEUED = 10_000
"""Calls that may wait for the callbacks' thread; what comes on top is dropped, and logged."""

Spawn = Callable[[str, Callable[[], None]], threading.Thread]


@frozen
class Event:
    """What a callback is told.

    :ivar name: one of those that ``MLProducer.on`` accepts
    :ivar message_id: of the message, where the event is about one
    :ivar detail: a reason or address, free of secrets
    """

    name: str
    message_id: str | None = None
    detail: str = ""


class Dispatcher:
    """A queue of calls and the thread that makes them.

    :ivar awaited: futures that will make calls, kept although nobody else may hold them
    """

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._unstarted = [None]
        self._lines = Lines(logger)
        self.threads: list[threading.Thread] = []
        self.awaited: set[Future[Receipt]] = set()

    def start(self) -> None:
        """Start the thread, once; called on a user's thread."""
        with contextlib.suppress(IndexError):
            self._unstarted.pop()
            self.threads.append(self._spawn("events", self._run))

    def call(self, function: Callable[[], object]) -> None:
        """Have something called soon."""
        if self._calls.qsize() < MAX_QUEUED:
            self._calls.put(function)
        elif self._calls.qsize() == MAX_QUEUED:
            logger.error("callbacks are too slow: dropping events")
            self._calls.put(lambda: logger.error("callbacks have caught up"))

    def stop(self) -> None:
        """End the thread once it has made the calls that are due."""
        self._calls.put(None)

    def _run(self) -> None:
        while (function := self._calls.get(timeout=None)) is not None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 - whatever it raises, the thread goes on
                self._lines.log(logging.ERROR, "a callback raised", error=error)
        self._lines.close()


class Callbacks:
    """Who wants to be called at which event."""

    def __init__(self) -> None:
        self._of: dict[str, list[Callable[[Event], object]]] = {name: [] for name in EVENTS}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, event: str, callback: Callable[..., object]) -> None:
        """Call ``callback`` with an `Event`, or with nothing where it takes nothing.

        :raises ValueError: there is no such event
        """
        if event not in self._of:
            raise ValueError(f"event must be one of {', '.join(EVENTS)}")
        self._of[event].append(_accepting_event(callback))

    def of(self, event: str) -> list[Callable[[Event], object]]:
        """Give those who want to be called at an event."""
        return self._of[event]


class CallbackSink(EventSink):
    """Tells users' callbacks."""

    def __init__(self, callbacks: Callbacks, dispatcher: Dispatcher) -> None:
        self._callbacks = callbacks
        self._dispatcher = dispatcher

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Tell of each."""
        if self._callbacks.of("confirmed"):
            for delivery in deliveries:
                self._tell(Event("confirmed", delivery.envelope.message_id))

    def deferred(self, delivery: Delivery) -> None:
        """Tell, with the reason's name."""
        self._tell(Event("deferred", delivery.envelope.message_id, type(delivery.reason).__name__))

    def dead_lettered(self, delivery: Delivery) -> None:
        """Tell, with the reason's name."""
        reason = type(delivery.reason).__name__
        self._tell(Event("dead_lettered", delivery.envelope.message_id, reason))

    def circuit_changed(self, state: CircuitState) -> None:
        """Tell when it opens and when it closes."""
        if state is not CircuitState.HALF_OPEN:
            self._tell(Event(f"circuit_{_CIRCUIT_WORDS[state]}"))

    def connected(self, address: str) -> None:
        """Tell, with the broker's address."""
        self._tell(Event("connected", detail=address))

    def disconnected(self, loss: Loss) -> None:
        """Tell, with the reason."""
        self._tell(Event("disconnected", detail=loss.text))

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Tell, with the reason of the last failure."""
        self._tell(Event("gave_up", detail=loss.text))

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Tell, with the broker's reason."""
        self._tell(Event("blocked" if blocked else "unblocked", detail=reason))

    def _tell(self, event: Event) -> None:
        for callback in self._callbacks.of(event.name):
            self._dispatcher.call(partial(callback, event))


class DeliveryFuture(Fate):
    """A future that carries its message's id and calls back off the I/O thread."""

    message_id: str

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def add_done_callback(self, fn: Callable[[Future[Receipt]], object]) -> None:
        """Call ``fn`` once the message's fate is known; at once where it is known already."""
        if not self.done():
            self._dispatcher.start()
            self._dispatcher.awaited.add(self)
        super().add_done_callback(partial(self._call_back, fn))

    def _call_back(self, fn: Callable[[Future[Receipt]], object], future: Future[Receipt]) -> None:
        self._dispatcher.awaited.discard(self)
        if any(thread.is_alive() for thread in self._dispatcher.threads):
            self._dispatcher.call(partial(fn, future))
        else:
            fn(future)


def _accepting_event(callback: Callable[..., object]) -> Callable[[Event], object]:
    try:
        inspect.signature(callback).bind(None)
    except TypeError:
        return lambda _event: callback()
    except ValueError:  # a builtin without a signature
        return callback
    return callback
