"""Publish machine-learning tasks to RabbitMQ from any number of threads, without losing one.

    from mlproducer import MLProducer, SummarizationTask

    producer = MLProducer()
    receipt = producer.publish(SummarizationTask("share-1", {"text": "..."}))

Runs on: any thread.
"""

from mlproducer import errors
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.message import Message, Outcome, Receipt
from mlproducer.producer import MLProducer
from mlproducer.settings import RetryPolicy, Settings, TLSSettings
from mlproducer.status import CloseReport, Status
from mlproducer.tasks import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    SummarizationTask,
    TranscriptionTask,
)
from mlproducer.topology import Queue, Topology

__all__ = [
    "CeleryTask",
    "CircuitState",
    "CloseReport",
    "ConnectionState",
    "EmbeddingBatchTask",
    "EmbeddingTask",
    "MLProducer",
    "Message",
    "Outcome",
    "Queue",
    "Receipt",
    "RetryPolicy",
    "Settings",
    "Status",
    "SummarizationTask",
    "TLSSettings",
    "Topology",
    "TranscriptionTask",
    "errors",
]
