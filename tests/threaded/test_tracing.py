"""A span for each message, from its publisher's call to its fate, and what travels of it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlproducer import CeleryTask, Message, MLProducer, SummarizationTask
from mlproducer.errors import (
    BufferFullError,
    CircuitOpenError,
    InvalidMessageError,
    NackError,
    PublishError,
    RetriesExhaustedError,
)
from mlproducer.observe import callbacks
from mlproducer.observe.spans import Spans
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.tracing import trace_context
from tests.helpers import LIMIT, make_message
from tests.threaded.brokers import Silent, ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import Moody

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import baggage, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import attach, detach
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import Setter, TextMapPropagator, default_setter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from mlproducer.observe import otel

SHORT = 0.15
SECRET = "a text that stays where it is"
TASK = SummarizationTask("s-1", {"text": SECRET})
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID, SPAN_ID = int(TRACEPARENT[3:35], 16), int(TRACEPARENT[36:52], 16)


class Exporter(SpanExporter):
    """Keeps the spans that have ended, and lets a test wait for them.

    :ivar held: while it is not set, exporting takes for ever
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: spans
        self.spans: list[ReadableSpan] = []
        self.held = threading.Event()
        self.held.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Keep them."""
        assert self.held.wait(10 * LIMIT)
        with self._changed:
            self.spans += spans
            self._changed.notify_all()
        return SpanExportResult.SUCCESS

    def wait_for(self, count: int) -> list[ReadableSpan]:
        """Wait until there are so many, and return them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.spans) >= count, 4 * LIMIT), self.spans
            return list(self.spans)

    def wait_for_one(self) -> ReadableSpan:
        """Wait for the only span."""
        [span] = self.wait_for(1)
        return span


@pytest.fixture
def provider() -> TracerProvider:
    """A tracer provider of the test's own."""
    return TracerProvider()


