"""What is counted when, and what Prometheus is shown of it."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve, field, mutable
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from mlproducer import (
    CeleryTask,
    CircuitState,
    ConnectionState,
    EmbeddingBatchTask,
    Message,
    Status,
    SummarizationTask,
)
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AttemptState
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer.errors import (
    BrokerBlockedError,
    BrokerRejectedError,
    CircuitOpenError,
    ConfirmTimeoutError,
    InvalidMessageError,
    InvalidTaskError,
    MessageTooLargeError,
    MLProducerError,
    NackError,
    ProducerClosedError,
    PublishError,
    StoreError,
    UnroutableError,
)
from mlproducer.message import Envelope
from mlproducer.observe import metric_families as catalog
from mlproducer.observe import metrics
from mlproducer.observe.counters import Cells
from mlproducer.observe.metric_families import FAMILIES, Kind
from mlproducer.observe.producer_metrics import ProducerMetrics
from mlproducer.observe.sinks import Sink
from tests.helpers import make_delivery

CONTRACT = {
    "connection_state": ("gauge", ()),
    "reconnect_attempts": ("gauge", ()),
    "retry_queue_size": ("gauge", ()),
    "pending_confirms": ("gauge", ()),
    "connection_blocked": ("gauge", ()),
    "circuit_breaker_open": ("gauge", ()),
    "circuit_breaker_state": ("gauge", ()),
    "circuit_breaker_failures": ("gauge", ()),
    "dead_letters": ("gauge", ()),
    "outbox_rows": ("gauge", ()),
    "outbox_oldest_seconds": ("gauge", ()),
    "queue_depth": ("gauge", ("queue_name",)),
    "tasks_sent_total": ("counter", ("task_type", "status")),
    "task_retries_total": ("counter", ("task_type",)),
    "connection_errors_total": ("counter", ("error_type",)),
    "connection_state_changes_total": ("counter", ("state",)),
    "confirm_timeouts_total": ("counter", ()),
    "late_confirms_total": ("counter", ()),
    "nacks_total": ("counter", ()),
    "returns_total": ("counter", ()),
    "dead_lettered_total": ("counter", ()),
    "possible_duplicates_total": ("counter", ()),
    "health_check_failures_total": ("counter", ()),
    "circuit_breaker_trips_total": ("counter", ()),
    "store_errors_total": ("counter", ()),
    "events_dropped_total": ("counter", ()),
    "celery_tasks_total": ("counter", ("way",)),
    "task_publish_duration_seconds": ("histogram", ("task_type", "status")),
    "message_size_bytes": ("histogram", ()),
    "reconnect_duration_seconds": ("histogram", ()),
}
"""The documented metrics: names, types, labels."""

SENT, DURATION = "ml_producer_tasks_sent_total", "ml_producer_task_publish_duration_seconds"
DISCONNECTED, CONNECTED, CLOSED = (
    ConnectionState.DISCONNECTED,
    ConnectionState.CONNECTED,
    ConnectionState.CLOSED,
)


@mutable(eq=False)
class Producer:
    """Stands in for a producer, as far as gauges look."""

    state: Status = field(factory=lambda: Status(connection_state=CONNECTED))

    def status(self) -> Status:
        """Return what the test has set."""
        return self.state

    def set(self, **changes: Any) -> None:
        """Change some of it."""
        self.state = evolve(self.state, **changes)


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def meter(registry: CollectorRegistry) -> ProducerMetrics:
    """The meter of the test's registry."""
    return metrics.meter(registry)


@pytest.fixture
def sink(meter: ProducerMetrics) -> Sink:
    """The sink of one engine."""
    return meter.sink()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """Return one series' value, by its documented name."""
    return registry.get_sample_value(f"ml_producer_{name}", labels)


def sent(registry: CollectorRegistry) -> Mapping[tuple[str, str], float]:
    """Return what is counted of messages, by task type and status."""
    samples = metrics.samples(registry)
    return {(lab["task_type"], lab["status"]): n for name, lab, n in samples if name == SENT}


