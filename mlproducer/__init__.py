"""Publish machine-learning tasks to RabbitMQ from any number of threads, without losing one.

    from mlproducer import MLProducer, SummarizationTask

    producer = MLProducer()
    receipt = producer.publish(SummarizationTask("share-1", {"text": "..."}))

The modules are imported when a name is first used (PEP 562), so that a program that needs only
some of them, such as `mlproducer.errors`, loads no more.

Runs on: any thread.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers know the name; typing itself is slow to import

if TYPE_CHECKING:
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

_MODULES = {
    **dict.fromkeys(("CircuitState", "ConnectionState"), "_core.states"),
    **dict.fromkeys(("Message", "Outcome", "Receipt"), "message"),
    "MLProducer": "producer",
    **dict.fromkeys(("RetryPolicy", "Settings", "TLSSettings"), "settings"),
    **dict.fromkeys(("CloseReport", "Status"), "status"),
    **dict.fromkeys(("CeleryTask", "EmbeddingBatchTask", "EmbeddingTask"), "tasks"),
    **dict.fromkeys(("SummarizationTask", "TranscriptionTask"), "tasks"),
    **dict.fromkeys(("Queue", "Topology"), "topology"),
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("mlproducer.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"mlproducer.{_MODULES[name]}"), name)
    globals()[name] = value  # later uses do not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
