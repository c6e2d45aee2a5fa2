"""One span for each message, from its publisher's call to its fate, if the process traces.

A process traces if it has imported OpenTelemetry: nothing else could have set up a tracer, or
started a span that a message continues. Without it, the cost is one lookup in ``sys.modules``.

A message in a durable store may wait there for long, and be delivered by another process. Its span
ends with the event "stored"; each later attempt has a span of its own, which links to the first
by the message's ``traceparent`` header.

A tracer is a user's code. It may be slow, so spans are ended on a thread of their own; it may
fail, and then a message has no span, or an incomplete one.

Runs on: `Spans.encode` and `Spans.follow` on the publisher's thread, events on the thread on which
they happen, the ends of spans on the thread ``mlproducer-spans``.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from types import ModuleType
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from mlproducer import _forks as forks
from mlproducer import tracing
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._foreign_calls import guarded
from mlproducer.errors import InvalidMessageError, PublishError, RetriesExhaustedError
from mlproducer.message import Envelope
from mlproducer.observe.callbacks import Dispatcher
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.observe.sinks import Sink, Table

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SAMPLED_HEADER = re.compile(rb"\x0btraceparentS\x00\x00\x00\x37(00-[0-9a-f-]{51}[13579bdf])")
"""The header of a message whose trace is sampled, as encoded: name, type, length, value."""

_W3C = ("traceparent", "tracestate")
"""What the library itself writes of a context; the rest is from the process's propagators."""


class Span(Protocol):
    """A span of a tracing library."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The W3C trace context."""

    @property
    def recording(self) -> bool:
        """Whether the span is recorded."""

    def describe(self, envelope: Envelope) -> None:
        """Set the attributes of a message."""

    def event(self, name: str, reason: PublishError | None) -> None:
        """Add an event."""

    def end(self, error: str, at: int) -> None:
        """End the span, with the name of an error's class, or an empty text."""


class OpenSpan:
    """A span that is ended once, even if an interrupt ends the call that started it.

    It exists before the span does, since an interrupt may come between any two steps. If the
    message is then dropped, so is this object, and its finalizer ends the span.

    :param dispatcher: has the thread on which spans are ended
    """

    __slots__ = ("__weakref__", "_dispatcher", "_span")

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._span: list[Span | None] = []

    def begin(self, begin: Callable[[Mapping[str, str]], Span | None]) -> Span | None:
        """Start the span, if there is one."""
        # One expression: Python handles signals only after append() has returned, and the list
        # has the span.
        self._span.append(begin(tracing.current()))
        return self._span[0]

    def take(self) -> Span | None:
        """Return the span to the caller, who has to end it; ``None`` where it was taken already."""
        try:
            return self._span.pop()
        except IndexError:
            return None

    def note(self, name: str, reason: PublishError | None) -> None:
        """Add an event."""
        # A loop, and not a look and an index: another thread may take it between the two.
        for span in self._span:
            if span is not None:
                span.event(name, reason)

    def end(self, error: str) -> None:
        """Have the span ended on its thread."""
        span = self.take()
        if span is not None:
            self._dispatcher.traces().call(partial(span.end, error, time.time_ns()))

    def __del__(self) -> None:
        if self._dispatcher.futures.is_ours():  # a forked child leaves spans to its parent
            self.end("interrupted")


_ABOUT_OPEN_SPANS = (
    events.Confirmed,
    events.Deferred,
    events.AttemptFailed,
    events.Failed,
    events.Retried,
)


