"""Encode a task or message as an envelope, and check its size.

Runs on: the publisher's thread.
"""

from __future__ import annotations

from mlproducer import tracing
from mlproducer._wire import celery, raw
from mlproducer._wire.delay import Delays
from mlproducer.errors import InvalidMessageError, MessageTooLargeError, frameless
from mlproducer.message import Envelope, Message
from mlproducer.settings import Settings, topology_of
from mlproducer.tasks import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    PreferredBackends,
    SummarizationTask,
    TranscriptionTask,
)

TASKS = (SummarizationTask, TranscriptionTask, EmbeddingTask, EmbeddingBatchTask, CeleryTask)
Task = (
    SummarizationTask
    | TranscriptionTask
    | EmbeddingTask
    | EmbeddingBatchTask
    | CeleryTask
    | Message
)


class Encoder:
    """The encoder of one producer."""

    def __init__(self, settings: Settings) -> None:
        topology = topology_of(settings)
        self._exchange = topology.exchange
        self._delays = Delays.of(topology, settings.queue_prefix)
        self._max_bytes = settings.max_message_bytes
        self._preferred = PreferredBackends(
            llm=settings.preferred_llm_backend,
            stt=settings.preferred_stt,
            embedding=settings.preferred_embedding_backend,
        )

    @frameless
    def encode(self, task: Task) -> Envelope:
        """Encode a task or message.

        :raises InvalidMessageError: it is neither, or AMQP or strict JSON cannot carry it
        :raises MessageTooLargeError: its body is longer than ``max_message_bytes``
        """
        if isinstance(task, Message):
            envelope = raw.encode(task, exchange=self._exchange)
        elif isinstance(task, TASKS):
            envelope = celery.encode(
                task,
                exchange=self._exchange,
                preferred=self._preferred,
                trace=tracing.context.get(),
                delays=self._delays,
            )
        else:
            accepted = ", ".join(kind.__name__ for kind in (*TASKS, Message))
            raise InvalidMessageError(f"task is {type(task).__name__}; accepted are {accepted}")
        if len(envelope.body) > self._max_bytes:
            raise MessageTooLargeError(
                f"the body has {len(envelope.body)} bytes; max_message_bytes accepts "
                f"{self._max_bytes}",
                message_id=envelope.message_id,
            )
        return envelope
