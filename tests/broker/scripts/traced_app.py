"""A Celery application whose task has a span, child of the one that its message names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from kombu import Exchange, Queue
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from telling import tell

QUEUE = "ml.summarize"

app = Celery("traced", broker=os.environ["RABBITMQ_URL"])
app.conf.task_queues = [
    Queue(
        QUEUE,
        Exchange("bookmarkai.ml", type="topic"),
        routing_key=QUEUE,
        queue_arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": 20,
            "x-dead-letter-exchange": "bookmarkai.ml.dlx",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
]


class Telling(SpanExporter):
    """Tells the test of each span."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Tell the ids that lead from a span to its parent."""
        for span in spans:
            parent = span.parent
            tell(
                name=span.name,
                trace_id=None if parent is None else parent.trace_id,
                parent_id=None if parent is None else parent.span_id,
                remote=parent is not None and parent.is_remote,
            )
        return SpanExportResult.SUCCESS


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Telling()))
tracer = provider.get_tracer("worker")


@app.task(name="llm_service.tasks.summarize_content", bind=True)
def summarize(self: Any, **_: Any) -> None:
    """Do the work inside a span."""
    names = ("traceparent", "tracestate")
    carrier = {name: self.request.get(name) for name in names if self.request.get(name)}
    context = TraceContextTextMapPropagator().extract(carrier)
    with tracer.start_as_current_span("summarize", context, SpanKind.CONSUMER):
        pass


@worker_ready.connect
def ready(**_: object) -> None:
    """Let the test begin."""
    tell(ready=True)