def of_type(task_type: str, *, started: float = 0.0, body: bytes = b"body") -> Delivery:
    """Return a delivery of a task type."""
    envelope = Envelope("m", task_type, "x", "k", b"", body)
    return Delivery(envelope, Future(), started=started, deadline=5.0)


# --- the families ------------------------------------------------------------------------------


def test_families_are_the_documented_ones() -> None:
    """The catalog has the documented names, types and labels, and no others."""
    listed = {f.name.removeprefix("ml_producer_"): (f.kind.value, f.labels) for f in FAMILIES}
    assert listed == CONTRACT


def test_complete_before_the_first_publish(
    registry: CollectorRegistry, meter: ProducerMetrics
) -> None:
    """Every family is there at once, those without labels with their series, at zero."""
    producer = Producer(Status(connection_state=DISCONNECTED))
    meter.watch(producer.status)
    shown = {
        family.name: family
        for family in text_string_to_metric_families(metrics.exposition(registry).decode())
    }
    assert shown.keys() == {f.name.removesuffix("_total") for f in FAMILIES}
    for family in FAMILIES:
        found = shown[family.name.removesuffix("_total")]
        assert (found.type, found.documentation) == (family.kind.value, family.help)
        assert bool(found.samples) == (not family.labels)
        expected = 1.0 if family is catalog.CONNECTION_STATE else 0.0
        assert {sample.value for sample in found.samples} <= {expected}


def test_buckets_reach_beyond_the_timeouts() -> None:
    """A publish that took longer than its timeout of 5 s is told from one that took minutes."""
    for family in FAMILIES:
        assert (family.kind is Kind.HISTOGRAM) == bool(family.buckets)
        assert list(family.buckets) == sorted(set(family.buckets))
    assert {5, 60} <= set(catalog.DURATIONS)
    assert max(catalog.DURATIONS) > 60


def test_foreign_metric_of_the_same_name(registry: CollectorRegistry) -> None:
    """A name that is taken already is an error each time, not half a set of families."""
    Counter("ml_producer_nacks", "another's", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="ml_producer_nacks"):
            metrics.meter(registry)


# --- each message once -------------------------------------------------------------------------


def test_confirmed(registry: CollectorRegistry, sink: Sink) -> None:
    """A burst is counted by its task types, with durations and sizes in their buckets."""
    burst = [of_type("a", started=8.0), of_type("b", body=b"x" * 1025), of_type("a", started=9.8)]
    sink.take(events.Confirmed(burst, 10.0))
    assert sent(registry) == {("a", "success"): 2, ("b", "success"): 1}
    labels = {"task_type": "a", "status": "success"}
    within = {
        bound: value(registry, "task_publish_duration_seconds_bucket", le=bound, **labels)
        for bound in ("0.1", "0.25", "1.0", "2.5", "+Inf")
    }
    assert within == {"0.1": 0, "0.25": 1, "1.0": 1, "2.5": 2, "+Inf": 2}
    assert value(registry, "task_publish_duration_seconds_sum", **labels) == pytest.approx(2.2)
    assert value(registry, "task_publish_duration_seconds_count", **labels) == 2
    assert value(registry, "message_size_bytes_bucket", le="1024.0") == 2
    assert value(registry, "message_size_bytes_count") == 3
    assert value(registry, "message_size_bytes_sum") == 1033


