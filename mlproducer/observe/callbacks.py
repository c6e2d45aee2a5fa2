"""Users' callbacks and tracers, called on threads of their own: a slow one holds up only its kind.

Events, which may come in storms, are bounded: while they wait in too great a number, further ones
are left out. What futures and spans want called is as much as there are futures and spans, and
never left out.

Runs on: events arrive on any thread, mostly the I/O thread; calls are made on the threads
``mlproducer-events``, ``mlproducer-futures`` and ``mlproducer-spans``.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal, get_args

from attrs import frozen

from mlproducer._core.delivery import Delivery
from mlproducer._core.interfaces import Loss
from mlproducer._core.states import CircuitState
from mlproducer._fate import Fate
from mlproducer._guard import guarded
from mlproducer.errors import PublishError
from mlproducer.message import Receipt
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.events import EventSink
from mlproducer.observe.lines import Lines
from mlproducer.observe.tally import Cells

logger = logging.getLogger(__name__)

EventName = Literal[
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
    "refused",
]
"""What `MLProducer.on` accepts."""

EVENTS: tuple[EventName, ...] = get_args(EventName)

_CIRCUIT_EVENTS: dict[CircuitState, EventName] = {
    CircuitState.OPEN: "circuit_opened",
    CircuitState.CLOSED: "circuit_closed",
}

MAX_QUEUED = 10_000
"""Events that may wait for their callbacks; from then on they are left out."""

CAUGHT_UP = MAX_QUEUED // 2
"""Events that still wait when further ones are taken again."""

Call = Callable[[], object]
Spawn = Callable[[str, Callable[[], None]], threading.Thread]


@frozen
class Event:
    """What a callback is told.

    :ivar name: one of `EVENTS`
    :ivar message_id: of the message, where the event is about one
    :ivar detail: a reason or address, free of secrets
    """

    name: EventName
    message_id: str | None = None
    detail: str = ""


class Lane:
    """A queue of calls and the thread that makes them, one after the other.

    :param role: what the thread is called after
    """

    def __init__(self, role: str, spawn: Spawn) -> None:
        self._role = role
        self._spawn = spawn
        self._pid = os.getpid()
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._unstarted = [None]
        self._ended = False
        self._lines = Lines(logger)
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once.

        :raises RuntimeError: the interpreter is ending, and starts none
        """
        with contextlib.suppress(IndexError):
            self._unstarted.pop()
            self.thread = self._spawn(self._role, self._run)

    def is_ours(self) -> bool:
        """Whether its thread is this process's, and not that of a parent."""
        return self._pid == os.getpid()

    def waiting(self) -> int:
        """Count the calls that wait, more or less."""
        return self._calls.qsize()

    def call(self, function: Call) -> None:
        """Have something called soon, also after `stop`, and also in a forked child."""
        if not self.is_ours():  # the thread, and maybe the queue's lock, is the parent's
            self._make(function)
            return
        self._calls.put(function)
        if self._ended:
            try:
                self._spawn(self._role, self._make_all)
            except RuntimeError:  # the interpreter is ending
                self._make_all()

    def stop(self) -> None:
        """End the thread once it has made the calls that are due."""
        self._calls.put(None)

    def after_call(self) -> None:
        """Do what is to be done whenever a call was made."""

    def _run(self) -> None:
        while (function := self._calls.get(timeout=None)) is not None:
            self._make(function)
        self._ended = True  # from here on `call` sees to it, and what came before is made here
        self._make_all()
        self._lines.close()

    def _make_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                function = self._calls.get_nowait()
                if function is not None:
                    self._make(function)

    def _make(self, function: Call) -> None:
        error = guarded(function)
        if error is not None:
            self._lines.log(logging.ERROR, "a callback raised", error=error)
        self.after_call()


class EventLane(Lane):
    """The lane of events, which are left out while too many wait.

    :param dropped: is told of each that is left out
    """

    def __init__(self, spawn: Spawn, dropped: Call) -> None:
        super().__init__("events", spawn)
        self._on_drop = dropped
        self._dropped = Cells(catalog.EVENTS_DROPPED)  # counts for several threads at once
        self._told = 0
        self._may_begin = [None]  # held by nobody while events are being left out

    def call(self, function: Call) -> None:
        """Have a callback called, unless too many wait."""
        if self._may_begin and self.waiting() < MAX_QUEUED:
            super().call(function)
            return
        self._dropped.inc()
        self._on_drop()
        with contextlib.suppress(IndexError):
            self._may_begin.pop()
            self._lines.log(logging.ERROR, "callbacks are too slow: leaving out events")

    def after_call(self) -> None:
        """Take events again once half of the queue is done, and say how many were left out."""
        if not self._may_begin and self.waiting() <= CAUGHT_UP:
            before, self._told = self._told, int(self._dropped.total()[0])
            fields = "left_out=%d"
            self._lines.log(logging.ERROR, "callbacks have caught up", fields, self._told - before)
            self._may_begin.append(None)


