"""A stock Celery worker runs what is put into the library's queues, and says so."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pika
import pytest

from mlproducer import Queue
from mlproducer.testing import CeleryNotInstalled, CeleryWorker, WorkerError
from mlproducer.testing.plugin import VirtualHost

TASK = "vector_service.tasks.generate_embeddings"
EMBED = "ml.embed"


def _publish(url: str, task_id: str, task: str = TASK, **headers: Any) -> None:
    """Put one task of Celery's message protocol 2 into the queue for embeddings."""
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=task_id,
        delivery_mode=2,
        priority=4,
        headers={"lang": "py", "task": task, "id": task_id, "root_id": task_id} | headers,
    )
    body = json.dumps([["a"], {"n": 1, "text": "é"}, {}]).encode()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("bookmarkai.ml", EMBED, body, properties, mandatory=True)
    connection.close()


@pytest.fixture
def worker(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> Iterator[CeleryWorker]:
    """A worker on a fresh virtual host, ready."""
    with CeleryWorker(rabbitmq_vhost.url, directory=tmp_path) as worker:
        yield worker


@pytest.mark.broker
def test_a_run_is_reported_with_its_message(
    worker: CeleryWorker, rabbitmq_vhost: VirtualHost
) -> None:
    """The record holds arguments, headers, properties and the way the message came."""
    assert worker.ready
    expires = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
    _publish(rabbitmq_vhost.url, "id-1", traceparent="00-ab-cd-01", expires=expires)
    (run,) = worker.wait_for({"id-1"})
    assert (run.task, run.id, run.args, run.kwargs) == (TASK, "id-1", ["a"], {"n": 1, "text": "é"})
    assert (run.headers["traceparent"], run.headers["expires"]) == ("00-ab-cd-01", expires)
    assert (run.properties["priority"], run.properties["correlation_id"]) == (4, "id-1")
    assert run.delivery_info["exchange"] == "bookmarkai.ml"
    assert run.delivery_info["routing_key"] == EMBED
    assert "é" not in repr(run)


@pytest.mark.broker
def test_the_queues_are_those_of_the_library(
    worker: CeleryWorker, rabbitmq_vhost: VirtualHost
) -> None:
    """The worker's queues have exactly the arguments that the library declares them with."""
    arguments = Queue("any").declared_arguments("bookmarkai.ml.dlx")
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_vhost.url))
    channel = connection.channel()
    for queue in worker.queues:
        channel.queue_declare(queue, durable=True, arguments=arguments)
    connection.close()


@pytest.mark.broker
def test_an_eta_is_kept(worker: CeleryWorker, rabbitmq_vhost: VirtualHost) -> None:
    """A task with an eta runs after it, and one behind it is not held up."""
    eta = datetime.now(timezone.utc) + timedelta(seconds=1.5)
    _publish(rabbitmq_vhost.url, "later", eta=eta.isoformat())
    _publish(rabbitmq_vhost.url, "now")
    runs = worker.wait_for({"later", "now"})
    assert [run.id for run in runs] == ["now", "later"]
    assert datetime.now(timezone.utc) >= eta


@pytest.mark.broker
def test_what_does_not_run_is_a_timeout(worker: CeleryWorker, rabbitmq_vhost: VirtualHost) -> None:
    """An expired task and one of another name are not run; waiting for them ends in time."""
    _publish(rabbitmq_vhost.url, "expired", expires="2000-01-01T00:00:00+00:00")
    _publish(rabbitmq_vhost.url, "unknown", task="nobody.knows")
    _publish(rabbitmq_vhost.url, "known")
    worker.wait_for(lambda runs: any(run.id == "known" for run in runs))
    with pytest.raises(TimeoutError, match=r"not run within 0\.2 s; 1 runs"):
        worker.wait_for({"expired"}, timeout=0.2)
    with pytest.raises(TypeError, match="collection of task ids"):
        worker.wait_for("expired", timeout=0.2)


@pytest.mark.broker
def test_a_worker_that_dies_is_reported_at_once(worker: CeleryWorker) -> None:
    """Who waits for a worker that was killed is told so, long before the timeout."""
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="the worker has ended"):
        worker.wait_for({"never"}, timeout=60.0)
    deadline = time.monotonic() + 5.0
    while worker.running:  # its output ends a moment before it does
        assert time.monotonic() < deadline


@pytest.mark.broker
def test_stop_is_warm_and_start_goes_on(
    worker: CeleryWorker, rabbitmq_vhost: VirtualHost, tmp_path: Path
) -> None:
    """A stopped worker leaves no file; started again it takes what came meanwhile."""
    worker.stop()
    assert list(tmp_path.iterdir()) == []
    _publish(rabbitmq_vhost.url, "meanwhile")
    assert rabbitmq_vhost.node.queue_depth(rabbitmq_vhost.name, EMBED) == 1
    worker.start()
    (run,) = worker.wait_for({"meanwhile"})
    assert run.delivery_info["redelivered"] is False


@pytest.mark.broker
def test_a_worker_that_cannot_start_says_why(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """A queue declared otherwise ends the worker, with the broker's own words."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_vhost.url))
    connection.channel().queue_declare(EMBED, durable=True)
    with (
        pytest.raises(WorkerError, match="PRECONDITION_FAILED"),
        CeleryWorker(rabbitmq_vhost.url, [EMBED], directory=tmp_path),
    ):
        pass
    connection.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_celery_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Celery the error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CeleryNotInstalled, match="pip install celery"):
        CeleryWorker("amqp://127.0.0.1").start()


def test_no_password_in_repr() -> None:
    """The repr names the queues and no address."""
    assert repr(CeleryWorker("amqp://u:secret@h", [EMBED])) == "<CeleryWorker ml.embed stopped>"
