"""Metrics of whole producers: each message once, before its publisher is told, and none besides."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pika import spec
from prometheus_client import REGISTRY, CollectorRegistry

from mlproducer import ConnectionState, MLProducer, Settings, SummarizationTask
from mlproducer._core import events
from mlproducer.errors import (
    BufferFullError,
    CircuitOpenError,
    InvalidMessageError,
    InvalidTaskError,
    MessageTooLargeError,
    NackError,
    ProducerClosedError,
    PublishError,
    RetriesExhaustedError,
)
from mlproducer.observe import metrics
from mlproducer.observe.counters import Tally
from mlproducer.observe.producer_metrics import ProducerMetrics
from mlproducer.testing.fake_broker import FakeBroker, FakeConnection
from mlproducer.topology import ROUTING_KEYS
from tests.helpers import LIMIT, make_delivery, make_message
from tests.threaded.brokers import Silent, ack
from tests.threaded.conftest import QUICK, Serve
from tests.threaded.moods import Moody, events_of, told

SHORT = 0.15
TASK = SummarizationTask("s-1", {"text": "text"})

Produce = Callable[..., MLProducer]


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def produce(registry: CollectorRegistry) -> Iterator[Produce]:
    """Make producers on that registry: ``produce(broker, **settings)``."""
    producers: list[MLProducer] = []

    def make(broker: FakeBroker, **settings: Any) -> MLProducer:
        chosen = Settings(url=broker.url, **{**QUICK, **settings})
        producers.append(MLProducer(chosen, registry=registry))
        return producers[-1]

    yield make
    for producer in producers:
        producer.close(SHORT)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Return one series' value, 0 where there is none."""
    return registry.get_sample_value(f"ml_producer_{name}", labels) or 0.0


def sent(registry: CollectorRegistry) -> Counter[str]:
    """Count messages by their status."""
    counts: Counter[str] = Counter()
    for name, labels, number in metrics.samples(registry):
        if name == "ml_producer_tasks_sent_total":
            counts[labels["status"]] += int(number)
    return counts


def test_counted_before_the_publisher_knows(
    produce: Produce, serve: Serve, registry: CollectorRegistry
) -> None:
    """When publish() returns, or a future is done, the message has been counted."""
    producer = produce(serve())
    for n in range(200):
        assert producer.publish(make_message()).confirmed
        assert value(registry, "tasks_sent_total", task_type="raw", status="success") == n + 1
    assert producer.submit(TASK).result(LIMIT).confirmed
    labels = {"task_type": "summarize_llm", "status": "success"}
    assert value(registry, "tasks_sent_total", **labels) == 1
    assert value(registry, "task_publish_duration_seconds_count", **labels) == 1


def test_nothing_is_counted_twice(
    produce: Produce, serve: Serve, registry: CollectorRegistry
) -> None:
    """Calls of every outcome: as many messages are counted as there were calls."""
    mood = Moody()
    producer = produce(serve(mood), max_message_retries=0, max_message_bytes=1000)
    assert producer.publish(make_message()).confirmed
    mood.mood = "nack"
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    buried = producer.submit(make_message())
    with pytest.raises(RetriesExhaustedError):
        buried.result(LIMIT)
    with pytest.raises(InvalidMessageError):
        producer.publish(None)  # type: ignore[arg-type]
    with pytest.raises(MessageTooLargeError):
        producer.submit(make_message(body=b"x" * 1001))
    with pytest.raises(InvalidTaskError):
        producer.publish_summarization_task("s-1", {})
    [error] = producer.publish_many([None])  # type: ignore[list-item]
    assert isinstance(error, InvalidMessageError)
    assert sent(registry) == Counter(success=1, rejected=1, failure=1, validation_error=4)
    assert value(registry, "nacks_total") == 2
    assert value(registry, "dead_lettered_total") == 1