def test_bounds_belong_to_their_bucket(registry: CollectorRegistry, sink: Sink) -> None:
    """A bucket holds what is less than its bound or equal to it, as ``le`` says."""
    sink.take(events.Confirmed([of_type("a", body=b"x" * n) for n in (256, 257)], 0.0))
    assert value(registry, "message_size_bytes_bucket", le="256.0") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NackError(), "rejected"),
        (BrokerRejectedError(), "rejected"),
        (BrokerBlockedError(), "rejected"),
        (ProducerClosedError(), "rejected"),
        (StoreError(), "rejected"),
        (CircuitOpenError(), "circuit_breaker_open"),
        (MessageTooLargeError(), "validation_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_given_back(
    registry: CollectorRegistry, sink: Sink, error: PublishError, status: str
) -> None:
    """A message given back counts once, by the reason, and its duration with it."""
    sink.take(events.Failed(of_type("a"), error))
    assert sent(registry) == {("a", status): 1}
    labels = {"task_type": "a", "status": status}
    assert value(registry, "task_publish_duration_seconds_count", **labels) == 1


def test_dead_lettered(registry: CollectorRegistry, sink: Sink) -> None:
    """A dead letter is the one failure, however many attempts there were."""
    delivery = of_type("a")
    for _ in range(4):
        sink.take(events.AttemptFailed(delivery, NackError()))
    sink.take(events.DeadLettered(delivery))
    assert sent(registry) == {("a", "failure"): 1}
    assert value(registry, "dead_lettered_total") == 1
    assert value(registry, "nacks_total") == 4


