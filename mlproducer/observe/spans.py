"""One span for each message, from its publisher's call to its fate, where somebody traces.

Whether anybody does is seen by OpenTelemetry being imported: nobody else could have set up a tracer
or begun a span that a message should continue. So a process without it pays for one look.

Runs on: `Spans.encode` and `Spans.follow` on the publisher's thread, events on the thread on which
they happen; spans are ended, which runs foreign code, on the callbacks' thread.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from mlproducer import tracing
from mlproducer.core.delivery import Delivery
from mlproducer.core.states import ConnectionState
from mlproducer.errors import PublishError, RetriesExhaustedError
from mlproducer.message import Envelope
from mlproducer.observe.callbacks import Dispatcher
from mlproducer.observe.events import EventSink

T = TypeVar("T")


class Span(Protocol):
    """A span of a tracing library."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Its W3C trace context."""

    @property
    def recording(self) -> bool:
        """Whether anybody will see it."""

    def describe(self, envelope: Envelope) -> None:
        """Say which message it is about."""

    def event(self, name: str, reason: PublishError | None) -> None:
        """Note what happened on the way."""

    def end(self, error: str, at: int) -> None:
        """End it; with the name of an error's class, or with none."""


class Spans(EventSink):
    """The spans of one engine's messages."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._open: dict[Delivery, Span] = {}
        self._begin: Callable[[Mapping[str, str]], Span | None] | None = None

    def encode(self, encode: Callable[[T], Envelope], task: T) -> tuple[Envelope, Span | None]:
        """Encode a message that carries on the trace of its own span, if there is one."""
        if self._begin is None and "opentelemetry.trace" in sys.modules:
            self._use_opentelemetry()
        span = None if self._begin is None else self._begin(tracing.current())
        if span is None:
            return encode(task), None
        try:
            with tracing.carrying(span.headers):
                envelope = encode(task)
        except BaseException as error:
            span.end(type(error).__name__, time.time_ns())
            raise
        if not span.recording:
            return envelope, None
        span.describe(envelope)
        return envelope, span

    def _use_opentelemetry(self) -> None:
        from mlproducer.observe import otel  # noqa: PLC0415 - it imports OpenTelemetry

        self._begin = otel.begin

    def follow(self, delivery: Delivery, span: Span) -> None:
        """End the span with the message's fate."""
        self._open[delivery] = span
        with contextlib.suppress(RuntimeError):  # the interpreter is ending, and starts no thread
            self._dispatcher.start()

    # --- events --------------------------------------------------------------------------------

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """End those of a burst."""
        if self._open:
            self._end(deliveries, "")

    def dead_lettered(self, delivery: Delivery) -> None:
        """End it as failed."""
        self._end((delivery,), RetriesExhaustedError.__name__)

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """End it as failed."""
        self._end((delivery,), type(error).__name__)

    def deferred(self, delivery: Delivery) -> None:
        """Note it, with the reason."""
        self._note(delivery, "deferred")

    def retried(self, delivery: Delivery) -> None:
        """Note it, with the reason."""
        self._note(delivery, "retried")

    def state_changed(self, state: ConnectionState) -> None:
        """End those that a durable store keeps when the producer is closed."""
        if state is ConnectionState.CLOSED:
            for delivery in self._open.copy():
                self._note(delivery, "stored")
                self._end((delivery,), "")

    def _note(self, delivery: Delivery, name: str) -> None:
        span = self._open.get(delivery)
        if span is not None:
            span.event(name, delivery.reason)

    def _end(self, deliveries: Iterable[Delivery], error: str) -> None:
        spans = [self._open.pop(delivery, None) for delivery in deliveries]
        ended = [span for span in spans if span is not None]
        if not ended:
            return
        end = partial(_end_all, ended, error, time.time_ns())
        if any(thread.is_alive() for thread in self._dispatcher.threads):
            self._dispatcher.call(end)
        else:
            end()


def _end_all(spans: Iterable[Span], error: str, at: int) -> None:
    for span in spans:
        span.end(error, at)