@pytest.fixture
def exporter(provider: TracerProvider, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    """Where the spans of the library's tracer go."""
    exporter = Exporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(otel, "_tracer", provider.get_tracer("mlproducer"))
    yield exporter
    exporter.held.set()


def headers(message: ReceivedMessage) -> dict[str, Any]:
    """Return a message's headers."""
    return dict(message.properties.headers or {})


def traceparent(span: ReadableSpan) -> str:
    """Return the header that leads to a span."""
    context = span.get_span_context()
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def failure(span: ReadableSpan) -> str:
    """Return what a span says of its failure, once it is said alike in both places."""
    error = (span.attributes or {}).get("error.type", "")
    expected = StatusCode.ERROR if error else StatusCode.UNSET
    assert (span.status.status_code, span.status.description or "") == (expected, error)
    return str(error)


def happened(span: ReadableSpan) -> list[tuple[str, Any]]:
    """Return a span's events with their reasons."""
    return [(event.name, (event.attributes or {}).get("reason")) for event in span.events]


# --- the span of a message ---------------------------------------------------------------------


def test_confirmed(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """A PRODUCER span after the conventions, whose context is what travels."""
    broker = serve()
    receipt = connect(broker).publish(TASK)
    span = exporter.wait_for_one()
    assert (span.name, span.kind) == ("publish bookmarkai.ml:ml.summarize", SpanKind.PRODUCER)
    assert (failure(span), happened(span), span.parent) == ("", [], None)
    [message] = broker.messages
    assert span.attributes == {
        "messaging.system": "rabbitmq",
        "messaging.operation.type": "send",
        "messaging.operation.name": "publish",
        "messaging.destination.name": "bookmarkai.ml:ml.summarize",
        "messaging.rabbitmq.destination.routing_key": "ml.summarize",
        "messaging.message.id": receipt.message_id,
        "messaging.message.body.size": len(message.body),
    }
    assert headers(message)["traceparent"] == traceparent(span)
    assert "tracestate" not in headers(message)
    assert SECRET not in span.to_json()
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time > span.start_time


@pytest.mark.parametrize(
    ("exchange", "routing_key", "destination"),
    [("x", "k", "x:k"), ("x", "", "x"), ("", "k", "k"), ("", "", "amq.default")],
)
def test_destination(
    connect: Connect,
    serve: Serve,
    exporter: Exporter,
    exchange: str,
    routing_key: str,
    destination: str,
) -> None:
    """The destination is named after exchange and routing key, as the conventions say."""
    message = Message(body=b"", exchange=exchange, routing_key=routing_key)
    connect(serve()).publish(message)
    assert exporter.wait_for_one().name == f"publish {destination}"


def test_child_of_the_current_span(
    connect: Connect, serve: Serve, provider: TracerProvider, exporter: Exporter
) -> None:
    """The caller's span is the parent, also where a context was handed in besides."""
    broker = serve()
    producer = connect(broker)
    with provider.get_tracer("test").start_as_current_span("request") as request:
        with trace_context(TRACEPARENT):
            producer.publish(TASK)
        [child] = exporter.wait_for(1)
    context = request.get_span_context()
    assert child.parent is not None
    assert child.parent.span_id == context.span_id
    assert headers(broker.messages[0])["traceparent"] == traceparent(child)


def test_child_of_a_context_handed_in(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """Without a current span, the context that was handed in is the parent, with its state."""
    broker = serve()
    producer = connect(broker)
    with trace_context(TRACEPARENT, "vendor=1"):
        producer.publish(TASK)
    span = exporter.wait_for_one()
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert headers(broker.messages[0])["traceparent"] == traceparent(span)
    assert headers(broker.messages[0])["tracestate"] == "vendor=1"


def test_context_of_the_task_itself(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """A context among a Celery task's own headers travels as it is."""
    broker = serve()
    task = CeleryTask("n", [], {}, "k", headers={"traceparent": TRACEPARENT})
    connect(broker).publish(task)
    exporter.wait_for_one()
    assert headers(broker.messages[0])["traceparent"] == TRACEPARENT


class OneHeader(TextMapPropagator):
    """Writes a span's context in one header, as B3 does."""

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
        """Read nothing."""

    def inject(
        self, carrier: Any, context: Any = None, setter: Setter[Any] = default_setter
    ) -> None:
        """Write the ids; and a name that a worker uses itself."""
        ids = trace.get_current_span(context).get_span_context()
        setter.set(carrier, "b3", f"{ids.trace_id:032x}-{ids.span_id:016x}-1")
        setter.set(carrier, "id", "of another")

    @property
    def fields(self) -> set[str]:
        """Return what it writes."""
        return {"b3", "id"}


@pytest.fixture
def own_propagators() -> Iterator[None]:
    """Have the process propagate baggage, and contexts in a form of its own."""
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(CompositePropagator([W3CBaggagePropagator(), OneHeader()]))
    yield
    propagate.set_global_textmap(before)


@pytest.mark.usefixtures("own_propagators")
def test_propagators_of_the_process(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """What they write travels, and the W3C context too; a header of the task's own counts more."""
    broker = serve()
    producer = connect(broker)
    token = attach(baggage.set_baggage("tenant", "acme"))
    try:
        producer.publish(TASK)
        producer.publish(CeleryTask("n", [], {}, "k", headers={"baggage": "own"}))
    finally:
        detach(token)
    for span, sent in zip(exporter.wait_for(2), map(headers, broker.messages), strict=True):
        assert sent["traceparent"] == traceparent(span)
        assert sent["b3"] == f"{traceparent(span)[3:52]}-1"
        assert sent["id"] != "of another"
    assert [headers(each)["baggage"] for each in broker.messages] == ["tenant=acme", "own"]


@pytest.mark.usefixtures("own_propagators")
@pytest.mark.parametrize(
    "written",
    [("CC", "a"), ("n" * 256, "v"), ("b3", "\udc80"), ("b3", "v" * 200_000)],
    ids=["route", "long name", "surrogate", "too large"],
)
def test_a_propagator_that_writes_what_amqp_cannot_carry(
    written: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    connect: Connect,
    serve: Serve,
    exporter: Exporter,
) -> None:
    """The task is published all the same, with the W3C context; a task that is wrong is not."""
    broker = serve()
    producer = connect(broker)
    monkeypatch.setattr(
        OneHeader, "inject", lambda _own, carrier, *_, **__: carrier.update([written])
    )
    with caplog.at_level("ERROR"):
        assert producer.publish(TASK).confirmed
    [span], [sent] = exporter.wait_for(1), map(headers, broker.messages)
    assert sent["traceparent"] == traceparent(span)
    assert written[0] not in sent
    assert [each.getMessage().strip() for each in caplog.records] == ["the tracer failed"]
    with pytest.raises(InvalidMessageError):
        producer.publish(None)  # type: ignore[arg-type]


def test_a_task_that_an_instrumentation_traces(
    connect: Connect, serve: Serve, provider: TracerProvider, exporter: Exporter
) -> None:
    """It has one span; a PRODUCER span of the user's own does not count as one."""
    broker = serve()
    producer = connect(broker)
    for scope in ("opentelemetry.instrumentation.celery", "shop"):
        tracer = provider.get_tracer(scope)
        with tracer.start_as_current_span("outer", kind=SpanKind.PRODUCER) as span:
            producer.publish(TASK)
            producer.flush(LIMIT)
        parent = headers(broker.messages[-1])["traceparent"].split("-")[2]
        its_own = f"{span.get_span_context().span_id:016x}"
        assert (parent == its_own) == (scope != "shop")
    assert sorted(each.name for each in exporter.wait_for(3)) == [
        "outer",
        "outer",
        "publish bookmarkai.ml:ml.summarize",
    ]


def test_each_message_has_its_own(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """Messages that are confirmed together have a span each, whose context each carries."""
    broker = serve()
    receipts = connect(broker).publish_many([TASK] * 100)
    assert all(not isinstance(each, PublishError) for each in receipts)
    spans = {traceparent(span) for span in exporter.wait_for(100)}
    assert len(spans) == 100
    assert {headers(message)["traceparent"] for message in broker.messages} == spans


# --- its end -----------------------------------------------------------------------------------


def test_given_back(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """A message given back ends its span with the error's name."""
    with pytest.raises(NackError):
        connect(serve(Moody("nack"))).publish(TASK, retry=False)
    assert failure(exporter.wait_for_one()) == "NackError"


def test_deferred(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """A deferral is an event; the span ends when the message is confirmed after all."""
    broker = serve(Silent())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    receipt = producer.publish(TASK, timeout=SHORT)
    [message] = broker.wait_for_messages(1, LIMIT)
    assert exporter.spans == []
    ack(message)
    assert receipt.result(LIMIT).confirmed
    span = exporter.wait_for_one()
    assert (failure(span), happened(span)) == ("", [("deferred", "ConfirmTimeoutError")])


def test_dead_lettered(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """Each retry is an event; a dead letter ends the span as failed."""
    future = connect(serve(Moody("nack")), max_message_retries=2).submit(TASK)
    with pytest.raises(RetriesExhaustedError):
        future.result(LIMIT)
    span = exporter.wait_for_one()
    assert failure(span) == "RetriesExhaustedError"
    events = [each for each in happened(span) if each[0] == "retried"]
    assert events == [("retried", "NackError")] * 2


def test_refused(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """What is never sent has a span that ends at once: not valid, no room, or breaker open."""
    mood = Moody("")
    producer = connect(
        serve(mood), max_in_flight=1, publish_timeout=SHORT, circuit_breaker_threshold=1
    )
    with pytest.raises(InvalidMessageError):
        producer.publish(None)  # type: ignore[arg-type]
    producer.submit(make_message(), retry=False)
    with pytest.raises(BufferFullError):
        producer.submit(TASK)
    assert [failure(span) for span in exporter.wait_for(2)] == [
        "InvalidMessageError",
        "BufferFullError",
    ]
    producer.close(0.0)
    assert failure(exporter.wait_for(3)[2]) == "ProducerClosedError"


def test_open_breaker(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """A message that an open breaker refuses ends its span, too."""
    producer = connect(serve(Moody("nack")), circuit_breaker_threshold=1)
    with pytest.raises(NackError):
        producer.publish(TASK, retry=False)
    with pytest.raises(CircuitOpenError):
        producer.publish(TASK)
    assert [failure(span) for span in exporter.wait_for(2)] == ["NackError", "CircuitOpenError"]


def test_close_waits_for_the_spans(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """After close() every span has ended."""
    producer = connect(serve())
    for _ in range(200):
        producer.submit(TASK)
    producer.close(LIMIT)
    assert len(exporter.spans) == 200


def test_slow_exporter(connect: Connect, serve: Serve, exporter: Exporter) -> None:
    """An exporter that blocks holds up spans, and nothing else."""
    producer = connect(serve())
    exporter.held.clear()
    for _ in range(20):
        assert producer.publish(TASK).confirmed
    assert exporter.spans == []
    exporter.held.set()
    exporter.wait_for(20)


def test_no_span_is_dropped(
    connect: Connect, serve: Serve, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More spans than events may wait all end, however long the exporter takes."""
    producer = connect(serve(), max_in_flight=5000)
    exporter.held.clear()
    monkeypatch.setattr(callbacks, "MAX_QUEUED", 100)
    total = 600
    producer.publish_many([make_message()] * total)
    called = threading.Event()
    producer.submit(TASK).add_done_callback(lambda _: called.set())
    assert called.wait(LIMIT)  # beside an exporter that blocks
    exporter.held.set()
    exporter.wait_for(total + 1)


class Broken(SpanProcessor):
    """Raises where it is told to, and counts what it sees."""

    def __init__(self, error: BaseException, *, start: bool = False, end: bool = False) -> None:
        self._error = error
        self._start = start
        self._end = end
        self.ended = 0

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Raise, or not."""
        if self._start:
            raise self._error

    def on_end(self, span: ReadableSpan) -> None:
        """Raise, or not."""
        self.ended += 1
        if self._end:
            raise self._error


@pytest.mark.parametrize("error", [RuntimeError(), SystemExit(3)], ids=repr)
def test_a_processor_that_fails_at_an_end(
    connect: Connect, serve: Serve, provider: TracerProvider, exporter: Exporter, error: Any
) -> None:
    """Of messages that are confirmed together, the end of one fails, and the others end."""
    broken = Broken(error, end=True)
    provider.add_span_processor(broken)
    producer = connect(serve(InTens()))
    assert all(not isinstance(each, PublishError) for each in producer.publish_many([TASK] * 100))
    exporter.wait_for(100)
    assert producer.publish_many([TASK] * 10)
    producer.close(LIMIT)
    assert broken.ended == 110


class InTens(Behaviour):
    """Confirms ten messages at a time."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Confirm, or wait."""
        if tag % 10 == 0:
            connection.ack(channel, tag, multiple=True)


def test_a_processor_that_fails_at_a_start(
    connect: Connect, serve: Serve, provider: TracerProvider, exporter: Exporter
) -> None:
    """Its message is published without a span, and the error is logged some times."""
    provider.add_span_processor(Broken(RuntimeError("broken"), start=True))
    broker = serve()
    producer = connect(broker)
    assert producer.publish(TASK).confirmed
    assert producer.submit(TASK).result(LIMIT).confirmed
    assert all(not isinstance(each, PublishError) for each in producer.publish_many([TASK] * 100))
    assert exporter.spans == []
    assert not any("traceparent" in headers(message) for message in broker.messages)


def test_a_span_that_cannot_be_described(
    connect: Connect, serve: Serve, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer that fails on the way leaves a span that is not complete, and harms nothing."""

    def fail(*_: object) -> None:
        raise RuntimeError

    for method in ("describe", "event"):
        monkeypatch.setattr(otel.MessageSpan, method, fail)
    producer = connect(serve(Moody("nack")), max_message_retries=1)
    with pytest.raises(RetriesExhaustedError):
        producer.submit(TASK).result(LIMIT)
    assert failure(exporter.wait_for_one()) == "RetriesExhaustedError"


def test_interrupt_before_the_message_is_handed_over(
    connect: Connect, serve: Serve, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C between any two steps of the call ends the span, and leaves nothing of it."""
    producer = connect(serve())
    follow = Spans.follow

    def interrupted(*args: Any) -> None:
        follow(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Spans, "follow", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            producer.publish(TASK)
    with pytest.raises(KeyboardInterrupt):
        producer.submit(TASK)
    gc.collect()
    assert [failure(span) for span in exporter.wait_for(4)] == ["interrupted"] * 4
    assert _spans_of(producer) == {}


# --- messages in a durable store ---------------------------------------------------------------


def links(span: ReadableSpan) -> list[str]:
    """Return the headers of the spans that a span links to."""
    contexts = [link.context for link in span.links]
    return [f"00-{c.trace_id:032x}-{c.span_id:016x}-{c.trace_flags:02x}" for c in contexts]


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Where messages are stored, for all producers of a test."""
    return f"sqlite:///{tmp_path}/ml.db"


def test_stored(connect: Connect, serve: Serve, exporter: Exporter, store: str) -> None:
    """A span ends when its message is stored; the attempt that delivers it links to that."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, store_url=store)
    receipt = producer.publish(TASK)
    first = exporter.wait_for_one()
    assert (failure(first), happened(first)) == (
        "",
        [("deferred", "NotConnectedError"), ("stored", None)],
    )
    assert _spans_of(producer) == {}
    broker.listen_again()
    assert receipt.result(LIMIT).confirmed
    _, later = exporter.wait_for(2)
    assert (later.name, later.kind) == ("publish bookmarkai.ml:ml.summarize", SpanKind.PRODUCER)
    assert (failure(later), happened(later)) == ("", [])
    assert (links(later), later.parent) == ([traceparent(first)], None)
    assert later.attributes == first.attributes
    assert first.end_time is not None
    assert later.start_time is not None
    assert later.start_time >= first.end_time
    assert headers(broker.messages[0])["traceparent"] == traceparent(first)


def test_stored_and_delivered_elsewhere(
    connect: Connect, serve: Serve, exporter: Exporter, store: str
) -> None:
    """A producer that finds a row of another's has a span for it, which links to the first."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, store_url=store)
    for _ in range(3):
        producer.submit(TASK)
    producer.close(0.3)
    broker.listen_again()
    first = exporter.wait_for(3)
    assert all(("stored", None) in happened(span) for span in first)
    connect(broker, store_url=store).start()
    later = exporter.wait_for(6)[3:]
    assert sorted(links(span) for span in later) == sorted([traceparent(span)] for span in first)


def test_each_later_attempt_has_a_span(
    connect: Connect, serve: Serve, exporter: Exporter, store: str
) -> None:
    """Attempts that fail end as stored; the last span says that the message is a dead letter."""
    producer = connect(serve(Moody("nack")), store_url=store, max_message_retries=2)
    future = producer.submit(TASK)
    with pytest.raises(RetriesExhaustedError):
        future.result(LIMIT)
    first, *later = exporter.wait_for(4)
    stored = [("deferred", "NackError"), ("stored", None)]
    assert happened(first) == stored
    assert [happened(span) for span in later] == [[("retried", "NackError"), *stored]] * 2 + [[]]
    assert [failure(span) for span in later] == ["", "", "RetriesExhaustedError"]
    assert all(links(span) == [traceparent(first)] for span in later)


def test_stored_without_a_trace(
    connect: Connect, serve: Serve, exporter: Exporter, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is not traced, or not sampled, is not traced later either."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, store_url=store)
    sampled = otel._tracer
    off = TracerProvider(sampler=ALWAYS_OFF).get_tracer("off")
    monkeypatch.setattr(otel, "_tracer", off)
    receipts = [producer.publish(TASK)]
    monkeypatch.setattr(otel, "begin", lambda _given: None)
    receipts.append(producer.publish(TASK))
    monkeypatch.setattr(otel, "_tracer", sampled)
    broker.listen_again()
    assert all(receipt.result(LIMIT).confirmed for receipt in receipts)
    assert exporter.spans == []


def test_a_backlog_takes_no_memory(
    connect: Connect, serve: Serve, exporter: Exporter, store: str
) -> None:
    """However many messages wait in a durable store, no span of theirs is kept."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, store_url=store)
    producer.publish_many([TASK] * 500)
    exporter.wait_for(500)
    assert _spans_of(producer) == {}
    assert producer.status().retry_queue_size == 500


# --- without a reader of spans -----------------------------------------------------------------


def test_not_sampled(
    connect: Connect, serve: Serve, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace that is not sampled is carried on as such, and no span is kept."""
    broker = serve()
    provider = TracerProvider(sampler=ALWAYS_OFF)
    monkeypatch.setattr(otel, "_tracer", provider.get_tracer("mlproducer"))
    producer = connect(broker)
    with trace_context(TRACEPARENT):
        producer.publish(TASK)
    carried = headers(broker.messages[0])["traceparent"]
    assert carried.startswith(TRACEPARENT[:35])
    assert carried.endswith("-00")
    assert exporter.spans == []
    assert _spans_of(producer) == {}


def test_no_provider(connect: Connect, serve: Serve) -> None:
    """Without a tracer provider the current context is carried on as it is."""
    broker = serve()
    producer = connect(broker)
    state = trace.TraceState([("vendor", "1")])
    context = trace.SpanContext(TRACE_ID, SPAN_ID, True, trace.TraceFlags(1), state)
    with trace.use_span(trace.NonRecordingSpan(context)):
        producer.publish(TASK)
    producer.publish(TASK)
    with trace_context(TRACEPARENT):
        producer.publish(TASK)
    of_current, of_none, of_given = map(headers, broker.messages)
    assert (of_current["traceparent"], of_current["tracestate"]) == (TRACEPARENT, "vendor=1")
    assert "traceparent" not in of_none
    assert of_given["traceparent"] == TRACEPARENT
    assert _spans_of(producer) == {}


def test_without_opentelemetry(serve: Serve) -> None:
    """Publishing does not import OpenTelemetry, and carries what was handed in."""
    code = f"""
import sys
from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.tracing import trace_context

url = sys.argv[1]
with MLProducer(Settings(url=url, declare_topology="off")) as producer:
    with trace_context({TRACEPARENT!r}):
        producer.publish(SummarizationTask("s", {{"text": "t"}}))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    broker = serve()
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, broker.url],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert (ended.stdout, ended.stderr) == ("[]\n", "")
    assert headers(broker.messages[0])["traceparent"] == TRACEPARENT


def _spans_of(producer: MLProducer) -> dict[Any, Any]:
    engine: Any = producer._life.runtime.engines[0]
    spans: dict[Any, Any] = engine.spans._open
    return spans
