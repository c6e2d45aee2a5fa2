"""A trace that begins with a publisher's span goes on in a real worker."""

from __future__ import annotations

import importlib.util
import signal
import sys

import pytest

from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.testing.plugin import VirtualHost
from tests.broker.scripts import Program
from tests.helpers import LIMIT

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

from mlproducer.observe import otel

pytestmark = pytest.mark.broker


@pytest.mark.skipif(importlib.util.find_spec("celery") is None, reason="needs celery")
def test_the_workers_span_is_a_child(
    rabbitmq_vhost: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Request, message and task are one trace, each the child of the one before."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(otel, "_tracer", provider.get_tracer("mlproducer"))
    argv = [sys.executable, "-m", "celery", "--app", "traced_app", "worker", "--pool", "solo"]
    argv += ["--without-gossip", "--without-mingle", "--heartbeat-interval", "1"]
    with MLProducer(Settings(url=rabbitmq_vhost.url)) as producer:
        assert producer.wait_connected(LIMIT)
        with Program(argv, rabbitmq_vhost.url) as program:
            assert program.next() == {"ready": True}
            with provider.get_tracer("test").start_as_current_span("request"):
                assert producer.publish(SummarizationTask("s-1", {"text": "text"})).confirmed
            task = program.next()
            program.signal(signal.SIGTERM)
            assert program.end().returncode == 0
    spans = {span.name.split(maxsplit=1)[0]: span for span in exporter.get_finished_spans()}
    request, message = spans["request"].get_span_context(), spans["publish"].get_span_context()
    assert request is not None
    assert message is not None
    assert spans["publish"].parent == request
    assert task == {
        "name": "summarize",
        "trace_id": request.trace_id,
        "parent_id": message.span_id,
        "remote": True,
    }