class Spans(Sink):
    """The spans of one producer's messages.

    :param durable: messages wait in a store that outlives the process
    """

    def __init__(self, dispatcher: Dispatcher, *, durable: bool = False) -> None:
        self._dispatcher = dispatcher
        self._durable = durable
        self._lines = LimitedLogger(logger)
        self._open: WeakKeyDictionary[Delivery, OpenSpan] = WeakKeyDictionary()
        self._tracer: ModuleType | None = None
        self._usable = True

    def encode(self, encode: Callable[[T], Envelope], task: T) -> tuple[Envelope, OpenSpan | None]:
        """Encode a message with the trace context of its span, if there is one; return both."""
        if not self._traces():
            return encode(task), None
        opened = OpenSpan(self._dispatcher)
        span = self._begin(opened)
        if span is None:
            return encode(task), None
        try:
            envelope = self._carried(encode, task, span.headers)
        except BaseException as error:
            opened.end(type(error).__name__)
            raise
        if not span.recording:
            opened.take()
            return envelope, None
        self._report(guarded(span.describe, envelope))
        return envelope, opened

    def _carried(
        self, encode: Callable[[T], Envelope], task: T, given: Mapping[str, str]
    ) -> Envelope:
        """Encode a message with a trace context; without what AMQP cannot carry of it."""
        try:
            with tracing.carrying(given):
                return encode(task)
        except InvalidMessageError as error:
            own = {name: given[name] for name in _W3C if name in given}
            with tracing.carrying(own):
                envelope = encode(task)  # raises if the task itself is invalid
            self._report(error)
            return envelope

    def follow(self, delivery: Delivery, span: OpenSpan) -> None:
        """End the span with the message's fate."""
        self._dispatcher.traces()  # starts the thread, which must not happen on the I/O thread
        self._open[delivery] = span

    def close(self) -> None:
        """End the spans that are left when the producer is closed: their messages are stored."""
        for reference in self._open.keyrefs():
            delivery = reference()
            if delivery is not None:
                self._end_stored(delivery)

    def _begin(self, opened: OpenSpan) -> Span | None:
        try:
            return opened.begin(self._tracer.begin)  # type: ignore[union-attr]
        except Exception as error:  # noqa: BLE001 - a tracer may raise anything
            self._report(error)
            return None

    def _traces(self) -> bool:
        if self._tracer is None and self._usable and "opentelemetry.trace" in sys.modules:
            try:
                with forks.importing():
                    from mlproducer.observe import otel  # noqa: PLC0415 - it imports OpenTelemetry
            except Exception as error:  # noqa: BLE001 - an unsuitable version may raise anything
                self._usable = False
                self._report(error)
            else:
                self._tracer = otel
        return self._tracer is not None

    def _report(self, error: BaseException | None) -> None:
        if error is not None:
            self._lines.log(logging.ERROR, "the tracer failed", error=error)

    # --- events --------------------------------------------------------------------------------

    def table(self) -> Table:
        """Return what begins, notes and ends."""
        return {
            events.Confirmed: self._confirmed,
            events.DeadLettered: self._dead_lettered,
            events.Failed: self._failed,
            events.Deferred: self._deferred,
            events.AttemptFailed: self._attempt_failed,
            events.Resumed: self._resumed,
            events.Retried: self._retried,
        }

    def wants(self, kind: type[events.Event]) -> Sized | None:
        """Return the open spans for what is noted on them, or ends them, and begins none."""
        return self._open if kind in _ABOUT_OPEN_SPANS else None

    def _confirmed(self, event: events.Confirmed) -> None:
        """End the spans of the messages."""
        self._end(event.deliveries, "")

    def _dead_lettered(self, event: events.DeadLettered) -> None:
        """End the span as failed; a message from a durable store gets a span for this."""
        self._resume(event.delivery)
        self._end((event.delivery,), RetriesExhaustedError.__name__)

    def _failed(self, event: events.Failed) -> None:
        """End the span as failed."""
        self._end((event.delivery,), type(event.error).__name__)

    def _deferred(self, event: events.Deferred | events.AttemptFailed) -> None:
        """Add an event with the reason; end the span where the message waits in a durable store."""
        self._note(event.delivery, "deferred")
        if self._durable:
            self._end_stored(event.delivery)

    def _attempt_failed(self, event: events.AttemptFailed) -> None:
        """End the span of a later attempt, whose message goes back to the durable store."""
        if self._durable and event.delivery.in_store:
            self._deferred(event)

    def _resumed(self, event: events.Resumed) -> None:
        """Start the span of a later attempt, after the first ended, perhaps in another process."""
        if not event.delivery.dead:
            self._resume(event.delivery)

    def _retried(self, event: events.Retried) -> None:
        """Add an event with the reason."""
        self._note(event.delivery, "retried")

    def _resume(self, delivery: Delivery) -> None:
        if not self._durable or delivery in self._open or not self._traces():
            return
        found = _SAMPLED_HEADER.search(delivery.envelope.properties)
        if found is not None:
            link = found[1].decode()
            span: Span = self._tracer.LaterSpan(link, time.time_ns())  # type: ignore[union-attr]
            span.describe(delivery.envelope)
            self._open[delivery] = opened = OpenSpan(self._dispatcher)
            opened.begin(lambda _given: span)

    def _note(self, delivery: Delivery, name: str) -> None:
        opened = self._open.get(delivery)
        if opened is not None:
            self._report(guarded(opened.note, name, delivery.reason))

    def _end_stored(self, delivery: Delivery) -> None:
        opened = self._open.get(delivery)
        if opened is not None:
            self._report(guarded(opened.note, "stored", None))
            self._end((delivery,), "")

    def _end(self, deliveries: Iterable[Delivery], error: str) -> None:
        opened = [self._open.pop(delivery, None) for delivery in deliveries]
        spans = [each.take() for each in opened if each is not None]
        ended = [span for span in spans if span is not None]
        if ended:
            end = partial(self._end_all, ended, error, time.time_ns())
            self._dispatcher.traces().call(end)

    def _end_all(self, spans: Iterable[Span], error: str, at: int) -> None:
        for span in spans:
            self._report(guarded(span.end, error, at))
