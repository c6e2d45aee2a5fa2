"""Call users' callbacks and tracers on threads of their own, so that a slow one delays no message.

Events may come in storms, so their queue is bounded: while too many wait, further ones are dropped.
The calls for futures and spans are as many as there are futures and spans, and are never dropped.

Runs on: events arrive on any thread, mostly the I/O thread; calls are made on the threads
``mlproducer-events``, ``mlproducer-futures`` and ``mlproducer-spans``.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sized
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, get_args

from attrs import frozen

from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.states import CircuitState
from mlproducer._foreign_calls import guarded
from mlproducer._synchronization import LONGEST, Bell
from mlproducer.message import Fate, Receipt
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.counters import Cells
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.observe.sinks import Sink, Table

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
"""Calls for events that may wait; beyond them, events are dropped."""

CAUGHT_UP = MAX_QUEUED // 2
"""Calls that wait when events are accepted again."""

Call = Callable[[], object]
Spawn = Callable[[str, Callable[[], None]], threading.Thread]


@frozen
class Event:
    """An event, as it is passed to callbacks.

    :ivar name: one of `EVENTS`
    :ivar message_id: the id of the message, where the event is about one
    :ivar detail: a reason or an address, free of secrets
    """

    name: EventName
    message_id: str | None = None
    detail: str = ""


def _nothing() -> None:
    """Do nothing."""


class CallbackThread:
    """A thread that makes calls, one after the other, and the queue in which they wait.

    :param role: the last part of the thread's name
    """

    def __init__(self, role: str, spawn: Spawn) -> None:
        self._role = role
        self._spawn = spawn
        self._pid = os.getpid()
        self._calls: deque[Call | None] = deque()
        self._under_way = 0  # is still the first of them
        self._bell = Bell()
        self._unstarted = [None]
        self._ended = False
        self._lines = LimitedLogger(logger)
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once.

        :raises RuntimeError: the interpreter is shutting down, and starts no thread
        """
        # list.pop() is one step under the GIL: of several threads, one starts it.
        with contextlib.suppress(IndexError):
            self._unstarted.pop()
            self.thread = self._spawn(self._role, self._run)

    def is_ours(self) -> bool:
        """Return whether the thread is of this process, and not of a parent."""
        return self._pid == os.getpid()

    def waiting(self) -> int:
        """Return about how many calls wait."""
        return len(self._calls) - self._under_way

    def call(self, function: Call) -> None:
        """Have a function called soon; even after `stop`, and in a forked child."""
        if not self.is_ours():  # the thread is the parent's, and the queue's lock may be taken
            self._make(function)
            return
        self._calls.append(function)
        self._bell.ring()
        if self._ended:  # read after the append: `_run` sets it before it empties the queue
            try:
                self._spawn(self._role, self._make_all)
            except RuntimeError:  # the interpreter is shutting down
                self._make_all()

    def stop(self) -> None:
        """End the thread once it has made the calls that wait."""
        self._calls.append(None)
        self._bell.ring()

    def after_call(self) -> None:
        """Called after each call; subclasses override it."""

    def _run(self) -> None:
        going = True
        while going:
            # Even SystemExit, between two calls, must not end the thread. A call is taken out once
            # it was made, so that none is lost by that.
            with contextlib.suppress(BaseException):
                if not self._calls:
                    self._bell.wait(LONGEST)
                elif (function := self._calls[0]) is None:
                    going = False
                else:
                    self._under_way = 1
                    self._make(function, self._take_out)
        # Set before the queue is emptied: a call that is queued after that sees it.
        self._ended = True
        self._make_all()
        self._lines.close()

    def _take_out(self) -> None:
        self._calls.popleft()
        self._under_way = 0

    def _make_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                function = self._calls.popleft()
                if function is not None:
                    self._make(function)

    def _make(self, function: Call, made: Call = _nothing) -> None:
        error = guarded(function)
        made()
        if error is not None:
            self._lines.log(logging.ERROR, "a callback raised", error=error)
        self.after_call()


class EventThread(CallbackThread):
    """The thread for events, which are dropped while too many wait.

    :param dropped: called for each event that is dropped
    """

    def __init__(self, spawn: Spawn, dropped: Call) -> None:
        super().__init__("events", spawn)
        self._on_drop = dropped
        self._dropped = Cells(catalog.EVENTS_DROPPED)  # several threads count at once
        self._reported = 0
        # Empty while events are being dropped. As with `_unstarted`, the pop() decides which thread
        # logs that it begins; only the events' thread appends.
        self._accepting = [None]

    def call(self, function: Call) -> None:
        """Have a callback called, unless too many calls wait."""
        if self._accepting and self.waiting() < MAX_QUEUED:
            super().call(function)
            return
        self._dropped.inc()
        self._on_drop()
        with contextlib.suppress(IndexError):
            self._accepting.pop()
            self._lines.log(logging.ERROR, "callbacks are too slow: dropping events")

    def after_call(self) -> None:
        """Accept events again once half of the queue is done, and log how many were dropped."""
        if not self._accepting and self.waiting() <= CAUGHT_UP:
            before, self._reported = self._reported, int(self._dropped.total()[0])
            fields = "dropped=%d"
            self._lines.log(
                logging.ERROR, "callbacks have caught up", fields, self._reported - before
            )
            self._accepting.append(None)