def _nothing() -> None:
    """Note nothing."""


class Dispatcher:
    """What calls users back: a lane for events, one for futures, one for spans.

    The first two have their threads from the start, since late in a program's life Python starts
    none. The third has one where something is traced.

    :param dropped: is told of each event that is left out
    :ivar awaited: futures that will make calls, kept although nothing else may hold them
    """

    def __init__(self, spawn: Spawn, dropped: Call = _nothing) -> None:
        self.events = EventLane(spawn, dropped)
        self.futures = Lane("futures", spawn)
        self.spans = Lane("spans", spawn)
        self.awaited: set[Future[Receipt]] = set()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that have been started."""
        send_queue = (self.events, self.futures, self.spans)
        return [lane.thread for lane in send_queue if lane.thread is not None]

    def start(self) -> None:
        """Start the threads that every producer has.

        :raises RuntimeError: the interpreter is ending, and starts none
        """
        self.events.start()
        self.futures.start()

    def traces(self) -> Lane:
        """Return the lane of spans, or that of futures where no thread can be started any more."""
        try:
            self.spans.start()
        except RuntimeError:
            return self.futures
        return self.spans if self.spans.thread is not None else self.futures

    def stop(self) -> None:
        """End the threads once they have made the calls that are due."""
        for lane in (self.events, self.futures, self.spans):
            lane.stop()


class Callbacks:
    """Who wants to be called at which event."""

    def __init__(self) -> None:
        self._of: dict[EventName, list[Callable[[Event], object]]] = {name: [] for name in EVENTS}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, event: EventName, callback: Callable[..., object]) -> None:
        """Call ``callback`` with an `Event`, or with nothing where it takes nothing.

        :raises ValueError: there is no such event
        :raises TypeError: the callback cannot be called
        """
        if event not in EVENTS:
            raise ValueError(f"event must be one of {', '.join(EVENTS)}")
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        self._of[event].append(_accepting_event(callback))

    def of(self, event: EventName) -> list[Callable[[Event], object]]:
        """Give those who want to be called at an event."""
        return self._of[event]


class CallbackSink(EventSink):
    """Tells users' callbacks."""

    def __init__(self, callbacks: Callbacks, dispatcher: Dispatcher) -> None:
        self._callbacks = callbacks
        self._dispatcher = dispatcher
        self._blocked = False

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
        if state in _CIRCUIT_EVENTS:
            self._tell(Event(_CIRCUIT_EVENTS[state]))

    def connected(self, address: str) -> None:
        """Tell, with the broker's address."""
        self._tell(Event("connected", detail=address))

    def disconnected(self, loss: Loss) -> None:
        """Tell, with the reason; what the broker blocked is blocked no more."""
        self._tell(Event("disconnected", detail=loss.text))
        if self._blocked:
            self.flow_changed(blocked=False, reason="disconnected")

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Tell, with the reason of the last failure."""
        self._tell(Event("gave_up", detail=loss.text))

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Tell, with the broker's reason."""
        self._blocked = blocked
        self._tell(Event("blocked" if blocked else "unblocked", detail=reason))

    def refused(self, message_id: str, error: PublishError) -> None:
        """Tell, with the reason's name."""
        self._tell(Event("refused", message_id, type(error).__name__))

    def _tell(self, event: Event) -> None:
        for callback in self._callbacks.of(event.name):
            self._dispatcher.events.call(partial(callback, event))


class DeliveryFuture(Fate):
    """A future that carries its message's id and calls back off the I/O thread."""

    message_id: str

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def add_done_callback(self, fn: Callable[[Future[Receipt]], object]) -> None:
        """Call ``fn`` once the message's fate is known; at once where it is known already."""
        if not self.done():
            self._dispatcher.awaited.add(self)
        super().add_done_callback(partial(self._call_back, fn))

    def _call_back(self, fn: Callable[[Future[Receipt]], object], future: Future[Receipt]) -> None:
        self._dispatcher.awaited.discard(self)
        self._dispatcher.futures.call(partial(fn, future))


def _accepting_event(callback: Callable[..., object]) -> Callable[[Event], object]:
    try:
        inspect.signature(callback).bind(None)
    except TypeError:
        return lambda _event: callback()
    except ValueError:  # a builtin without a signature
        return callback
    return callback
