"""`MLProducer`, the class that users call.

A producer is cheap until it is used: its runtime, with every thread and connection, starts with the
first publish, and starts again in a forked child. The runtime holds no reference to the producer:
one that the program has dropped delivers the messages that it has, and is then closed.

Runs on: the users' threads.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._answers import Answer, PendingAnswers, finish
from mlproducer._core.delivery import Delivery, Waiter
from mlproducer._core.states import CircuitState
from mlproducer._engine.lifecycle import Lifecycle, RuntimeFactory
from mlproducer._foreign_calls import guarded
from mlproducer._synchronization import seconds
from mlproducer._wire.encode import Encoder, Task
from mlproducer.errors import (
    BufferFullError,
    ConfigurationError,
    InvalidMessageError,
    InvalidTaskError,
    PublishError,
    frameless,
)
from mlproducer.message import Envelope, Receipt
from mlproducer.observe.callbacks import Callbacks, DeliveryFuture, Event, EventName
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.observe.recent_history import RecentHistory
from mlproducer.settings import RetryPolicy, Settings, redact
from mlproducer.status import CloseReport, Status
from mlproducer.stores import anchored
from mlproducer.tasks import EmbeddingBatchTask, EmbeddingTask, SummarizationTask, TranscriptionTask
from mlproducer.topology import Declaration

if TYPE_CHECKING:
    from mlproducer._engine.engine import Engine
    from mlproducer.observe.producer_metrics import ProducerMetrics
    from mlproducer.stores.protocol import Claim, Store

logger = logging.getLogger(__name__)

Retry = bool | RetryPolicy
"""Whether a message that cannot be delivered now is kept, and how it is retried."""

Hook = Callable[[Task, dict[str, Any]], object]
"""An argument of `MLProducer.before_publish`: it may add to the headers of a task."""


made: weakref.WeakSet[MLProducer] = weakref.WeakSet()
"""The producers of this process."""


class MLProducer:
    """Publishes tasks to RabbitMQ; safe for threads and forks, and idle until it is used.

    :param settings: ``None`` reads the environment
    :param registry: a prometheus-client registry; ``None`` is the default registry
    :param store: where messages wait for a retry; ``None`` is the store that the settings name
    :raises ConfigurationError: a variable of the environment does not parse, or
        ``PROMETHEUS_MULTIPROC_DIR`` names no directory
    """

    def __init__(
        self, settings: Settings | None = None, *, registry: Any = None, store: Store | None = None
    ) -> None:
        if settings is not None and not isinstance(settings, Settings):
            raise TypeError(
                f"settings is {type(settings).__name__}: pass MLProducer(Settings(url=...)), or "
                "nothing where RABBITMQ_URL is set"
            )
        self.settings = anchored(Settings.from_env() if settings is None else settings)
        self._encoder = Encoder(self.settings)
        self._callbacks = Callbacks()
        self._hooks: list[Hook] = []
        self._lines = LimitedLogger(logger)
        self._factory = RuntimeFactory(self.settings, store, registry, self._callbacks)
        holder = weakref.ref(self)
        self._life = Lifecycle(self._factory, lambda: holder() is not None)
        self._factory.lifecycle = weakref.ref(self._life)
        made.add(self)
        if "prometheus_client" in sys.modules or os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._meter()  # otherwise nothing reads metrics yet, and the import can wait

    def __repr__(self) -> str:
        state = self.status().connection_state.name
        return f"<MLProducer {redact(self.settings.url or '') or 'no URL'} {state}>"

    # --- publishing ----------------------------------------------------------------------------

    def publish(self, task: Task, *, timeout: float | None = None, retry: Retry = True) -> Receipt:
        """Publish, and wait for the broker's answer.

        If it returns, the library owns the message: it is confirmed, or kept and retried. If it
        raises, the caller owns it: it will never be sent later.

        :param task: a task or `Message`
        :param timeout: seconds for the whole call; ``None`` is ``settings.publish_timeout``
        :param retry: keep a message that cannot be delivered now, and try again as the settings
            say, or as a `RetryPolicy` says; with False its error is raised
        :raises PublishError: see its ``possibly_sent``, and the README for each subclass
        """
        started = time.monotonic()
        runtime = self._life.started()
        engine = runtime.only or runtime.choose()
        answer = Answer(engine.relay)
        delivery = self._delivery(engine, task, answer, timeout, started, retry=retry)
        try:
            if engine.gate.enter(delivery, delivery.deadline):
                engine.post(delivery)
            else:
                engine.turn_away(delivery)
            return finish(engine, delivery, answer)
        except BaseException:
            if delivery.open:  # the error is not the message's: Ctrl-C, or from a signal handler
                engine.withdraw(delivery)
            raise

    async def apublish(
        self, task: Task, *, timeout: float | None = None, retry: Retry = True
    ) -> Receipt:
        """Publish, and await the broker's answer: `publish` without blocking the event loop.

        Cancellation ends the wait, not the delivery: once the message is queued it is delivered as
        if it was waited for until ``timeout``, and its outcome is seen only in metrics, logs and
        callbacks. Cancelled before that, while the in-flight window is full, it is never sent.

        :param task: a task or `Message`
        :param timeout: seconds for the whole call; ``None`` is ``settings.publish_timeout``
        :param retry: keep a message that cannot be delivered now, and try again as the settings
            say, or as a `RetryPolicy` says; with False its error is raised
        :raises PublishError: as for `publish`
        """
        started = time.monotonic()
        awaiting = _awaiting()
        if self._life.runtime is None:
            await awaiting.in_thread(self._life.started)  # imports and files, once
        engine = self._life.started().choose()
        answer = awaiting.AwaitedAnswer(engine.relay)
        delivery = self._delivery(engine, task, answer, timeout, started, retry=retry)
        try:
            await awaiting.hand_over(engine, delivery)
        except BaseException:
            if delivery.open:
                engine.withdraw(delivery)
            raise
        receipt: Receipt = await awaiting.finish(engine, delivery, answer)
        return receipt

    def submit(
        self, task: Task, *, timeout: float | None = None, retry: Retry = True
    ) -> DeliveryFuture:
        """Publish without waiting for the broker.

        If messages are written ahead, it also waits until this one is stored, at most
        ``publish_timeout``; in an event loop use `apublish` then.

        :param timeout: seconds to wait while the in-flight window is full; 0 never waits, ``None``
            is ``settings.publish_timeout``
        :returns: a future with ``message_id``, resolved when the message's fate is known
        :raises BufferFullError: the in-flight window was full for ``timeout``
        :raises StoreError: messages are written ahead, and this one could not be stored in time
        """
        started = time.monotonic()
        engine = self._life.started().choose()
        future = DeliveryFuture(engine.dispatcher)
        patience = self.settings.publish_timeout if timeout is None else seconds(timeout)
        delivery = self._delivery(
            engine, task, future, None, started, retry=retry, answers_deferral=False
        )
        future.message_id = delivery.envelope.message_id
        future.delivery = delivery
        try:
            if not engine.gate.enter(delivery, started + patience):
                raise BufferFullError(
                    f"{self.settings.max_in_flight} messages are in flight",
                    message_id=future.message_id,
                )
            engine.post_stored(delivery)
        except BaseException as error:
            engine.withdraw(delivery, error)
            raise
        return future

    def publish_many(
        self, tasks: Iterable[Task], *, timeout: float | None = None, retry: Retry = True
    ) -> list[Receipt | PublishError]:
        """Publish many tasks, pipelined; a task that fails does not affect the others.

        If ``tasks`` itself raises, the tasks taken from it are finished first, and the exception
        gets an attribute ``results``: what would have been returned for these.

        :param tasks: taken one by one, at most the in-flight window ahead of the confirms
        :param timeout: seconds for each message, from when it is taken
        :returns: the receipt or the error of each task, in order
        """
        runtime = self._life.started()
        line = PendingAnswers()
        try:
            for task in line.taken_from(tasks):
                if self._life.runtime is not runtime or not forks.begun[0]:
                    line.leave_to_parent()  # `tasks` has forked, and this is the child
                    runtime = self._life.started()
                engine = runtime.choose()
                answer = Answer(engine.relay)
                try:
                    delivery = self._delivery(
                        engine, task, answer, timeout, time.monotonic(), retry=retry
                    )
                except PublishError as error:
                    line.skip(error)
                else:
                    line.enter(engine, delivery, answer)
            return line.finish()
        except BaseException:
            line.withdraw()
            raise

    @frameless
    def publish_summarization_task(
        self,
        share_id: str | int | UUID,
        content: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Build a `SummarizationTask` and `publish` it."""
        return self._publish_new(SummarizationTask, share_id, content, options)

    @frameless
    def publish_transcription_task(
        self,
        share_id: str | int | UUID,
        media_url: str,
        options: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Build a `TranscriptionTask` and `publish` it."""
        return self._publish_new(TranscriptionTask, share_id, media_url, options)

    @frameless
    def publish_embedding_task(
        self,
        share_id: str | int | UUID,
        content: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Build an `EmbeddingTask` and `publish` it."""
        return self._publish_new(EmbeddingTask, share_id, content, options)

    @frameless
    def publish_embedding_batch_task(self, items: Sequence[Any]) -> Receipt:
        """Build an `EmbeddingBatchTask` and `publish` it."""
        return self._publish_new(EmbeddingBatchTask, items)

    def _publish_new(self, kind: Callable[..., Task], *fields: Any) -> Receipt:
        try:
            task = kind(*fields)
        except InvalidTaskError as error:
            self._meter().refused(kind, error)
            raise
        return self.publish(task)

    def _delivery(
        self,
        engine: Engine,
        task: Task,
        answer: Waiter,
        timeout: float | None,
        started: float,
        *,
        retry: Retry,
        answers_deferral: bool = True,
    ) -> Delivery:
        patience = self.settings.publish_timeout if timeout is None else seconds(timeout)
        policy = None if retry is True or retry is False else self._checked(retry)
        encode = self._encode_hooked if self._hooks else self._encoder.encode
        try:
            if "opentelemetry.trace" in sys.modules:
                envelope, span = engine.spans.encode(encode, task)
            else:
                envelope, span = encode(task), None
        except PublishError as error:
            self._meter().refused(task, error)
            raise
        delivery = Delivery(
            envelope,
            answer,
            started=started,
            deadline=started + patience,
            retry=retry is not False,
            policy=policy,
            answers_deferral=answers_deferral,
            owner=engine.io,
        )
        if span is not None:
            engine.spans.follow(delivery, span)
        if engine.breaker.state is not CircuitState.CLOSED:
            refusal = engine.refuse(delivery)
            if refusal is not None:
                raise refusal
        return delivery

    def _checked(self, retry: object) -> RetryPolicy:
        """Check a retry policy against the store."""
        if not isinstance(retry, RetryPolicy):
            raise ConfigurationError(
                f"retry must be True, False or a RetryPolicy, got {type(retry).__name__}"
            )
        longest = max(self.settings.store_lease, self.settings.message_retry_max_delay)
        durable = not self.settings.store_url.startswith("memory:")
        if durable and retry.max_delay > longest:
            # The store takes a row that is due later than this for one of a clock that was wrong.
            raise ConfigurationError(
                f"max_delay of a RetryPolicy must be at most {longest:g} s with this store; a "
                "longer store_lease (ML_STORE_LEASE) or message_retry_max_delay raises the limit"
            )
        return retry

    def _meter(self) -> ProducerMetrics:
        return self._factory.meter()

    def before_publish(self, hook: Hook) -> None:
        """Call ``hook(task, headers)`` before each message is encoded, on the publisher's thread.

        It may add AMQP headers to the dictionary ``headers``, which has those of the task. A hook
        that raises, or adds what AMQP cannot carry, is logged and adds nothing.

        :param hook: called for every message, so it should be fast
        """
        self._hooks.append(hook)

    def check(self, task: Task) -> None:
        """Check a task as `publish` does, without publishing it.

        It needs no broker and starts nothing. Hooks of `before_publish` are called.

        :raises InvalidMessageError: it is not a task, or AMQP or strict JSON cannot carry it
        :raises MessageTooLargeError: its body is longer than ``max_message_bytes``
        """
        self.prepare(task)

    def note_refused(self, task: Task, error: Exception) -> None:
        """Count a task that was refused when no caller could get the error, and call back.

        For publishing after a COMMIT. Callbacks of ``on("refused")`` are called; on this thread if
        the producer has not been started.

        :param error: the error that `publish` raised
        """
        counted = getattr(error, "message_id", None) or isinstance(error, InvalidMessageError)
        if not counted:  # it was raised before there was a message
            self._meter().refused(task, error)
        own = getattr(task, "task_id", None) or getattr(task, "message_id", None)
        message_id = getattr(error, "message_id", None) or own
        self._call_back(Event("refused", message_id, type(error).__name__))

    def _call_back(self, event: Event) -> None:
        """Have the callbacks of an event called that does not come from the engine."""
        runtime = self._life.runtime
        for callback in self._callbacks.of(event.name):
            call = partial(callback, event)
            if runtime is not None:
                runtime.dispatcher.events.call(call)
            elif (raised := guarded(call)) is not None:
                self._lines.log(logging.ERROR, "a callback raised", error=raised)

    def _encode_hooked(self, task: Task) -> Envelope:
        """Encode a task with the headers that hooks add, or without them if they cannot be sent."""
        headers = dict(getattr(task, "headers", None) or {})
        for hook in self._hooks:
            added = headers.copy()
            try:
                hook(task, added)
            except Exception as error:  # noqa: BLE001 - the message is sent all the same
                text = "a before_publish hook raised:"
                self._lines.log(logging.WARNING, text, "%s", type(error).__name__)
            else:
                headers = added
        hooked = copy(task)
        object.__setattr__(hooked, "headers", headers)
        try:
            return self._encoder.encode(hooked)
        except InvalidMessageError:
            envelope = self._encoder.encode(task)  # raises if the task itself is invalid
        text = "headers that before_publish hooks have added cannot be sent"
        self._lines.log(logging.WARNING, text)
        return envelope

    def declare(self, declarations: Iterable[Declaration], *, timeout: float | None = None) -> bool:
        """Declare queues and exchanges besides the topology, now and on each later connection.

        Without a connection it returns at once: they are declared when there is one, before
        anything is published. A declaration that the broker refuses is logged and skipped.

        :param timeout: seconds to wait for the broker; ``None`` is ``settings.publish_timeout``
        :returns: false if the broker did not answer in time
        """
        patience = self.settings.publish_timeout if timeout is None else seconds(timeout)
        deadline = time.monotonic() + patience
        added = self._factory.added
        added.extend([each for each in declarations if each not in added])
        return self._life.started().declare(deadline)

    def prepare(self, task: Task, *, retry: Retry = True) -> tuple[Envelope, RetryPolicy | None]:
        """Check and encode a task as `publish` does, for an outbox; nothing is sent.

        :returns: the message, and its own retry policy, if it has one
        :raises InvalidMessageError: it cannot be sent
        """
        if retry is True:
            policy = None
        elif retry is False:
            policy = RetryPolicy(0, *self._delays())
        else:
            policy = self._checked(retry)
        try:
            encode = self._encode_hooked if self._hooks else self._encoder.encode
            return encode(task), policy
        except PublishError as error:
            self._meter().refused(task, error)
            raise

    def _delays(self) -> tuple[float, float]:
        settings = self.settings
        return settings.message_retry_base_delay, settings.message_retry_max_delay

    def follow(self, delivery: Delivery, claim: Claim) -> None:
        """Resolve the receipt of an outbox row, as long as this producer runs."""
        runtime = self._life.runtime
        if runtime is not None and self.running:
            runtime.expect(delivery, claim)

    def rest(self) -> None:
        """Leave the rows of the store to other processes, but for those that are in flight."""
        runtime = self._life.runtime
        if runtime is not None:
            runtime.rest()

    @property
    def running(self) -> bool:
        """Whether the producer has been started and not closed."""
        return self._life.runtime is not None and not self._life.closed

    @property
    def closed(self) -> bool:
        """Whether the producer has been closed."""
        return self._life.closed

    # --- state ---------------------------------------------------------------------------------

    def status(self) -> Status:
        """Return the current status, without asking the broker."""
        return self._life.status()

    def is_healthy(self) -> bool:
        """Return whether messages get through: connected, breaker not open, not blocked."""
        return self.status().healthy

    def recent(self) -> RecentHistory:
        """Return rates, errors and dead letters of the last minutes, without asking the broker."""
        return self._factory.recorder.recent()

    def on(self, event: EventName, callback: Callable[..., object]) -> None:
        """Call ``callback`` at an event, on a thread of its own.

        If callbacks are so slow that 10,000 calls wait, further calls are dropped, counted and
        logged; callbacks added to a future by ``add_done_callback`` are never dropped.

        :param event: ``connected``, ``disconnected``, ``blocked``, ``unblocked``, ``gave_up``,
            ``circuit_opened``, ``circuit_closed``, ``confirmed``, ``deferred``, ``dead_lettered``,
            or ``refused``: a task could not be published after its COMMIT
        :param callback: takes an `mlproducer.observe.callbacks.Event`, or no argument
        :raises ValueError: there is no such event
        :raises TypeError: the callback is not callable
        """
        self._callbacks.add(event, callback)

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start connecting in the background; otherwise the first publish does.

        :raises ConfigurationError: no broker is named, or a TLS file is unusable
        :raises ProducerClosedError: the producer was closed
        """
        self._life.started()

    def wait_connected(self, timeout: float | None = None) -> bool:
        """Wait until there is a connection that is ready for messages.

        :param timeout: seconds; ``None`` waits without a limit
        :returns: false after the timeout, or when another thread closes the producer
        """
        patience = None if timeout is None else seconds(timeout)
        return self._life.started().wait_connected(patience)

    def reconnect(self) -> None:
        """Connect now, unless connected; start over if the attempts are used up."""
        self._life.started(blocking=False).reconnect()

    def flush(self, timeout: float | None = None) -> int:
        """Wait until nothing is in flight or waiting for a retry.

        With a durable store it starts the producer, since other processes may have left rows there.
        It also returns when another thread has closed the producer.

        :param timeout: seconds; ``None`` waits without a limit
        :returns: how many messages are left
        """
        runtime = self._life.runtime
        if runtime is None and (self._life.closed or not self._factory.stores_durably()):
            return 0
        deadline = None if timeout is None else time.monotonic() + seconds(timeout)
        if runtime is not None and self._life.closed:
            return runtime.flush(deadline)  # another thread closes it, or has
        return self._life.started().flush(deadline)

    def close(self, timeout: float | None = None) -> CloseReport:
        """Drain, then close; within ``timeout`` + 0.5 s, from any thread, any number of times.

        In a callback nothing is drained, since that would wait for the callback itself. Ctrl-C ends
        the wait, not the closing: the next call, or the end of the process, finishes it. If several
        threads close, the shortest timeout applies, and all get the same report.

        :param timeout: seconds for draining; ``None`` is 10 s, but at most
            ``settings.exit_timeout`` if no broker is reachable
        """
        report = self._life.close(None if timeout is None else seconds(timeout))
        self._lines.close()
        return report

    def __enter__(self) -> MLProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("an MLProducer cannot be pickled; pickle its settings")

    @property
    def registry(self) -> Any:
        """The registry of the metrics, which are registered now if they are not yet."""
        self._meter()
        return self._factory.registry


@lru_cache(1)
def _awaiting() -> ModuleType:
    """Import what needs asyncio, which a program without an event loop need not load."""
    with forks.importing():
        from mlproducer import _async_answers as awaiting  # noqa: PLC0415 - asyncio is slow to import

    return awaiting