def test_deferred_counts_when_it_is_settled(
    produce: Produce, serve: Serve, registry: CollectorRegistry
) -> None:
    """A message that is ours still counts nowhere but in the gauges, until its fate is known."""
    broker = serve(Silent())
    producer = produce(broker)
    assert producer.wait_connected(LIMIT)
    receipt = producer.publish(make_message(), timeout=SHORT)
    assert sent(registry) == Counter()
    assert value(registry, "confirm_timeouts_total") == 1
    assert value(registry, "pending_confirms") == 1
    [message] = broker.wait_for_messages(1, LIMIT)
    ack(message)
    assert receipt.result(LIMIT).confirmed
    assert sent(registry) == Counter(success=1)
    assert value(registry, "late_confirms_total") == 1


def test_given_back_and_confirmed_late(
    produce: Produce, serve: Serve, registry: CollectorRegistry
) -> None:
    """A message that its publisher has got back stays rejected, also if its confirm comes."""
    broker = serve(Silent())
    producer = produce(broker)
    assert producer.wait_connected(LIMIT)
    with pytest.raises(PublishError):
        producer.publish(make_message(), timeout=SHORT, retry=False)
    [message] = broker.wait_for_messages(1, LIMIT)
    ack(message)
    assert producer.flush(LIMIT) == 0
    assert sent(registry) == Counter(rejected=1)
    assert value(registry, "late_confirms_total") == 1


