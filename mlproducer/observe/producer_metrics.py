"""Count events, and read gauges; `mlproducer.observe.metrics` passes them to prometheus-client.

Each message is counted once, when its fate is known, and before its publisher gets the answer.

Runs on: events arrive on the thread on which they happen; gauges are read on any.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.events import Event
from mlproducer._core.interfaces import LossKind
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.errors import (
    CircuitOpenError,
    ConfirmTimeoutError,
    InvalidMessageError,
    InvalidTaskError,
    NackError,
    UnroutableError,
)
from mlproducer.message import Message
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.counters import Counts, Labels, Series
from mlproducer.observe.metric_families import Family, Merge
from mlproducer.observe.sinks import Sink, Table
from mlproducer.status import Status
from mlproducer.tasks import CeleryTask, MLTask

MAX_NAME = 200
"""Characters that a task type may have to get a series of its own."""


class ProducerMetrics:
    """The metrics of the producers that share a registry.

    :ivar counts: where counters and histograms are kept
    """

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self._statuses: dict[weakref.WeakMethod[Callable[[], Status]], None] = {}
        self._task_types: dict[str, str] = {}
        self._admitted = itertools.count()
        self._depths: dict[weakref.ref[MetricsSink], dict[str, int]] = {}

    def watch(self, status: Callable[[], Status], *, durable: bool = False) -> None:
        """Read a producer's gauges for as long as it is alive.

        :param status: a method of the producer, which gives its status without I/O
        :param durable: its messages wait in a store that other producers may share
        """
        self._statuses[weakref.WeakMethod(status, self._forget)] = None

    def sink(self) -> Sink:
        """Return a sink for the events of one connection."""
        return MetricsSink(self)

    def refused(self, task: object, error: Exception) -> None:
        """Count a task that was refused before it became a delivery.

        :param task: the task, or its class where it could not be made
        """
        labels = (self.task_type(_name_of(task)), status_of(error))
        self.counts.series(catalog.TASKS_SENT, labels).inc()

    def task_type(self, name: str) -> str:
        """Return the label for a task type, ``other`` beyond a limit: users choose the names."""
        label = self._task_types.get(name)
        return self._admit(name) if label is None else label

    def depths_of(self, sink: MetricsSink) -> dict[str, int]:
        """Return a dict for the queue depths that a connection reads, kept as long as its sink."""
        return self._depths.setdefault(weakref.ref(sink, self._forget_depths), {})

    def readings(self) -> Mapping[Family, Mapping[Labels, float]]:
        """Return the value of every gauge."""
        alive = [status() for status in self._statuses.copy()]
        statuses = [status() for status in alive if status is not None]
        is_open = [s for s in statuses if s.connection_state is not ConnectionState.CLOSED]
        readings: dict[Family, Mapping[Labels, float]] = {
            family: {(): _merge(family, is_open)} for family in _READ
        }
        readings[catalog.QUEUE_DEPTH] = self._read_depths() if is_open else {}
        return readings

    def _read_depths(self) -> Mapping[Labels, float]:
        greatest: dict[Labels, float] = {}
        for depths in list(self._depths.values()):
            for queue, messages in list(depths.items()):
                greatest[(queue,)] = max(messages, greatest.get((queue,), 0.0))
        return greatest

    def refresh(self) -> None:
        """Write the gauges, where they cannot be read when they are scraped."""

    def forked(self) -> None:
        """Start from zero, in a forked child, whose parent continues counting."""
        self._task_types, self._admitted = {}, itertools.count()
        self._depths = {}  # those are of the parent's connections

    def _admit(self, name: str) -> str:
        presentable = 0 < len(name) <= MAX_NAME and name.isprintable()
        if not presentable or next(self._admitted) >= catalog.MAX_TASK_TYPES:
            return catalog.OTHER
        return self._task_types.setdefault(name, name)

    def _forget(self, status: weakref.WeakMethod[Callable[[], Status]]) -> None:
        self._statuses.pop(status, None)

    def _forget_depths(self, sink: weakref.ref[MetricsSink]) -> None:
        self._depths.pop(sink, None)


def _failed_attempt(event: events.AttemptFailed) -> tuple[Family, Labels] | None:
    """Count nacks, returns and confirm timeouts."""
    if isinstance(event.error, NackError):
        return catalog.NACKS, ()
    if isinstance(event.error, UnroutableError):
        return catalog.RETURNS, ()
    if isinstance(event.error, ConfirmTimeoutError) and event.delivery.in_flight:
        return catalog.CONFIRM_TIMEOUTS, ()
    return None


COUNTED: Mapping[type[Event], Callable[[Any], tuple[Family, Labels] | None]] = {
    events.AttemptFailed: _failed_attempt,
    events.LateConfirm: lambda _event: (catalog.LATE_CONFIRMS, ()),
    events.PossibleDuplicate: lambda _event: (catalog.POSSIBLE_DUPLICATES, ()),
    events.ConnectFailed: lambda event: (catalog.CONNECTION_ERRORS, (event.loss.kind.value,)),
    events.CircuitChanged: lambda event: (
        (catalog.CIRCUIT_BREAKER_TRIPS, ()) if event.state is CircuitState.OPEN else None
    ),
    events.StoreFailed: lambda _event: (catalog.STORE_ERRORS, ()),
    events.EventDropped: lambda _event: (catalog.EVENTS_DROPPED, ()),
}
"""The counter, with its labels, of each kind of event that is only counted."""


class MetricsSink(Sink):
    """Counts the events of one connection."""

    def __init__(self, meter: ProducerMetrics) -> None:
        self._meter = meter
        self._task_type = meter.task_type
        self._series = meter.counts.series
        self._sizes = self._series(catalog.MESSAGE_SIZE)
        self._successes: dict[str, tuple[Series, Series]] = {}
        self._lost_at: float | None = None
        self._depths = meter.depths_of(self)
        self._unread: set[str] = set()

    def table(self) -> Table:
        """Return what counts the events."""
        return {
            **dict.fromkeys(COUNTED, self._count_event),
            events.Confirmed: self._confirmed,
            events.DeadLettered: self._dead_lettered,
            events.Failed: self._failed,
            events.Retried: self._retried,
            events.Connected: self._connected,
            events.Disconnected: self._disconnected,
            events.StateChanged: self._state_changed,
            events.HealthChecked: self._health_checked,
            events.HealthFault: self._health_fault,
            events.QueueDepth: self._queue_depth,
        }

    def _count_event(self, event: Event) -> None:
        counted = COUNTED[type(event)](event)
        if counted is not None:
            self._series(*counted).inc()

    def _count(self, family: Family, *labels: str) -> None:
        self._series(family, labels).inc()

    # --- messages ------------------------------------------------------------------------------

    def _confirmed(self, event: events.Confirmed) -> None:
        """Count each message, those of a task type together."""
        deliveries, now = event
        if len(deliveries) == 1:
            [delivery] = deliveries
            task_type = delivery.envelope.task_type
            sent, took = self._successes.get(task_type) or self._success(task_type)
            sent.inc()
            took.observe(now - delivery.started)
            self._sizes.observe(len(delivery.envelope.body))
            return
        waits: dict[str, list[float]] = {}
        for delivery in deliveries:
            waits.setdefault(delivery.envelope.task_type, []).append(now - delivery.started)
        for task_type, some in waits.items():
            sent, took = self._successes.get(task_type) or self._success(task_type)
            sent.inc(len(some))
            took.observe_all(some)
        self._sizes.observe_all([len(delivery.envelope.body) for delivery in deliveries])

    def _dead_lettered(self, event: events.DeadLettered) -> None:
        """Count the message as failed."""
        self._count(catalog.DEAD_LETTERED)
        self._ended(event.delivery, "failure")

    def _failed(self, event: events.Failed) -> None:
        """Count the message by the error."""
        self._ended(event.delivery, status_of(event.error))

    def _retried(self, event: events.Retried) -> None:
        """Count retries by task type."""
        self._count(catalog.TASK_RETRIES, self._task_type(event.delivery.envelope.task_type))

    def _success(self, task_type: str) -> tuple[Series, Series]:
        """Return the series of confirmed messages, and cache them unless the label is ``other``."""
        label = self._task_type(task_type)
        found = self._ends(label, "success")
        if label == task_type:
            self._successes[task_type] = found
        return found

    def _ended(self, delivery: Delivery, status: str) -> None:
        sent, took = self._ends(self._task_type(delivery.envelope.task_type), status)
        sent.inc()
        took.observe(time.monotonic() - delivery.started)

    def _ends(self, task_type: str, status: str) -> tuple[Series, Series]:
        labels = (task_type, status)
        return (
            self._series(catalog.TASKS_SENT, labels),
            self._series(catalog.TASK_PUBLISH_DURATION, labels),
        )

    # --- connections ---------------------------------------------------------------------------

    def _connected(self, _event: events.Connected) -> None:
        """Measure how long there was no connection."""
        lost_at, self._lost_at = self._lost_at, None
        if lost_at is not None:
            self._series(catalog.RECONNECT_DURATION).observe(time.monotonic() - lost_at)

    def _disconnected(self, event: events.Disconnected) -> None:
        """Count the loss, unless the producer closed the connection itself."""
        if event.loss.kind is not LossKind.CLOSED:
            self._lost_at = time.monotonic()
            self._count(catalog.CONNECTION_ERRORS, event.loss.kind.value)

    def _state_changed(self, event: events.StateChanged) -> None:
        """Count changes by the new state; forget queue depths, which only a connection can read."""
        if event.state is not ConnectionState.CONNECTED:
            self._depths.clear()
        self._count(catalog.CONNECTION_STATE_CHANGES, event.state.name)
        self._meter.refresh()

    def _health_checked(self, event: events.HealthChecked) -> None:
        """Count failures; after an answer, all known queues are to be read."""
        self._unread = set(self._depths)
        if not event.alive:
            self._count(catalog.HEALTH_CHECK_FAILURES)

    def _queue_depth(self, event: events.QueueDepth) -> None:
        """Set the depth of a queue."""
        self._unread.discard(event.queue)
        self._depths[event.queue] = event.messages

    def _health_fault(self, event: events.HealthFault) -> None:
        """Forget the depth of a queue that cannot be read, and of those that follow it.

        A refusal ends the health check; the next one continues with the others.
        """
        for queue in {event.target, *self._unread}:
            self._depths.pop(queue, None)


def _name_of(task: object) -> str:
    if isinstance(task, (MLTask, CeleryTask, Message)) or (
        isinstance(task, type) and issubclass(task, MLTask)
    ):
        return task.task_type
    return catalog.UNKNOWN


def status_of(error: Exception) -> str:
    """Return the label ``status`` of a message that was refused."""
    if isinstance(error, CircuitOpenError):
        return "circuit_breaker_open"
    if isinstance(error, (InvalidMessageError, InvalidTaskError)):
        return "validation_error"
    return "rejected"


_CIRCUIT_NUMBERS = {CircuitState.CLOSED: 0, CircuitState.OPEN: 1, CircuitState.HALF_OPEN: 2}

_READ: dict[Family, Callable[[Status], float]] = {
    catalog.CONNECTION_STATE: lambda status: status.connection_state,
    catalog.RECONNECT_ATTEMPTS: lambda status: status.reconnect_attempts,
    catalog.RETRY_QUEUE_SIZE: lambda status: status.retry_queue_size,
    catalog.PENDING_CONFIRMS: lambda status: status.pending_confirms,
    catalog.CONNECTION_BLOCKED: lambda status: status.blocked,
    catalog.CIRCUIT_BREAKER_OPEN: lambda status: status.circuit_breaker_open,
    catalog.CIRCUIT_BREAKER_STATE: lambda status: _CIRCUIT_NUMBERS[status.circuit_state],
    catalog.CIRCUIT_BREAKER_FAILURES: lambda status: status.consecutive_failures,
    catalog.DEAD_LETTERS: lambda status: status.dead_letters,
    catalog.OUTBOX_ROWS: lambda status: status.outbox_rows,
    catalog.OUTBOX_OLDEST: lambda status: status.outbox_oldest,
}


def _merge(family: Family, statuses: Sequence[Status]) -> float:
    read = _READ[family]
    if family.merge is Merge.BY_STORE:
        return _sum_over_stores(read, statuses)
    values = [float(read(status)) for status in statuses]
    if family.merge is Merge.SUM:
        return sum(values)
    if family.merge is Merge.GREATEST:
        return max(values, default=0.0)
    return min(values, default=float(ConnectionState.CLOSED))


def _sum_over_stores(read: Callable[[Status], float], statuses: Sequence[Status]) -> float:
    """Add up the rows of all stores, counting a durable store that producers share once."""
    in_memory, durable = 0.0, dict[str, float]()
    for status in statuses:
        if status.store:
            durable[status.store] = max(read(status), durable.get(status.store, 0.0))
        else:
            in_memory += read(status)
    return in_memory + sum(durable.values())
