"""A Celery application with a tracing tool: a worker, and as a program a sender of one task.

``TOOL`` is ``opentelemetry`` or ``sentry``; ``INSTALL`` has tasks sent through a producer. Each
tells of its spans: the trace, the span, and its parent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from telling import tell

app = Celery("instrumented", broker=os.environ["RABBITMQ_URL"])
app.conf.task_ignore_result = True


@app.task(name="shop.add")
def add(x: int, y: int) -> int:
    """Add."""
    return x + y


@worker_ready.connect
def ready(**_: object) -> None:
    """Let the test begin."""
    tell(ready=True)


def opentelemetry() -> Callable[[], AbstractContextManager[Any]]:
    """Begin to trace; return what opens a span."""
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Telling(SpanExporter):
        """Tells of each span."""

        def export(self, spans: Any) -> SpanExportResult:
            for span in spans:
                tell(
                    kind=span.kind.name,
                    trace=span.context.trace_id,
                    span=span.context.span_id,
                    parent=span.parent and span.parent.span_id,
                )
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Telling()))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
    return lambda: trace.get_tracer("shop").start_as_current_span("request")


def sentry() -> Callable[[], AbstractContextManager[Any]]:
    """Begin to trace; return what opens a span."""
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.transport import Transport

    class Telling(Transport):
        """Tells of each transaction and its spans."""

        def capture_envelope(self, envelope: Any) -> None:
            event = envelope.get_transaction_event()
            if event is not None:
                for span in (*event["spans"], event["contexts"]["trace"]):
                    tell(
                        kind=span["op"],
                        trace=span["trace_id"],
                        span=span["span_id"],
                        parent=span.get("parent_span_id"),
                    )

    sentry_sdk.init(
        "http://key@127.0.0.1:1/1",
        transport=Telling,
        traces_sample_rate=1.0,
        default_integrations=False,
        integrations=[CeleryIntegration()],
    )
    return lambda: sentry_sdk.start_transaction(op="request", name="request")


request = {"opentelemetry": opentelemetry, "sentry": sentry}[os.environ["TOOL"]]()

if __name__ == "__main__":
    if os.environ.get("INSTALL"):
        from mlproducer.contrib.celery import install, uninstall

        install(app)
    with request():
        add.delay(1, 2)
    if os.environ.get("INSTALL"):
        uninstall(app)
