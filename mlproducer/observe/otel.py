"""A message's span in OpenTelemetry, after its semantic conventions for messaging and RabbitMQ.

Imported only where the process has imported OpenTelemetry itself. Without a tracer provider the
span is one that records nothing and passes the caller's context on.

Runs on: the publisher's thread, the I/O thread and the callbacks' thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mlproducer.errors import PublishError
from mlproducer.message import Envelope

OPERATION = "publish"

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("mlproducer")  # of the provider that is set by now, or later
_CONSTANT = {
    "messaging.system": "rabbitmq",
    "messaging.operation.type": "send",
    "messaging.operation.name": OPERATION,
}


class MessageSpan:
    """A span of kind PRODUCER.

    :ivar headers: the W3C trace context for the message
    :ivar recording: somebody will see the span
    """

    __slots__ = ("_span", "headers", "recording")

    def __init__(self, span: trace.Span, context: trace.SpanContext) -> None:
        self._span = span
        self.recording = span.is_recording()
        ids = f"{context.trace_id:032x}-{context.span_id:016x}"
        self.headers = {"traceparent": f"00-{ids}-{context.trace_flags:02x}"}
        if context.trace_state:
            self.headers["tracestate"] = context.trace_state.to_header()

    def describe(self, envelope: Envelope) -> None:
        """Say which message it is about: its route, id and size, nothing of what it says."""
        exchange, key = envelope.exchange, envelope.routing_key
        destination = ":".join(filter(None, (exchange, key))) or "amq.default"
        self._span.update_name(f"{OPERATION} {destination}")
        self._span.set_attributes(
            {
                "messaging.destination.name": destination,
                "messaging.rabbitmq.destination.routing_key": key,
                "messaging.message.id": envelope.message_id,
                "messaging.message.body.size": len(envelope.body),
            }
        )

    def event(self, name: str, reason: PublishError | None) -> None:
        """Note what happened on the way, with the name of the reason's class."""
        self._span.add_event(name, {} if reason is None else {"reason": type(reason).__name__})

    def end(self, error: str, at: int) -> None:
        """End the span; with the name of an error's class, or with none.

        :param at: nanoseconds since the epoch
        """
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(at)


def begin(given: Mapping[str, str]) -> MessageSpan | None:
    """Begin a message's span; there is none where nobody traces.

    :param given: the headers of a trace context handed in, which counts where no span is current
    """
    parent = None
    if given and not trace.get_current_span().get_span_context().is_valid:
        parent = _propagator.extract(given)
    span = _tracer.start_span(OPERATION, parent, trace.SpanKind.PRODUCER, _CONSTANT)
    if span is trace.INVALID_SPAN:  # no provider; older versions then forget the parent
        span = trace.get_current_span(parent)
        if span is trace.INVALID_SPAN:
            return None
    context = span.get_span_context()
    return MessageSpan(span, context) if context.is_valid else None