@pytest.mark.parametrize(
    ("task", "error", "labels"),
    [
        (object(), InvalidMessageError(), ("unknown", "validation_error")),
        ({"task_type": "forged"}, InvalidMessageError(), ("unknown", "validation_error")),
        (None, InvalidMessageError(), ("unknown", "validation_error")),
        (Message(body=b"", routing_key="k"), MessageTooLargeError(), ("raw", "validation_error")),
        (
            CeleryTask("reports.build", [], {}, "k"),
            InvalidMessageError(),
            ("reports.build", "validation_error"),
        ),
        (SummarizationTask, InvalidTaskError(), ("summarize_llm", "validation_error")),
        (EmbeddingBatchTask, InvalidTaskError(), ("embed_vectors", "validation_error")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused(
    registry: CollectorRegistry,
    meter: ProducerMetrics,
    task: object,
    error: MLProducerError,
    labels: tuple[str, str],
) -> None:
    """What is not accepted counts under the type of its task, and of no task where it is none."""
    meter.refused(task, error)
    assert sent(registry) == {labels: 1}


def test_types_without_end(registry: CollectorRegistry, sink: Sink) -> None:
    """A user who makes up names gets a hundred series, and one more for all the others."""
    for n in range(1000):
        sink.take(events.Confirmed([of_type(f"task-{n}")], 0.0))
        sink.take(events.Retried(of_type(f"task-{n}")))
    counted = sent(registry)
    assert len(counted) == 101
    assert counted["task-99", "success"] == 1
    assert counted["other", "success"] == 900
    assert value(registry, "task_retries_total", task_type="other") == 900


@pytest.mark.parametrize("name", ["", "\ud800", "a\nb", "x" * 201])
def test_types_that_are_no_label(registry: CollectorRegistry, sink: Sink, name: str) -> None:
    """A name that would break a scrape, or fill it, is among the others; the rest is shown."""
    sink.take(events.Confirmed([of_type(name)], 0.0))
    assert sent(registry) == {("other", "success"): 1}
    assert metrics.exposition(registry)


# --- the other counters ------------------------------------------------------------------------


def test_what_the_broker_says(registry: CollectorRegistry, sink: Sink) -> None:
    """A nack, a return and a confirm timeout are told apart; what was never written is neither."""
    written, unwritten = make_delivery(), make_delivery()
    written.attempt, unwritten.attempt = AttemptState.LATE, AttemptState.QUEUED
    sink.take(events.AttemptFailed(written, NackError()))
    sink.take(events.AttemptFailed(written, UnroutableError()))
    sink.take(events.AttemptFailed(written, ConfirmTimeoutError()))
    sink.take(events.AttemptFailed(unwritten, ConfirmTimeoutError()))
    sink.take(events.LateConfirm(written))
    sink.take(events.PossibleDuplicate(written))
    for name in ("nacks", "returns", "confirm_timeouts", "late_confirms", "possible_duplicates"):
        assert value(registry, f"{name}_total") == 1, name


def test_connection(
    registry: CollectorRegistry, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and failed attempts count by their kind, a closing does not; outages are measured."""
    now = iter([100.0, 103.0])
    monkeypatch.setattr("mlproducer.observe.producer_metrics.time.monotonic", lambda: next(now))
    sink.take(events.Connected("h:5672"))
    assert value(registry, "reconnect_duration_seconds_count") == 0
    sink.take(events.Disconnected(Loss("", kind=LossKind.HEARTBEAT)))
    sink.take(events.ConnectFailed(Loss("", kind=LossKind.REFUSED)))
    sink.take(events.Connected("h:5672"))
    sink.take(events.Disconnected(Loss("", kind=LossKind.CLOSED)))
    assert value(registry, "connection_errors_total", error_type="heartbeat") == 1
    assert value(registry, "connection_errors_total", error_type="refused") == 1
    assert value(registry, "connection_errors_total", error_type="closed") is None
    assert value(registry, "reconnect_duration_seconds_count") == 1
    assert value(registry, "reconnect_duration_seconds_sum") == 3


def test_states(registry: CollectorRegistry, sink: Sink) -> None:
    """Moves of the connection count by where they lead; of the breaker, only that it opens."""
    for state in ConnectionState:
        sink.take(events.StateChanged(state))
    for circuit in (CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.OPEN):
        sink.take(events.CircuitChanged(circuit))
    sink.take(events.HealthChecked(alive=True))
    sink.take(events.HealthChecked(alive=False))
    sink.take(events.StoreFailed(StoreError()))
    moves = "connection_state_changes_total"
    assert [value(registry, moves, state=each.name) for each in ConnectionState] == [1] * 5
    assert value(registry, "circuit_breaker_trips_total") == 2
    assert value(registry, "health_check_failures_total") == 1
    assert value(registry, "store_errors_total") == 1


def test_closed_label_sets(registry: CollectorRegistry, sink: Sink, meter: ProducerMetrics) -> None:
    """Whatever happens, a label with a closed set has one of the words that the catalog lists."""
    for kind in LossKind:
        sink.take(events.ConnectFailed(Loss("", kind=kind)))
    for state in ConnectionState:
        sink.take(events.StateChanged(state))
    for error in _all_errors(MLProducerError):
        meter.refused(None, error())
    words = {family.name: family.words for family in FAMILIES if family.words}
    for name, labels, _ in metrics.samples(registry):
        for label, allowed in words.get(name, {}).items():
            assert labels[label] in allowed


def _all_errors(root: type[MLProducerError]) -> Iterator[type[MLProducerError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _all_errors(kind)


# --- gauges ------------------------------------------------------------------------------------


def test_gauges_of_one_producer(registry: CollectorRegistry, meter: ProducerMetrics) -> None:
    """Each gauge shows what the status says, at the moment of the scrape."""
    producer = Producer()
    meter.watch(producer.status)
    producer.set(
        reconnect_attempts=2,
        consecutive_failures=3,
        circuit_state=CircuitState.OPEN,
        retry_queue_size=4,
        pending_confirms=5,
        blocked=True,
        dead_letters=6,
    )
    assert value(registry, "connection_state") == 3
    assert value(registry, "reconnect_attempts") == 2
    assert value(registry, "circuit_breaker_failures") == 3
    assert value(registry, "circuit_breaker_open") == 1
    assert value(registry, "circuit_breaker_state") == 1
    assert value(registry, "retry_queue_size") == 4
    assert value(registry, "pending_confirms") == 5
    assert value(registry, "connection_blocked") == 1
    assert value(registry, "dead_letters") == 6
    producer.set(circuit_state=CircuitState.HALF_OPEN)
    assert value(registry, "circuit_breaker_state") == 2
    assert value(registry, "circuit_breaker_open") == 0


def test_producers_that_share_a_registry(
    registry: CollectorRegistry, meter: ProducerMetrics
) -> None:
    """Sizes add up, flags are those of any, the state is the least healthy one of those open."""
    assert metrics.meter(registry) is meter
    first, second, third = Producer(), Producer(), Producer()
    for producer in (first, second, third):
        meter.watch(producer.status)
    first.set(pending_confirms=2, retry_queue_size=1)
    second.set(pending_confirms=3, blocked=True, connection_state=DISCONNECTED)
    third.set(pending_confirms=100, connection_state=CLOSED)
    assert value(registry, "pending_confirms") == 5
    assert value(registry, "retry_queue_size") == 1
    assert value(registry, "connection_blocked") == 1
    assert value(registry, "connection_state") == DISCONNECTED
    second.set(connection_state=CLOSED)
    assert value(registry, "connection_state") == CONNECTED
    first.set(connection_state=CLOSED)
    assert value(registry, "connection_state") == CLOSED
    assert value(registry, "pending_confirms") == 0


def test_stores_that_are_shared(registry: CollectorRegistry, meter: ProducerMetrics) -> None:
    """What several producers see of one durable store counts once; memory stores add up."""
    producers = [Producer() for _ in range(6)]
    for producer, store in zip(producers, ["a.db", "a.db", "b.db", "a.db", "", ""], strict=True):
        meter.watch(producer.status)
        producer.set(retry_queue_size=40, dead_letters=3, store=store)
    producers[0].set(retry_queue_size=39)  # it has asked a moment earlier
    assert value(registry, "retry_queue_size") == 40 + 40 + 40 + 40
    assert value(registry, "dead_letters") == 3 + 3 + 3 + 3


def test_the_package_imported_twice(registry: CollectorRegistry, sink: Sink) -> None:
    """A later import counts on, beside producers of the earlier one, and hides nothing of them."""
    old = Producer(Status(connection_state=CONNECTED, pending_confirms=2, retry_queue_size=4))
    metrics.meter(registry).watch(old.status)
    sink.take(events.Confirmed([of_type("a", started=0.0)], 3.0))
    again, status, its = imported_again(
        "mlproducer.observe.metrics", "mlproducer.status", "mlproducer._core.events"
    )
    second = again.meter(registry)
    assert again.meter(registry) is second is not metrics.meter(registry)
    state = status.ConnectionState.DISCONNECTED
    new = Producer(status.Status(connection_state=state, pending_confirms=1, retry_queue_size=3))
    second.watch(new.status)
    second.sink().take(its.Confirmed([of_type("a"), of_type("b")], 0.0))
    sink.take(events.Confirmed([of_type("a")], 0.0))
    assert sent(registry) == {("a", "success"): 3, ("b", "success"): 1}
    labels = {"task_type": "a", "status": "success"}
    assert value(registry, "task_publish_duration_seconds_count", **labels) == 3
    assert value(registry, "task_publish_duration_seconds_bucket", le="1.0", **labels) == 2
    assert value(registry, "pending_confirms") == 3
    assert value(registry, "connection_state") == DISCONNECTED
    [third] = imported_again("mlproducer.observe.metrics")
    assert third.meter(registry) is not second
    assert sent(registry) == {("a", "success"): 3, ("b", "success"): 1}
    assert list(text_string_to_metric_families(metrics.exposition(registry).decode()))


def imported_again(*names: str) -> list[Any]:
    """Import modules of the package as a test runner does that has forgotten the package."""
    ours = {key: module for key, module in sys.modules.items() if key.startswith("mlproducer")}
    for key in ours:
        del sys.modules[key]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.modules.update(ours)


class Interrupted(dict[int, Any]):
    """A series' cells; when a thread has none yet, a finaliser counts there first."""

    def __init__(self, count: Callable[[], object]) -> None:
        super().__init__()
        self._counts = [count]

    def __missing__(self, thread: int) -> Any:
        if self._counts:
            self._counts.pop()()
        raise KeyError(thread)


def test_first_count_beside_a_finaliser() -> None:
    """The first count of a thread is not lost where a finaliser counts in the middle of it."""
    nacks, sizes = Cells(catalog.NACKS), Cells(catalog.MESSAGE_SIZE)
    nacks._of, sizes._of = Interrupted(nacks.inc), Interrupted(lambda: sizes.observe(1.0))
    nacks.inc()
    sizes.observe(2.0)
    assert nacks.total() == [2.0]
    assert (sizes.total()[0], sizes.total()[-1]) == (2, 3.0)


def test_registries_are_apart(registry: CollectorRegistry, sink: Sink) -> None:
    """What is counted on one registry does not show on another."""
    other = CollectorRegistry()
    metrics.meter(other).sink().take(events.Confirmed([of_type("a")], 0.0))
    assert sent(registry) == {}
    assert sent(other) == {("a", "success"): 1}


def test_an_emptied_registry(registry: CollectorRegistry, sink: Sink) -> None:
    """A registry that a test's fixture has emptied shows everything again with a new producer."""
    sink.take(events.Confirmed([of_type("a")], 0.0))
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)
    assert value(registry, "connection_state") is None
    sink.take(events.Confirmed([of_type("a")], 0.0))
    metrics.meter(registry).sink().take(events.Confirmed([of_type("a")], 0.0))
    assert sent(registry) == {("a", "success"): 3}
    metrics.meter(registry)
    assert value(registry, "connection_state") == ConnectionState.CLOSED


def test_two_threads_at_the_first_use_of_a_registry() -> None:
    """Both get the same meter, also where the second one registers first."""
    found: list[ProducerMetrics] = []

    class Overtaken(CollectorRegistry):
        def register(self, collector: Any) -> None:
            if not found:
                found.append(None)  # type: ignore[arg-type]
                found[0] = metrics.meter(self)
            super().register(collector)

    registry = Overtaken()
    assert metrics.meter(registry) is found[0]
    assert value(registry, "connection_state") == ConnectionState.CLOSED


@pytest.fixture
def what_is_new() -> Iterator[None]:
    """Collections look at what the test makes; the rest of pytest's heap takes them 0.1 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("what_is_new")
def test_dropped_producer(registry: CollectorRegistry, meter: ProducerMetrics) -> None:
    """A producer without references is collected, and shows no more; its counts stay."""
    producer = Producer()
    meter.watch(producer.status)
    producer.set(pending_confirms=7)
    gone = weakref.ref(producer)
    meter.sink().take(events.Confirmed([of_type("a")], 0.0))
    del producer
    gc.collect()
    assert gone() is None
    assert value(registry, "pending_confirms") == 0
    assert sent(registry) == {("a", "success"): 1}


@pytest.mark.usefixtures("what_is_new")
def test_dropped_registry() -> None:
    """A registry without references is collected, with everything that was counted on it."""
    registry = CollectorRegistry()
    meter = metrics.meter(registry)
    gone = weakref.ref(registry)
    del registry, meter
    gc.collect()
    assert gone() is None


def depth(registry: CollectorRegistry, queue: str = "ml.embed") -> float | None:
    """Return what is shown of a queue."""
    return value(registry, "queue_depth", queue_name=queue)


def test_queue_depths(registry: CollectorRegistry, meter: ProducerMetrics, sink: Sink) -> None:
    """The last reading of each queue is shown, for as long as it is one."""
    producer = Producer()
    meter.watch(producer.status)
    sink.take(events.QueueDepth("ml.embed", 3))
    sink.take(events.QueueDepth("ml.summarize", 9))
    sink.take(events.QueueDepth("ml.embed", 4))
    sink.take(events.QueueDepth("ml.transcribe", 1))
    assert (depth(registry), depth(registry, "ml.summarize")) == (4, 9)
    sink.take(events.HealthChecked(alive=True))
    sink.take(events.QueueDepth("ml.summarize", 9))
    sink.take(events.HealthFault("ml.embed", Loss("NOT_FOUND", 404)))
    # "ml.transcribe" is not asked for any more
    shown = [depth(registry, f"ml.{name}") for name in ("embed", "summarize", "transcribe")]
    assert shown == [None, 9, None]
    producer.set(connection_state=CLOSED)
    assert depth(registry, "ml.summarize") is None


@pytest.mark.parametrize("state", [each for each in ConnectionState if each is not CONNECTED])
def test_queue_depth_is_gone_with_its_connection(
    registry: CollectorRegistry, meter: ProducerMetrics, sink: Sink, state: ConnectionState
) -> None:
    """Each connection has readings of its own, of which the greatest is shown."""
    producer, other = Producer(), meter.sink()
    meter.watch(producer.status)
    sink.take(events.QueueDepth("ml.embed", 7))
    other.take(events.QueueDepth("ml.embed", 0))
    assert depth(registry) == 7
    sink.take(events.StateChanged(state))
    assert depth(registry) == 0
    other.take(events.QueueDepth("ml.embed", 2))
    assert depth(registry) == 2
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert depth(registry) is None


class Shown:
    """The files of multiprocess mode: what each gauge shows, and what happens after a write."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.after_write: Callable[[], None] = lambda: None

    def series(self, family: catalog.Family, labels: tuple[str, ...] = ()) -> Any:
        """Return a gauge that can be written."""

        def write(value: float) -> None:
            self.values[family.name] = value
            self.after_write()

        return SimpleNamespace(begin=lambda: None, set=write, inc=lambda: None)


@mutable(eq=False)
class Moving:
    """A producer whose state is set by the test."""

    state: ConnectionState = ConnectionState.DISCONNECTED

    def status(self) -> Status:
        """Say how things stand."""
        return Status(connection_state=self.state)


def test_a_gauge_is_not_written_over_by_what_was_read_before() -> None:
    """A connection that moves while its gauges are written is shown where it is now."""
    shown, producer = Shown(), Moving()
    meter = metrics._FileMetrics(shown, metrics._Writer())  # type: ignore[arg-type]
    meter.watch(producer.status)

    def connect() -> None:
        producer.state = ConnectionState.CONNECTED

    shown.after_write = connect
    meter.refresh()
    assert shown.values[catalog.CONNECTION_STATE.name] == ConnectionState.CONNECTED


def test_a_queue_that_is_not_read_any_more_is_zero_in_a_file() -> None:
    """A series cannot be taken out of a file; with its connection gone, a queue's shows nothing."""
    shown, producer = Shown(), Moving(ConnectionState.CONNECTED)
    meter = metrics._FileMetrics(shown, metrics._Writer())  # type: ignore[arg-type]
    meter.watch(producer.status)
    sink = meter.sink()
    sink.take(events.QueueDepth("ml.embed", 7))
    meter.refresh()
    assert shown.values[catalog.QUEUE_DEPTH.name] == 7
    producer.state = ConnectionState.DISCONNECTED
    sink.take(events.StateChanged(ConnectionState.DISCONNECTED))
    assert shown.values[catalog.QUEUE_DEPTH.name] == 0


def test_files_that_cannot_be_written_are_told_a_few_times(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Gauges that cannot be written, and refusals that cannot be counted, raise nothing."""
    shown, producer = Shown(), Moving(ConnectionState.CONNECTED)
    meter = metrics._FileMetrics(shown, metrics._Writer())  # type: ignore[arg-type]
    meter.watch(producer.status)

    def fail() -> None:
        raise OSError("a path that stays where it is")

    shown.after_write = fail
    for _ in range(100):
        meter.refresh()
    lines = {each.getMessage() for each in caplog.records}
    assert lines == {"metrics cannot be written PROMETHEUS_MULTIPROC_DIR: OSError"}
    assert len(caplog.records) < 10
