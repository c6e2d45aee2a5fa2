"""Spans of messages in OpenTelemetry, following its semantic conventions for RabbitMQ.

What travels with a message is what the process's own propagators write (``OTEL_PROPAGATORS``:
baggage, B3), and the W3C context in any case, to which the spans of later attempts link.

Imported only where the process has imported OpenTelemetry. Without a tracer provider a span records
nothing, and passes on the caller's context.

Runs on: the publisher's thread, the I/O thread, and the thread that ends spans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlproducer.errors import PublishError
from mlproducer.message import Envelope
from mlproducer.tasks import RESERVED_HEADERS

OPERATION = "publish"

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("mlproducer")  # of the provider that is set now, or later
_CONSTANT = {
    "messaging.system": "rabbitmq",
    "messaging.operation.type": "send",
    "messaging.operation.name": OPERATION,
}


class MessageSpan:
    """A span of kind PRODUCER.

    :ivar headers: what the process's propagators, and the W3C's, write of its context
    :ivar recording: the span is recorded, and the library's own
    """

    __slots__ = ("_span", "headers", "recording")

    def __init__(self, span: trace.Span, headers: Mapping[str, str], *, recording: bool) -> None:
        self._span = span
        self.headers = headers
        self.recording = recording

    def describe(self, envelope: Envelope) -> None:
        """Set the attributes of a message: its route, id and size, nothing of its content."""
        facts = _facts(envelope)
        self._span.update_name(f"{OPERATION} {facts['messaging.destination.name']}")
        self._span.set_attributes(facts)

    def event(self, name: str, reason: PublishError | None) -> None:
        """Add an event, with the name of the reason's class."""
        self._span.add_event(name, {} if reason is None else {"reason": type(reason).__name__})

    def end(self, error: str, at: int) -> None:
        """End the span, if it is the library's own.

        :param error: the name of the error's class; empty where there was none

        :param at: nanoseconds since the epoch
        """
        if self.recording:
            _end(self._span, error, at)


class LaterSpan:
    """The span of a later attempt of a message that was stored, perhaps by another process.

    The tracer's span is created when this one ends: attempts begin on the I/O thread, where no
    tracer may be called.

    :param link: the ``traceparent`` of the message, to which the span links
    :param at: when the attempt began, in nanoseconds since the epoch
    """

    headers: Mapping[str, str] = MappingProxyType({})
    recording = True

    def __init__(self, link: str, at: int) -> None:
        self._link = link
        self._began = at
        self._facts: dict[str, str | int] = {}
        self._events: list[tuple[str, dict[str, str], int]] = []

    def describe(self, envelope: Envelope) -> None:
        """Set the attributes of a message."""
        self._facts = _facts(envelope)

    def event(self, name: str, reason: PublishError | None) -> None:
        """Add an event, with the name of the reason's class."""
        attributes = {} if reason is None else {"reason": type(reason).__name__}
        self._events.append((name, attributes, time.time_ns()))

    def end(self, error: str, at: int) -> None:
        """Start and end the span, in a trace of its own: the first may have ended long ago.

        :param error: the name of the error's class; empty where there was none

        :param at: nanoseconds since the epoch
        """
        first = trace.get_current_span(_propagator.extract({"traceparent": self._link}))
        span = _tracer.start_span(
            f"{OPERATION} {self._facts['messaging.destination.name']}",
            Context(),
            trace.SpanKind.PRODUCER,
            {**_CONSTANT, **self._facts},
            [trace.Link(first.get_span_context())],
            self._began,
        )
        for name, attributes, happened in self._events:
            span.add_event(name, attributes, happened)
        _end(span, error, at)


def _facts(envelope: Envelope) -> dict[str, str | int]:
    exchange, key = envelope.exchange, envelope.routing_key
    return {
        "messaging.destination.name": ":".join(filter(None, (exchange, key))) or "amq.default",
        "messaging.rabbitmq.destination.routing_key": key,
        "messaging.message.id": envelope.message_id,
        "messaging.message.body.size": len(envelope.body),
    }


def _end(span: trace.Span, error: str, at: int) -> None:
    if error:
        span.set_attribute("error.type", error)
        span.set_status(trace.StatusCode.ERROR, error)
    span.end(at)


def begin(given: Mapping[str, str]) -> MessageSpan | None:
    """Start a message's span; return ``None`` where nothing is traced.

    :param given: the headers of a trace context, the parent where no span is current
    """
    current = trace.get_current_span()
    if _is_of_an_instrumentation(current):
        return _travelling(current, recording=False)
    parent = None
    if given and not current.get_span_context().is_valid:
        parent = _propagator.extract(given)
    begun = _tracer.start_span(OPERATION, parent, trace.SpanKind.PRODUCER, _CONSTANT)
    try:
        span = begun
        if span is trace.INVALID_SPAN:  # no provider; older versions then lose the parent
            span = trace.get_current_span(parent)
        return _travelling(span, recording=span.is_recording())
    except BaseException:  # an interrupt
        begun.end()
        raise


def _is_of_an_instrumentation(span: trace.Span) -> bool:
    """Whether an instrumentation, such as Celery's, has begun a span for this message already."""
    scope = getattr(span, "instrumentation_scope", None)
    name = getattr(scope, "name", "")
    is_producer = getattr(span, "kind", None) is trace.SpanKind.PRODUCER
    return is_producer and name.startswith("opentelemetry.instrumentation.")


def _travelling(span: trace.Span, *, recording: bool) -> MessageSpan | None:
    """Return a span with the headers of its context; ``None`` where there are none."""
    written: dict[str, str] = {}
    propagate.inject(written, trace.set_span_in_context(span))
    headers = {
        name: value
        for name, value in written.items()
        if isinstance(value, str) and name not in RESERVED_HEADERS
    }
    context = span.get_span_context()
    if context.is_valid:
        ids = f"{context.trace_id:032x}-{context.span_id:016x}"
        headers["traceparent"] = f"00-{ids}-{context.trace_flags:02x}"
        if context.trace_state:
            headers["tracestate"] = context.trace_state.to_header()
    return MessageSpan(span, headers, recording=recording) if headers else None
