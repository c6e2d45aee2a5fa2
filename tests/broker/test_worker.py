"""A stock Celery worker runs what the library publishes, and finds in it what it was given."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from mlproducer import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    Message,
    MLProducer,
    Settings,
    SummarizationTask,
    TranscriptionTask,
)
from mlproducer.testing import CeleryWorker, RabbitMQNode, TaskRun
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.worker import QUEUES, TASKS
from mlproducer.tracing import trace_context

pytestmark = pytest.mark.broker

REPORT = "reports.build"
TEXT = "Grüße, ein Text mit \U0001f511 und \u2028 Zeilen\n"
URL = "https://example.org/private.mp3?token=geheim"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER_TRACEPARENT = "00-11111111111111111111111111111111-2222222222222222-00"


@pytest.fixture(scope="module")
def vhost(rabbitmq_node: RabbitMQNode) -> Iterator[VirtualHost]:
    """One virtual host for all tests of this module: a worker takes seconds to start."""
    rabbitmq_node.add_vhost("worker")
    yield VirtualHost("worker", rabbitmq_node, rabbitmq_node.url_for("worker"))
    rabbitmq_node.delete_vhost("worker")


@pytest.fixture(scope="module")
def producer(vhost: VirtualHost) -> Iterator[MLProducer]:
    """A producer that has declared its queues before any worker came."""
    with MLProducer(Settings(url=vhost.url)) as producer:
        assert producer.wait_connected(30.0)
        yield producer


@pytest.fixture(scope="module")
def declared(vhost: VirtualHost, producer: MLProducer) -> dict[str, Any]:
    """What stands on the broker before the worker adds its own queues."""
    return {
        what: json.loads(vhost.node.ctl("-q", "--formatter", "json", *order, "-p", vhost.name))
        for what, order in {
            "queues": ("list_queues", "name", "durable", "arguments"),
            "exchanges": ("list_exchanges", "name", "type", "durable"),
            "bindings": ("list_bindings", "source_name", "destination_name", "routing_key"),
        }.items()
    }


@pytest.fixture(scope="module")
def worker(
    vhost: VirtualHost, declared: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryWorker]:
    """A worker for all queues and tasks."""
    directory: Path = tmp_path_factory.mktemp("worker")
    with CeleryWorker(vhost.url, tasks=[*TASKS, REPORT], directory=directory) as worker:
        yield worker


def _run(worker: CeleryWorker, message_id: str) -> TaskRun:
    runs = worker.wait_for({message_id})
    (run,) = [run for run in runs if run.id == message_id]
    return run


def test_queues(declared: dict[str, Any]) -> None:
    """The queues are the documented ones, durable, with exactly their arguments."""
    queues = {queue["name"]: queue for queue in declared["queues"]}
    assert set(queues) == {*QUEUES, "ml.dead_letter"}
    assert all(queue["durable"] for queue in queues.values())
    for name in QUEUES:
        assert sorted(queues[name]["arguments"]) == [
            ["x-dead-letter-exchange", "longstr", "bookmarkai.ml.dlx"],
            ["x-dead-letter-strategy", "longstr", "at-least-once"],
            ["x-delivery-limit", "signedint", 20],
            ["x-overflow", "longstr", "reject-publish"],
            ["x-queue-type", "longstr", "quorum"],
        ]
    assert ["x-queue-type", "longstr", "quorum"] in queues["ml.dead_letter"]["arguments"]


def test_exchanges(declared: dict[str, Any]) -> None:
    """Both exchanges are durable topics; each queue is bound by its own name."""
    exchanges = {exchange["name"]: exchange for exchange in declared["exchanges"]}
    for name in ("bookmarkai.ml", "bookmarkai.ml.dlx"):
        assert exchanges[name] == {"name": name, "type": "topic", "durable": True}
    bindings = {tuple(binding.values()) for binding in declared["bindings"]}
    assert bindings >= {("bookmarkai.ml", name, name) for name in QUEUES}
    assert ("bookmarkai.ml.dlx", "ml.dead_letter", "#") in bindings


ML_TASKS = [
    pytest.param(
        SummarizationTask(
            "s-1", {"text": TEXT, "title": "T"}, {"max_length": 100, "style": "brief"}
        ),
        "ml.summarize",
        "llm_service.tasks.summarize_content",
        {
            "share_id": "s-1",
            "content": {"text": TEXT, "title": "T"},
            "options": {"maxLength": 100, "style": "brief", "backend": "api"},
        },
        id="summarize",
    ),
    pytest.param(
        SummarizationTask("s-2", {"text": TEXT}, {"provider": "local"}),
        "ml.summarize_local",
        "llm_service.tasks.summarize_content_local",
        {
            "share_id": "s-2",
            "content": {"text": TEXT},
            "options": {"provider": "local", "backend": "local"},
        },
        id="summarize locally",
    ),
    pytest.param(
        TranscriptionTask("s-3", URL, {"language": "de", "prompt": TEXT}),
        "ml.transcribe",
        "whisper.tasks.transcribe_api",
        {
            "share_id": "s-3",
            "content": {"mediaUrl": URL},
            "options": {"language": "de", "prompt": TEXT, "normalize": True, "backend": "api"},
        },
        id="transcribe",
    ),
    pytest.param(
        TranscriptionTask("s-4", URL, {"backend": "local", "normalize": False}),
        "ml.transcribe_local",
        "whisper.tasks.transcribe_local",
        {
            "share_id": "s-4",
            "content": {"mediaUrl": URL},
            "options": {"normalize": False, "backend": "local"},
        },
        id="transcribe locally",
    ),
    pytest.param(
        EmbeddingTask(
            "s-5",
            {"text": TEXT, "type": "article", "metadata": {"deep": [TEXT, None, 1.5, 2**53]}},
            {"embeddingType": "summary", "chunkStrategy": "sentence", "forceModel": "m"},
        ),
        "ml.embed",
        "vector_service.tasks.generate_embeddings",
        {
            "share_id": "s-5",
            "content": {
                "text": TEXT,
                "type": "article",
                "metadata": {"deep": [TEXT, None, 1.5, 2**53]},
            },
            "options": {
                "embedding_type": "summary",
                "chunk_strategy": "sentence",
                "force_model": "m",
                "backend": "api",
            },
        },
        id="embed",
    ),
    pytest.param(
        EmbeddingBatchTask(
            [("s-6", {"text": TEXT}), ("s-7", {"text": "two"}, {"backend": "local"})]
        ),
        "ml.embed",
        "vector_service.tasks.generate_embeddings_batch",
        {
            "tasks": [
                {
                    "share_id": share_id,
                    "content": {"text": text, "type": "caption", "metadata": {}},
                    "options": {
                        "embedding_type": "content",
                        "chunk_strategy": "none",
                        "backend": backend,
                    },
                }
                for share_id, text, backend in (("s-6", TEXT, "api"), ("s-7", "two", "local"))
            ]
        },
        id="embed a batch",
    ),
]


@pytest.mark.parametrize(("task", "queue", "name", "kwargs"), ML_TASKS)
def test_ml_task(
    worker: CeleryWorker,
    producer: MLProducer,
    task: Any,
    queue: str,
    name: str,
    kwargs: dict[str, Any],
) -> None:
    """Each kind of task is run from its queue, under its name, with exactly its arguments."""
    receipt = producer.publish(task)
    run = _run(worker, receipt.message_id)
    assert (run.task, run.args, run.kwargs) == (name, [], kwargs)
    assert run.delivery_info["exchange"] == "bookmarkai.ml"
    assert run.delivery_info["routing_key"] == queue
    assert run.delivery_info["redelivered"] is False
    _assert_protocol(run)


def _assert_protocol(run: TaskRun) -> None:
    """The headers and properties of protocol 2 are there, and none shows what users wrote."""
    headers = run.headers
    assert headers["id"] == headers["root_id"] == run.id
    assert headers["task"] == run.task
    assert headers["lang"] == "py"
    assert {"origin", "argsrepr", "kwargsrepr"} <= set(headers)
    assert run.properties["correlation_id"] == run.properties["message_id"] == run.id
    assert run.properties["delivery_mode"] == 2
    shown = json.dumps([headers, run.properties], ensure_ascii=False)
    for text in (TEXT.strip(), URL, "geheim", "two"):
        assert text not in shown


def test_celery_task(worker: CeleryWorker, producer: MLProducer) -> None:
    """A task of any name gets its arguments, its id, its priority and its own headers."""
    task = CeleryTask(
        REPORT,
        [1, "zwei", {"three": TEXT}],
        {"format": "pdf", "n": -0.5},
        routing_key="ml.embed",
        priority=7,
        headers={"x-tenant": "acme", "x-count": 2**40},
        task_id="my own id",
    )
    assert producer.publish(task).message_id == "my own id"
    run = _run(worker, "my own id")
    assert (run.task, run.args) == (REPORT, [1, "zwei", {"three": TEXT}])
    assert run.kwargs == {"format": "pdf", "n": -0.5}
    assert run.properties["priority"] == 7
    assert (run.headers["x-tenant"], run.headers["x-count"]) == ("acme", 2**40)
    _assert_protocol(run)


def test_a_raw_message(worker: CeleryWorker, producer: MLProducer) -> None:
    """With what the README says it must carry, a stock worker runs it."""
    message = Message(
        body=b"[[1], {}, {}]",
        routing_key="ml.embed",
        headers={"task": REPORT, "id": "raw"},
        content_type="application/json",
        content_encoding="utf-8",
    )
    producer.publish(message)
    assert _run(worker, "raw").args == [1]


def test_countdown(worker: CeleryWorker, producer: MLProducer) -> None:
    """A task with a countdown runs after it, and holds no other task up."""
    published = time.monotonic()
    later = CeleryTask(REPORT, ["later"], routing_key="ml.embed", countdown=1.0)
    later_id = producer.publish(later).message_id
    now_id = producer.publish(CeleryTask(REPORT, ["now"], routing_key="ml.embed")).message_id
    runs = worker.wait_for({later_id, now_id})
    assert time.monotonic() - published >= 1.0
    order = [run.id for run in runs if run.id in (later_id, now_id)]
    assert order == [now_id, later_id]


def test_expires(worker: CeleryWorker, producer: MLProducer) -> None:
    """A task that has expired is not run; one that has time is."""
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    expired = CeleryTask(REPORT, ["expired"], routing_key="ml.embed", expires=past)
    outwaited = CeleryTask(
        REPORT, ["outwaited"], routing_key="ml.embed", countdown=0.5, expires=0.1
    )
    in_time = CeleryTask(REPORT, ["in time"], routing_key="ml.embed", countdown=0.6, expires=60.0)
    never = {producer.publish(task).message_id for task in (expired, outwaited)}
    runs = worker.wait_for({producer.publish(in_time).message_id})
    assert never.isdisjoint(run.id for run in runs)
    assert runs[-1].args == ["in time"]


def test_trace_context(worker: CeleryWorker, producer: MLProducer) -> None:
    """A W3C trace context reaches the worker's request, from the context in force or a header."""
    plain = CeleryTask(REPORT, routing_key="ml.embed")
    own = CeleryTask(REPORT, routing_key="ml.embed", headers={"traceparent": OTHER_TRACEPARENT})
    with trace_context(TRACEPARENT, "vendor=1,other=2"):
        inside = [
            producer.publish(task).message_id
            for task in (plain, EmbeddingTask("s", {"text": "x"}), own)
        ]
    outside = producer.publish(plain).message_id
    worker.wait_for({*inside, outside})
    headers = {run.id: run.headers for run in worker.runs()}
    for message_id in inside[:2]:
        assert headers[message_id]["traceparent"] == TRACEPARENT
        assert headers[message_id]["tracestate"] == "vendor=1,other=2"
    assert headers[inside[2]]["traceparent"] == OTHER_TRACEPARENT
    assert "tracestate" not in headers[inside[2]]
    assert "traceparent" not in headers[outside]


def test_preferred_backends(worker: CeleryWorker, vhost: VirtualHost) -> None:
    """The preferred backend of the settings decides where the options and the provider do not."""
    settings = Settings(url=vhost.url, preferred_llm_backend="local", preferred_stt="local")
    with MLProducer(settings) as producer:
        receipts = [
            producer.publish_summarization_task("s", {"text": TEXT}),
            producer.publish_transcription_task("s", URL),
            producer.publish_summarization_task("s", {"text": TEXT}, {"backend": "api"}),
        ]
    runs = {run.id: run for run in worker.wait_for({each.message_id for each in receipts})}
    assert [runs[receipt.message_id].task for receipt in receipts] == [
        "llm_service.tasks.summarize_content_local",
        "whisper.tasks.transcribe_local",
        "llm_service.tasks.summarize_content",
    ]
