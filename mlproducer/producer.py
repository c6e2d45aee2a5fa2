"""The producer: what users call. It wires the rooms together and waits on its users' behalf.

A producer is cheap until it is used: its engine, and with it every thread and connection, begins at
the first publish, and begins afresh in a forked child.

Runs on: the users' threads.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlproducer.core.delivery import Delivery, Handshake
from mlproducer.core.states import ConnectionState
from mlproducer.engine import process
from mlproducer.engine.lifecycle import Lifecycle
from mlproducer.errors import (
    BufferFullError,
    ConfigurationError,
    InvalidTaskError,
    PublishError,
)
from mlproducer.fence import write
from mlproducer.message import Receipt
from mlproducer.observe.callbacks import Callbacks, DeliveryFuture, EventName
from mlproducer.observe.recent import Recent, Recorder
from mlproducer.settings import Settings, redact
from mlproducer.status import CloseReport, Status
from mlproducer.stores import anchored
from mlproducer.stores.protocol import Store
from mlproducer.tasks import EmbeddingBatchTask, EmbeddingTask, SummarizationTask, TranscriptionTask
from mlproducer.waiting import Answer, Line, finish
from mlproducer.wire.encode import Encoder, Task

if TYPE_CHECKING:
    from mlproducer.engine.engine import Engine
    from mlproducer.engine.fleet import Fleet
    from mlproducer.observe.meter import Meter

logger = logging.getLogger(__name__)

_inherited: list[Lifecycle] = []
"""Engines of parent processes: kept, so that nothing of theirs is collected, closed or flushed."""


class MLProducer:
    """Publishes tasks to RabbitMQ; thread-safe, fork-safe, and quiet until it is used.

    :param settings: ``None`` reads the environment
    :param registry: a prometheus-client registry; ``None`` is that library's default one
    :param store: where messages wait for a retry; ``None`` is what the settings name
    :raises ConfigurationError: a variable of the environment does not parse, or
        ``PROMETHEUS_MULTIPROC_DIR`` names no directory
    """

    def __init__(
        self, settings: Settings | None = None, *, registry: Any = None, store: Store | None = None
    ) -> None:
        self.settings = anchored(Settings.from_env() if settings is None else settings)
        self._registry = registry
        self._made_meter: Meter | None = None
        self._store = store
        self._encoder = Encoder(self.settings)
        self._callbacks = Callbacks()
        self._recorder = Recorder()
        self._life = Lifecycle(self._make_fleet)
        process.remember(self)
        if "prometheus_client" in sys.modules or os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            self._meter()  # else nothing looks at metrics yet, and the import can wait

    def __repr__(self) -> str:
        return f"<MLProducer {redact(self.settings.url or '') or 'no URL'} {self._state().name}>"

    # --- publishing ----------------------------------------------------------------------------

    def publish(self, task: Task, *, timeout: float | None = None, retry: bool = True) -> Receipt:
        """Publish, and wait for the broker's answer.

        Returning means that the message is ours: confirmed, or kept and tried again. Raising means
        that it is yours: it will never be sent later.

        :param task: a task or `Message`
        :param timeout: seconds for the whole call; ``None`` is ``settings.publish_timeout``
        :param retry: keep a message that cannot be delivered now; otherwise its error is raised
        :raises PublishError: see its ``possibly_sent``; the README tells what to do about which
        """
        started = time.monotonic()
        engine = self._life.running().choose()
        answer = Answer(engine.relay)
        delivery = self._delivery(engine, task, answer, timeout, started, retry=retry)
        try:
            if engine.gate.enter(delivery, delivery.deadline):
                engine.post(delivery)
            else:
                engine.turn_away(delivery)
            return finish(engine, delivery, answer)
        except PublishError:
            raise
        except BaseException:
            engine.withdraw(delivery)
            raise

    def submit(self, task: Task, *, retry: bool = True) -> DeliveryFuture:
        """Publish without waiting for the broker.

        :returns: a future with ``message_id``, resolved once the message's fate is known
        :raises BufferFullError: the in-flight window was full for ``publish_timeout``
        :raises StoreError: messages are written ahead, and this one could not be stored in time
        """
        started = time.monotonic()
        engine = self._life.running().choose()
        future = DeliveryFuture(engine.dispatcher)
        delivery = self._delivery(
            engine, task, future, None, started, retry=retry, answer_deferral=False
        )
        future.message_id = delivery.envelope.message_id
        future.delivery = delivery
        try:
            if not engine.gate.enter(delivery, delivery.deadline):
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
        self, tasks: Iterable[Task], *, timeout: float | None = None, retry: bool = True
    ) -> list[Receipt | PublishError]:
        """Publish many, pipelined; one that fails fails alone.

        :param tasks: taken one by one, at most the in-flight window ahead of the confirms
        :param timeout: seconds for each message, from when it is taken
        :returns: for each task, in order, its receipt or its error
        """
        fleet = self._life.running()
        line = Line()
        try:
            for task in tasks:
                engine = fleet.choose()
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

    def publish_summarization_task(
        self, share_id: str, content: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> Receipt:
        """Build a `SummarizationTask` and `publish` it."""
        return self._publish_new(SummarizationTask, share_id, content, options)

    def publish_transcription_task(
        self, share_id: str, media_url: str, options: Mapping[str, Any] | None = None
    ) -> Receipt:
        """Build a `TranscriptionTask` and `publish` it."""
        return self._publish_new(TranscriptionTask, share_id, media_url, options)

    def publish_embedding_task(
        self, share_id: str, content: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> Receipt:
        """Build an `EmbeddingTask` and `publish` it."""
        return self._publish_new(EmbeddingTask, share_id, content, options)

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
        answer: Handshake,
        timeout: float | None,
        started: float,
        *,
        retry: bool,
        answer_deferral: bool = True,
    ) -> Delivery:
        seconds = self.settings.publish_timeout if timeout is None else _checked(timeout)
        try:
            envelope, span = engine.spans.encode(self._encoder.encode, task)
        except PublishError as error:
            self._meter().refused(task, error)
            raise
        delivery = Delivery(
            envelope,
            answer,
            started=started,
            deadline=started + seconds,
            retry=retry,
            answer_deferral=answer_deferral,
        )
        if span is not None:
            engine.spans.follow(delivery, span)
        refusal = engine.refuse(delivery)
        if refusal is not None:
            raise refusal
        return delivery

    # --- state ---------------------------------------------------------------------------------

    def status(self) -> Status:
        """Say how things stand, without asking the broker."""
        if self._life.fleet is not None:
            return self._life.fleet.status()
        return Status(connection_state=self._state())

    def is_healthy(self) -> bool:
        """Whether messages get through: connected, breaker not open, not blocked."""
        return self.status().healthy

    def recent(self) -> Recent:
        """Give rates, errors and dead letters of the last minutes, without asking the broker."""
        return self._recorder.recent()

    def on(self, event: EventName, callback: Callable[..., object]) -> None:
        """Call ``callback`` at an event, on a thread of its own.

        Where callbacks are so slow that 10,000 calls wait, further ones are left out, counted and
        logged; what is added to a future by ``add_done_callback`` is always called.

        :param event: ``connected``, ``disconnected``, ``blocked``, ``unblocked``, ``gave_up``,
            ``circuit_opened``, ``circuit_closed``, ``confirmed``, ``deferred``, ``dead_lettered``,
            or ``refused``: what was to be published after a COMMIT could not be handed over
        :param callback: takes an `mlproducer.observe.callbacks.Event`, or nothing
        :raises ValueError: there is no such event
        :raises TypeError: the callback cannot be called
        """
        self._callbacks.add(event, callback)

    def _state(self) -> ConnectionState:
        if self._life.fleet is not None:
            return self._life.fleet.status().connection_state
        return ConnectionState.CLOSED if self._life.closed else ConnectionState.DISCONNECTED

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin connecting in the background; the first publish does it otherwise.

        :raises ConfigurationError: no broker is named, or a TLS file is unusable
        :raises ProducerClosedError: the producer was closed
        """
        self._life.running()

    def wait_connected(self, timeout: float | None = None) -> bool:
        """Wait until there is a connection that carries messages.

        :param timeout: seconds; ``None`` waits without a limit
        """
        return self._life.running().wait_connected(timeout)

    def reconnect(self) -> None:
        """Connect now if there is no connection; starts over where the attempts were used up."""
        self._life.running(blocking=False).reconnect()

    def flush(self, timeout: float | None = None) -> int:
        """Wait until nothing is in flight or waiting for a retry.

        :param timeout: seconds; ``None`` waits without a limit
        :returns: how many messages are left
        """
        if self._life.fleet is None or self._life.closed:
            return 0
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._life.running().flush(deadline)

    def close(self, timeout: float = 10.0) -> CloseReport:
        """Drain, then close; within ``timeout`` + 0.5 s, from any thread, any number of times.

        In a callback nothing is drained, since that would wait for the callback itself.

        :param timeout: seconds for draining
        """
        return self._life.close(timeout)

    def __enter__(self) -> MLProducer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("an MLProducer cannot be pickled; pickle its settings")

    @property
    def registry(self) -> Any:
        """Where its metrics are; whoever asks for it finds them registered."""
        self._meter()
        return self._registry

    def _meter(self) -> Meter:
        if self._made_meter is None:
            from mlproducer.observe import metrics  # noqa: PLC0415 - slow, and not needed before

            meter = metrics.meter(self._registry)
            meter.watch(self, durable=self._stores_durably())
            self._made_meter = meter
        return self._made_meter

    def _stores_durably(self) -> bool:
        if self._store is not None:
            return self._store.durable
        return not self.settings.store_url.startswith("memory:")

    def _make_fleet(self) -> Fleet:
        from mlproducer.engine.fleet import assemble  # noqa: PLC0415 - pika is slow to import

        process.finish_in_children()
        return assemble(self.settings, self._store, self._callbacks, self._meter(), self._recorder)

    # --- what the process tells ----------------------------------------------------------------

    def forked(self) -> None:
        """Begin afresh in a child process, which must touch nothing of its parent's."""
        parents = self._life
        _inherited.append(parents)
        self._life = Lifecycle(self._make_fleet, closed=parents.closed)
        self._recorder = Recorder()
        if parents.fleet is not None:
            parents.fleet.disown()

    def exiting(self, deadline: float) -> None:
        """Deliver what is in flight before the process ends, and say what is lost."""
        if self._life.fleet is not None and not self._life.closed:
            lost = self.close(max(0.0, deadline - time.monotonic())).abandoned
            if lost:
                write(
                    logger,
                    logging.ERROR,
                    "the process ends: messages lost that lived in memory: %d",
                    len(lost),
                )


def _checked(timeout: float) -> float:
    if isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout >= 0:
        return timeout
    raise ConfigurationError("timeout must be a number of seconds from 0")
