"""Every metric family: names, kinds, labels, buckets.

`mlproducer.observe.producer_metrics` counts them. A test holds the dashboard and the alert rules
against this list.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from attrs import field, frozen

from mlproducer._core.interfaces import LossKind
from mlproducer._core.states import ConnectionState

PREFIX = "ml_producer_"

STATUSES = ("success", "failure", "circuit_breaker_open", "validation_error", "rejected")
"""How a message can end: confirmed, dead-lettered, or refused for one of three reasons."""

OTHER, UNKNOWN = "other", "unknown"
"""The labels for task types beyond the limit, and for what is not a task."""

MAX_TASK_TYPES = 100
"""How many task types, whose names are users' own, get a series of their own."""

DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SIZES = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216)
OUTAGES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Kind(enum.Enum):
    """The type of a family, as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(enum.Enum):
    """How a gauge is merged over several producers or processes, as prometheus-client names it.

    BY_STORE is the sum over stores: a memory store belongs to one producer, while each producer
    that shares a durable store sees all of it, so of these the greatest number counts.
    """

    SUM = "sum"
    LEAST = "min"
    GREATEST = "max"
    BY_STORE = "by store"


def _frozen_copy(words: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType(dict(words))


@frozen(eq=False)
class Family:
    """One metric family.

    :ivar name: the full name, as in queries; the series of a histogram add ``_bucket``, ``_sum``
        and ``_count``
    :ivar labels: names of labels; a family without labels has its series from the start
    :ivar words: the values of the labels that have a closed set
    :ivar buckets: upper bounds of a histogram, without ``+Inf``
    :ivar merge: how a gauge is merged
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]] = field(converter=_frozen_copy)
    buckets: tuple[float, ...] = ()
    merge: Merge = Merge.SUM


def _counter(
    name: str, text: str, *labels: str, words: Mapping[str, tuple[str, ...]] | None = None
) -> Family:
    return Family(PREFIX + name, Kind.COUNTER, text, labels, words or {})


def _gauge(name: str, text: str, *labels: str, merge: Merge = Merge.SUM) -> Family:
    return Family(PREFIX + name, Kind.GAUGE, text, labels, {}, merge=merge)


def _histogram(
    name: str,
    text: str,
    *labels: str,
    buckets: tuple[float, ...],
    words: Mapping[str, tuple[str, ...]] | None = None,
) -> Family:
    return Family(PREFIX + name, Kind.HISTOGRAM, text, labels, words or {}, buckets)


CONNECTION_STATE = _gauge(
    "connection_state",
    "State of the connection: 1 disconnected, 2 connecting, 3 connected, 4 closing, 5 closed; "
    "of several producers, the least healthy one that is open",
    merge=Merge.LEAST,
)
RECONNECT_ATTEMPTS = _gauge(
    "reconnect_attempts", "Attempts to connect that failed since the connection was last stable"
)
RETRY_QUEUE_SIZE = _gauge(
    "retry_queue_size",
    "Messages that wait for a retry; of producers that share a durable store, counted once",
    merge=Merge.BY_STORE,
)
PENDING_CONFIRMS = _gauge("pending_confirms", "Messages written and not yet confirmed")
CONNECTION_BLOCKED = _gauge(
    "connection_blocked",
    "Whether the broker blocks publishers: a memory or disk alarm",
    merge=Merge.GREATEST,
)
CIRCUIT_BREAKER_OPEN = _gauge(
    "circuit_breaker_open", "Whether the circuit breaker is open", merge=Merge.GREATEST
)
CIRCUIT_BREAKER_STATE = _gauge(
    "circuit_breaker_state",
    "State of the circuit breaker: 0 closed, 1 open, 2 half-open",
    merge=Merge.GREATEST,
)
CIRCUIT_BREAKER_FAILURES = _gauge(
    "circuit_breaker_failures", "Failures in a row that the circuit breaker has counted"
)
DEAD_LETTERS = _gauge(
    "dead_letters",
    "Dead letters in the store, which the broker has not confirmed",
    merge=Merge.BY_STORE,
)
OUTBOX_ROWS = _gauge(
    "outbox_rows",
    "Rows of a PostgreSQL store that are due and that no process has claimed",
    merge=Merge.BY_STORE,
)
OUTBOX_OLDEST = _gauge(
    "outbox_oldest_seconds",
    "Seconds since the oldest of these rows was accepted; with several stores, the greatest",
    merge=Merge.GREATEST,
)
QUEUE_DEPTH = _gauge(
    "queue_depth",
    "Messages in a queue, as the last health check of a live connection read it; the greatest "
    "of several",
    "queue_name",
    merge=Merge.GREATEST,
)

TASKS_SENT = _counter(
    "tasks_sent_total",
    "Messages by how they ended, each once: confirmed (success), dead-lettered (failure), or "
    "refused with an error",
    "task_type",
    "status",
    words={"status": STATUSES},
)
TASK_RETRIES = _counter("task_retries_total", "Messages written again", "task_type")
CONNECTION_ERRORS = _counter(
    "connection_errors_total",
    "Connections that were lost, and attempts to connect that failed",
    "error_type",
    words={"error_type": tuple(kind.value for kind in LossKind)},
)
CONNECTION_STATE_CHANGES = _counter(
    "connection_state_changes_total",
    "State changes of the connection, by the new state",
    "state",
    words={"state": tuple(state.name for state in ConnectionState)},
)
CONFIRM_TIMEOUTS = _counter(
    "confirm_timeouts_total", "Messages whose publisher's timeout ended before the confirm came"
)
LATE_CONFIRMS = _counter("late_confirms_total", "Confirms that came after a confirm timeout")
NACKS = _counter("nacks_total", "Messages for which the broker refused responsibility")
RETURNS = _counter("returns_total", "Messages that the broker returned: no queue is bound")
DEAD_LETTERED = _counter(
    "dead_lettered_total", "Messages whose dead letter the broker has confirmed"
)
POSSIBLE_DUPLICATES = _counter(
    "possible_duplicates_total", "Messages written again whose earlier fate is unknown"
)
HEALTH_CHECK_FAILURES = _counter(
    "health_check_failures_total", "Health checks that the broker did not answer"
)
CIRCUIT_BREAKER_TRIPS = _counter("circuit_breaker_trips_total", "How often the breaker opened")
STORE_ERRORS = _counter("store_errors_total", "Times that the store could not be used")
EVENTS_DROPPED = _counter(
    "events_dropped_total",
    "Calls of on() callbacks that were dropped because these are too slow",
)
CELERY_TASKS = _counter(
    "celery_tasks_total",
    "Tasks that an app with mlproducer.contrib.celery has sent, by the way that the rollout chose",
    "way",
    words={"way": ("producer", "celery")},
)

TASK_PUBLISH_DURATION = _histogram(
    "task_publish_duration_seconds",
    "Seconds from the publisher's call to the end of an accepted message, retries included",
    "task_type",
    "status",
    buckets=DURATIONS,
    words={"status": STATUSES},
)
MESSAGE_SIZE = _histogram("message_size_bytes", "Bytes of confirmed bodies", buckets=SIZES)
RECONNECT_DURATION = _histogram(
    "reconnect_duration_seconds",
    "Seconds from the loss of a connection to the next one",
    buckets=OUTAGES,
)

FAMILIES: tuple[Family, ...] = tuple(
    family for family in list(globals().values()) if isinstance(family, Family)
)
"""All families, in the order of their definition."""