def test_open_breaker(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """Messages that an open breaker refuses are counted, whichever way they came."""
    mood = Moody("nack")
    producer = produce(serve(mood), circuit_breaker_threshold=1, circuit_breaker_cooldown=30.0)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            producer.publish(make_message())
    with pytest.raises(CircuitOpenError):
        producer.submit(make_message())
    errors = producer.publish_many([make_message(), make_message()])
    assert {type(error) for error in errors} == {CircuitOpenError}
    assert sent(registry) == Counter(rejected=1, circuit_breaker_open=6)
    assert value(registry, "circuit_breaker_open") == 1
    assert value(registry, "circuit_breaker_state") == 1
    assert value(registry, "circuit_breaker_trips_total") == 1


def test_full_window(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """A submit that finds no room is rejected, once."""
    producer = produce(serve(Silent()), max_in_flight=1, publish_timeout=SHORT)
    inside = producer.submit(make_message())
    with pytest.raises(BufferFullError):
        producer.submit(make_message())
    assert sent(registry) == Counter(rejected=1)
    producer.close(0.0)
    with pytest.raises(ProducerClosedError):
        inside.result(LIMIT)
    assert sent(registry) == Counter(rejected=2)


def test_interrupted_line(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """Messages that are withdrawn when publish_many() is interrupted count once, too."""

    def tasks() -> Iterator[Any]:
        for _ in range(5):
            yield make_message()
        raise KeyboardInterrupt

    broker = serve()
    broker.stop_listening()
    producer = produce(broker)
    with pytest.raises(KeyboardInterrupt):
        producer.publish_many(tasks())
    broker.listen_again()
    assert producer.flush(LIMIT) == 0
    counted = sent(registry)
    assert counted.total() == 5
    assert counted["rejected"] + counted["success"] == 5


def test_closed_meanwhile(
    produce: Produce, serve: Serve, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that comes just after close() is rejected once, whichever way it came."""
    producer = produce(serve())
    assert producer.publish(make_message()).confirmed
    runtime = producer._life.started()
    producer.close(SHORT)
    monkeypatch.setattr(producer._life, "started", lambda: runtime)
    with pytest.raises(ProducerClosedError):
        producer.publish(make_message())
    with pytest.raises(ProducerClosedError):
        producer.submit(make_message())
    [error] = producer.publish_many([make_message()])
    assert isinstance(error, ProducerClosedError)
    assert sent(registry) == Counter(success=1, rejected=3)


def test_reconnect_is_measured(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """A lost connection is an error of its kind, and how long it was missed is observed."""
    broker = serve()
    producer = produce(broker)
    assert producer.wait_connected(LIMIT)
    assert value(registry, "connection_state") == ConnectionState.CONNECTED
    seen = events_of(producer, "disconnected", "connected")
    [connection] = broker.wait_for_connections(1, LIMIT)
    connection.reset()
    seen.wait_for("disconnected", "connected")
    assert value(registry, "connection_errors_total", error_type="lost") == 1
    assert value(registry, "reconnect_duration_seconds_count") == 1
    assert 0 < value(registry, "reconnect_duration_seconds_sum") < LIMIT
    moves = "connection_state_changes_total"
    assert value(registry, moves, state="CONNECTED") == 2
    assert value(registry, moves, state="DISCONNECTED") == 1


class Queues(Moody):
    """Holds messages in its queues, or has none of them.

    :ivar asked_for: the names of queues that were asked for, in order
    """

    def __init__(self, messages: int, *missing: str) -> None:
        super().__init__()
        self._messages = messages
        self._missing = missing
        self.asked_for: list[str] = []

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Say how much is in a queue, or that it is not there."""
        if isinstance(method, spec.Exchange.Declare) and method.exchange in self._missing:
            self.asked.release()
            connection.close_channel(channel, 404, "NOT_FOUND - no exchange")
        elif not isinstance(method, spec.Queue.Declare):
            super().on_method(connection, channel, method)
        elif method.queue in self._missing:
            self.asked_for.append(method.queue)
            connection.close_channel(channel, 404, "NOT_FOUND - no queue")
        else:
            self.asked_for.append(method.queue)
            depth = spec.Queue.DeclareOk(method.queue, self._messages, 0)
            connection.send_method(channel, depth)


def depths(registry: CollectorRegistry) -> dict[str, float]:
    """Return what is shown of each queue."""
    samples = metrics.samples(registry)
    return {lab["queue_name"]: n for name, lab, n in samples if name == "ml_producer_queue_depth"}


def test_queues_of_two_brokers(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """Of two connections the greater reading is shown; what one has read is gone with it."""
    full, empty = serve(Queues(7)), serve(Queues(0))
    first = produce(full, health_check_interval=0.05)
    read = told(producer_of(first), events.QueueDepth, lambda event: event.queue)
    second = produce(empty, health_check_interval=0.05)
    read_too = told(producer_of(second), events.QueueDepth, lambda event: event.queue)
    for seen in (read, read_too):
        seen.wait_until(lambda seen=seen: set(ROUTING_KEYS) <= set(seen.seen))
    assert depths(registry) == dict.fromkeys(ROUTING_KEYS, 7)
    lost = events_of(first, "disconnected")
    full.stop_listening()
    full.connections[0].reset()
    lost.wait_for("disconnected")
    assert depths(registry) == dict.fromkeys(ROUTING_KEYS, 0)
    second.close(SHORT)
    assert depths(registry) == {}


def producer_of(producer: MLProducer) -> MLProducer:
    """Start a producer."""
    assert producer.wait_connected(LIMIT)
    return producer


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_missing_is_asked_for_once(
    produce: Produce, serve: Serve, registry: CollectorRegistry, exchange: bool
) -> None:
    """The health check of a broker without our topology leaves no line a time in its log."""
    missing = ROUTING_KEYS[:2]
    mood = Queues(3, *missing, *([] if exchange else ["bookmarkai.ml"]))
    producer = produce(serve(mood), health_check_interval=0.02)
    checked = told(producer_of(producer), events.HealthChecked, lambda event: event.alive)
    checked.wait_until(lambda: len(checked.seen) > 16)
    assert all(checked.seen)
    if exchange:
        # Some checks may begin before the first has ended.
        assert all(1 <= mood.asked_for.count(queue) <= 4 for queue in missing)
        assert depths(registry) == dict.fromkeys(ROUTING_KEYS[2:], 3)
    else:
        assert mood.asked_for == []
        assert sum(mood.asked.acquire(blocking=False) for _ in range(99)) <= 4
        assert depths(registry) == {}


def test_two_producers(produce: Produce, serve: Serve, registry: CollectorRegistry) -> None:
    """On one registry counts add up; a closed producer leaves the gauges, not the counters."""
    broker = serve()
    first, second = produce(broker), produce(broker)
    assert first.wait_connected(LIMIT)
    assert value(registry, "connection_state") == ConnectionState.DISCONNECTED
    assert second.wait_connected(LIMIT)
    assert value(registry, "connection_state") == ConnectionState.CONNECTED
    first.publish(make_message())
    second.publish(make_message())
    first.close(SHORT)
    assert value(registry, "connection_state") == ConnectionState.CONNECTED
    assert sent(registry) == Counter(success=2)
    second.close(SHORT)
    assert value(registry, "connection_state") == ConnectionState.CLOSED


def test_default_registry(serve: Serve) -> None:
    """Without a registry of its own a producer uses prometheus-client's, as a second one does."""
    name, labels = "ml_producer_tasks_sent_total", {"task_type": "raw", "status": "success"}
    before = REGISTRY.get_sample_value(name, labels) or 0.0
    quick: dict[str, Any] = dict(QUICK)
    settings = Settings(url=serve().url, **quick)
    for _ in range(2):
        with MLProducer(settings) as producer:
            producer.publish(make_message())
    assert REGISTRY.get_sample_value(name, labels) == before + 2


def test_dropped_producer(serve: Serve, registry: CollectorRegistry) -> None:
    """A producer that was closed and dropped is collected: its gauges do not hold it."""
    producer = MLProducer(Settings(url=serve().url), registry=registry)
    producer.publish(make_message())
    producer.close(LIMIT)
    gone = weakref.ref(producer)
    del producer
    gc.collect()
    assert gone() is None
    assert sent(registry) == Counter(success=1)


def test_import_is_light() -> None:
    """Importing the package imports neither prometheus-client nor OpenTelemetry."""
    code = (
        "import sys, mlproducer; "
        "print({'prometheus_client', 'opentelemetry'} & {m.split('.')[0] for m in sys.modules})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert ended.stdout == "set()\n"


def test_threads_lose_no_count() -> None:
    """Threads that count at the same time, while another adds up, lose nothing."""
    each, burst, tally = 5000, [make_delivery()], Tally()
    sink = ProducerMetrics(tally).sink()
    start = threading.Barrier(5, timeout=LIMIT)

    def count() -> None:
        start.wait(LIMIT)
        for _ in range(each):
            sink.take(events.Confirmed(burst, 0.0))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait(LIMIT)
    seen: list[float] = [0.0]
    while any(thread.is_alive() for thread in threads):
        seen.append(_all_counted(tally))
    for thread in threads:
        thread.join(LIMIT)
    assert seen == sorted(seen)
    assert _all_counted(tally) == 4 * each


def _all_counted(tally: Tally) -> float:
    counts = next(series for family, series in tally.totals().items() if "sent" in family.name)
    return sum(cells[0] for cells in counts.values())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
@pytest.mark.parametrize("chosen", [None, CollectorRegistry()], ids=["default", "own"])
def test_child_forked_while_a_thread_scrapes(chosen: CollectorRegistry | None) -> None:
    """A child whose parent held the registry's lock at the fork scrapes, and makes producers."""
    producer = MLProducer(Settings(url="amqp://u:p@h/"), registry=chosen)
    assert producer.registry is chosen
    with (REGISTRY if chosen is None else chosen)._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(int(LIMIT))
            MLProducer(Settings(url="amqp://u:p@h/"), registry=chosen)
            os._exit(b"ml_producer_connection_state" not in metrics.exposition(chosen))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "store", ["memory://", "sqlite:///{}/ml.db", "sqlite:///{}/ml.db?write_ahead=1"]
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_duration_counts_from_the_call(
    produce: Produce,
    serve: Serve,
    registry: CollectorRegistry,
    tmp_path: Path,
    store: str,
    elsewhere: bool,
) -> None:
    """What waited in a store took as long as its publisher has waited, in any process."""
    broker = serve()
    broker.stop_listening()
    url = store.format(tmp_path)
    producer = produce(broker, store_url=url)
    messages = 1 if elsewhere else 3
    for _ in range(messages):
        producer.submit(make_message())
    threading.Event().wait(0.6)
    labels = {"task_type": "raw", "status": "success"}
    if elsewhere:
        if not producer.status().store:
            pytest.skip("a memory store ends with its producer")
        producer.close(SHORT)
        producer = produce(broker, store_url=url)
    broker.listen_again()
    producer.start()
    assert producer.flush(LIMIT) == 0
    assert value(registry, "task_publish_duration_seconds_count", **labels) == messages
    assert value(registry, "task_publish_duration_seconds_bucket", le="0.5", **labels) == 0
    assert 0.6 * messages <= value(registry, "task_publish_duration_seconds_sum", **labels) < LIMIT


# --- multiprocess mode -------------------------------------------------------------------------


def run(code: str, directory: Path, **environ: str) -> list[str]:
    """Run a program beside files of multiprocess mode, and return the lines that it prints."""
    about_fork = "ignore:This process:DeprecationWarning"  # of Python 3.12
    ended = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-W", about_fork, "-c", HEAD + code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


HEAD = """
import logging, os, shutil, signal, sys, time
logging.disable(logging.CRITICAL)
def shown(name):
    import prometheus_client
    from prometheus_client.multiprocess import MultiProcessCollector
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry)
    return registry.get_sample_value(name)
"""

PUBLISH = """
from mlproducer import MLProducer, Message, Settings
from mlproducer.testing.fake_broker import FakeBroker, FakeConnection
from mlproducer.topology import ROUTING_KEYS
with FakeBroker() as broker, MLProducer(Settings(url=broker.url, publish_timeout=60.0)) as producer:
    def publish():
        return producer.publish(Message(body=b"x", routing_key="k")).confirmed
"""


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    """A producer in multiprocess mode without a directory is refused when it is made."""
    code = """
from mlproducer import MLProducer, Settings, errors
for _ in range(2):
    try:
        MLProducer(Settings(url="amqp://u:p@h/"))
    except errors.ConfigurationError as error:
        print(error)
"""
    text = "PROMETHEUS_MULTIPROC_DIR must name a directory that can be written to: "
    missing = f"{text}No such file or directory"
    assert run(code, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "no")) == [missing] * 2


def test_directory_that_goes_away(tmp_path: Path) -> None:
    """Publishing goes on where the directory is emptied or removed, also in a child; so does /."""
    code = f"""
from celery import Celery
from mlproducer.contrib.celery import install
{PUBLISH}
    from mlproducer.wsgi import make_app
    app, directory = make_app(producer), os.environ["PROMETHEUS_MULTIPROC_DIR"]
    def status(path):
        seen = []
        environ = {{"REQUEST_METHOD": "GET", "PATH_INFO": path}}
        app(environ, lambda status, headers: seen.append(status[:3]))
        return seen[0]
    print(publish(), status("/metrics"))
    for name in os.listdir(directory):
        os.remove(os.path.join(directory, name))
    print(publish(), status("/metrics"), status("/health"))
    os.rmdir(directory)
    print(publish(), status("/metrics"), status("/metrics/json"), status("/health"), status("/"))
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        try:
            producer.publish(None)
        except Exception as error:
            refused = type(error).__name__
        app = Celery("shop", broker=broker.url)
        install(app, producer)
        app.send_task("shop.add", ignore_result=True)  # raises what counting it raises
        os._exit(not (publish() and publish() and refused == "InvalidMessageError"))
    print(os.waitpid(child, 0)[1])
"""
    files = tmp_path / "files"
    files.mkdir()
    assert run(code, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(files)) == [
        "True 200",
        "True 200 200",
        "True 503 503 200 200",
        "0",
    ]


def test_published_in_the_middle_of_a_count(tmp_path: Path) -> None:
    """A finaliser, or signal handler, that interrupts a count of the user's publishes as ever."""
    code = f"""{PUBLISH}
    from prometheus_client import Counter
    from mlproducer import errors
    class Interrupting(float):
        def __radd__(self, other):
            started = time.monotonic()
            print(publish(), time.monotonic() - started < 30.0)
            try:
                producer.publish(None)
            except errors.InvalidMessageError:
                print("refused")
            return other + 1.0
    signal.alarm(100)
    publish()
    Counter("mine", "The user's own.").inc(Interrupting(1))
from mlproducer.observe import metrics
ended = [each for each in metrics.samples() if each[0] == "ml_producer_tasks_sent_total"]
print(sorted((labels["status"], value) for _, labels, value in ended), shown("mine_total"))
"""
    files = tmp_path / "files"
    files.mkdir()
    assert run(code, tmp_path, PROMETHEUS_MULTIPROC_DIR=str(files)) == [
        "True True",
        "refused",
        "[('success', 2.0), ('validation_error', 1.0)] 1.0",
    ]


def test_mode_is_what_prometheus_client_decided(tmp_path: Path) -> None:
    """A variable that is set after that library was imported, or empty, changes nothing."""
    code = f"""
import prometheus_client
os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.getcwd()
{PUBLISH}
    publish()  # which is told before it is counted
print(prometheus_client.REGISTRY.get_sample_value("ml_producer_message_size_bytes_count"))
print(os.listdir())
"""
    assert run(code, tmp_path) == ["1.0", "[]"]
    empty = code.replace('["PROMETHEUS_MULTIPROC_DIR"] = os.getcwd()', '["OTHER"] = ""')
    assert run(empty, tmp_path, PROMETHEUS_MULTIPROC_DIR="")[0] == "1.0"


def test_the_package_imported_twice(tmp_path: Path) -> None:
    """Both imports publish and count, on one registry, and the process ends as ever."""
    code = """
from mlproducer.testing.fake_broker import FakeBroker
with FakeBroker() as broker:
    producers = []
    for _ in range(3):
        from mlproducer import MLProducer, Message, Settings
        message = Message(body=b"x", routing_key="k")
        producers.append((MLProducer(Settings(url=broker.url)), message))
        for producer, message in producers:
            producer.publish(message)
        for name in [each for each in sys.modules if each.startswith("mlproducer")]:
            del sys.modules[name]
    import prometheus_client
    name, labels = "ml_producer_tasks_sent_total", {"task_type": "raw", "status": "success"}
    print(prometheus_client.REGISTRY.get_sample_value(name, labels))
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        for producer, message in producers:
            producer.publish(message)
        os._exit(prometheus_client.REGISTRY.get_sample_value(name, labels) != 3)
    print(os.waitpid(child, 0)[1])
"""
    assert run(code, tmp_path) == ["6.0", "0"]


@pytest.mark.parametrize(("store", "rows"), [("sqlite:///ml.db", 3), ("memory://", 12)])
def test_workers_of_one_store(tmp_path: Path, store: str, rows: int) -> None:
    """Four workers whose store has three rows show three, and twelve where each has a store."""
    code = """
from mlproducer import MLProducer, Message, Settings
producer = MLProducer(Settings(
    url="amqp://127.0.0.1:1", store_url=sys.argv[1], circuit_breaker_threshold=1000
))
children = []
for number in range(4):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        if number == 0 or sys.argv[1] == "memory://":
            for _ in range(3):
                producer.publish(Message(body=b"x", routing_key="k"))
        producer.start()
        while producer.status().retry_queue_size < 3:
            time.sleep(0.01)
        producer._meter().refresh()
        os.write(tell, b"1")
        signal.pause()
    os.read(ready, 1)
    children.append(child)
print(shown("ml_producer_retry_queue_size"))
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    (tmp_path / "files").mkdir()
    environ = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "files")}
    code = code.replace("sys.argv[1]", repr(store))
    assert run(code, tmp_path, **environ) == [f"{rows}.0"]


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent
from mlproducer.observe.metric_families import CELERY_TASKS
from mlproducer.observe.counters import Cells
cells = Cells(CELERY_TASKS)
gevent.joinall([gevent.spawn(cells.inc) for _ in range(500)])
print(int(cells.total()[0]), len(cells._of))
"""


def test_greenlets_share_their_threads_cells() -> None:
    """Each request of gevent's servers is another one, and none may leave something behind."""
    pytest.importorskip("gevent")
    argv = [sys.executable, "-c", GREENLETS]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert ran.stdout.split() == ["500", "1"]