class Dispatcher:
    """The callback threads of a producer: for events, for futures, and for spans.

    The first two are started with the producer, since an interpreter that is shutting down starts
    no threads. The third is started with the first span.

    :param dropped: called for each event that is dropped
    :ivar awaited: futures with callbacks, kept alive until these are called
    """

    def __init__(self, spawn: Spawn, dropped: Call = _nothing) -> None:
        self.events = EventThread(spawn, dropped)
        self.futures = CallbackThread("futures", spawn)
        self.spans = CallbackThread("spans", spawn)
        self.awaited: set[Future[Receipt]] = set()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that have been started."""
        every = (self.events, self.futures, self.spans)
        return [each.thread for each in every if each.thread is not None]

    def start(self) -> None:
        """Start the threads that every producer has.

        :raises RuntimeError: the interpreter is shutting down, and starts no thread
        """
        self.events.start()
        self.futures.start()

    def traces(self) -> CallbackThread:
        """Return the thread for spans, or that for futures where none can be started any more."""
        try:
            self.spans.start()
        except RuntimeError:
            return self.futures
        return self.spans if self.spans.thread is not None else self.futures

    def stop(self) -> None:
        """End the threads once they have made the calls that wait."""
        for each in (self.events, self.futures, self.spans):
            each.stop()


class Callbacks:
    """The callbacks for each event."""

    def __init__(self) -> None:
        self._of: dict[EventName, list[Callable[[Event], object]]] = {name: [] for name in EVENTS}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def add(self, event: EventName, callback: Callable[..., object]) -> None:
        """Add a callback, to be called with an `Event`, or without arguments where it takes none.

        :raises ValueError: there is no such event
        :raises TypeError: the callback is not callable
        """
        if event not in EVENTS:
            raise ValueError(f"event must be one of {', '.join(EVENTS)}")
        if not callable(callback):
            raise TypeError(f"callback must be callable, got {type(callback).__name__}")
        self._of[event].append(_accepting_event(callback))

    def of(self, event: EventName) -> list[Callable[[Event], object]]:
        """Return the callbacks for an event."""
        return self._of[event]


CALLED: Mapping[type[events.Event], Callable[[Any], Event | None]] = {
    events.Connected: lambda event: Event("connected", detail=event.address),
    events.GaveUp: lambda event: Event("gave_up", detail=event.loss.text),
    events.CircuitChanged: lambda event: (
        Event(_CIRCUIT_EVENTS[event.state]) if event.state in _CIRCUIT_EVENTS else None
    ),
    events.Deferred: lambda event: _of_message("deferred", event.delivery),
    events.DeadLettered: lambda event: _of_message("dead_lettered", event.delivery),
    events.Refused: lambda event: Event("refused", event.message_id, type(event.error).__name__),
}
"""What callbacks get of each kind of event."""


def _of_message(name: EventName, delivery: Delivery) -> Event:
    return Event(name, delivery.envelope.message_id, type(delivery.reason).__name__)


class CallbackSink(Sink):
    """Has users' callbacks called at events."""

    def __init__(self, callbacks: Callbacks, dispatcher: Dispatcher) -> None:
        self._callbacks = callbacks
        self._dispatcher = dispatcher
        self._blocked = False

    def table(self) -> Table:
        """Return what calls back."""
        return {
            **dict.fromkeys(CALLED, self._call_back),
            events.Confirmed: self._confirmed,
            events.Disconnected: self._disconnected,
            events.FlowChanged: self._flow_changed,
        }

    def wants(self, kind: type[events.Event]) -> Sized | None:
        """Return the callbacks for what may come with each message; mostly there are none."""
        if kind is events.Confirmed:
            return self._callbacks.of("confirmed")
        return self._callbacks.of("deferred") if kind is events.Deferred else None

    def _call_back(self, event: events.Event) -> None:
        told = CALLED[type(event)](event)
        if told is not None:
            self._call(told)

    def _confirmed(self, event: events.Confirmed) -> None:
        for delivery in event.deliveries:
            self._call(Event("confirmed", delivery.envelope.message_id))

    def _disconnected(self, event: events.Disconnected) -> None:
        """Call back with the reason; a connection that was blocked is no longer."""
        self._call(Event("disconnected", detail=event.loss.text))
        if self._blocked:
            self._flow_changed(events.FlowChanged(blocked=False, reason="disconnected"))

    def _flow_changed(self, event: events.FlowChanged) -> None:
        """Call back with the broker's reason."""
        self._blocked = event.blocked
        self._call(Event("blocked" if event.blocked else "unblocked", detail=event.reason))

    def _call(self, event: Event) -> None:
        for callback in self._callbacks.of(event.name):  # to which `add` may append meanwhile
            self._dispatcher.events.call(partial(callback, event))


class DeliveryFuture(Fate):
    """A future with its message's id, whose callbacks are not called on the I/O thread."""

    message_id: str

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def add_done_callback(self, fn: Callable[[Future[Receipt]], object]) -> None:
        """Call ``fn`` once the message's fate is known; soon, where it is known already."""
        if not self.done():  # and before it is registered, from when on it may be called
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
    except ValueError:  # a built-in function without a signature
        return callback
    return callback
