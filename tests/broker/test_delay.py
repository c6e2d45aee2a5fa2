"""A task that is due later waits in the broker, and keeps no worker busy."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pika
import pytest

from mlproducer import CeleryTask
from mlproducer.testing import CeleryWorker, RabbitMQNode
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.users import delete_user
from tests.helpers import LIMIT
from tests.stopwatch import Stopwatch, in_time

pytestmark = pytest.mark.broker

TASK = "x.report"
EMBED = "ml.embed"


@contextmanager
def _worker(url: str, directory: Path) -> Iterator[CeleryWorker]:
    """One process that holds four messages."""
    with CeleryWorker(
        url, [EMBED], tasks=[TASK], concurrency=1, prefetch=4, directory=directory
    ) as worker:
        yield worker


def _task(name: str, countdown: float | None = None) -> CeleryTask:
    return CeleryTask(TASK, [name], routing_key=EMBED, countdown=countdown, task_id=name)


def _ready(vhost: VirtualHost, queue: str) -> int:
    return vhost.node.queue_depth(vhost.name, queue)


def test_tasks_that_are_due_later_hold_nobody_up(
    rabbitmq_vhost: VirtualHost, connect: Connect, tmp_path: Path
) -> None:
    """Eight that are due in a minute, then one: it runs at once; each of the others in its second.

    The producer is the first to come to this virtual host, and the worker finds what it declared.
    """
    producer = connect()
    due: dict[str, float] = {}
    for name, countdown in [("early", 3.0), ("soon", 0.4), ("in a second", 1.0)]:
        due[name] = time.time() + countdown
        assert producer.publish(_task(name, countdown)).confirmed
    for number in range(8):
        assert producer.publish(_task(f"minute {number}", 60.0)).confirmed
    with _worker(rabbitmq_vhost.url, tmp_path) as worker:
        with in_time(1.0):
            assert producer.publish(_task("now")).confirmed
            worker.wait_for({"now"}, LIMIT)
        worker.wait_for(set(due), LIMIT)
        with in_time(3.0, 2.0):
            producer.publish(_task("timed", 2.0))
            worker.wait_for({"timed"}, LIMIT)
        assert not any(run.id.startswith("minute") for run in worker.runs())


@pytest.mark.slow
def test_a_minute(rabbitmq_vhost: VirtualHost, connect: Connect, tmp_path: Path) -> None:
    """Eight tasks that are due in a minute run within a second of it."""
    producer = connect()
    with _worker(rabbitmq_vhost.url, tmp_path) as worker:
        names = {f"minute {number}" for number in range(8)}
        watch = Stopwatch()
        with in_time(0.5):
            for name in sorted(names):
                assert producer.publish(_task(name, 60.0)).confirmed
        producer.publish(_task("now"))
        worker.wait_for({"now"}, 5.0)
        worker.wait_for(lambda runs: len(runs) > 1, 70.0)
        assert watch.wall() > 59.9
        worker.wait_for(names, 5.0)
        assert watch.own() < 61.0 + 0.5


@pytest.mark.parametrize(("countdown", "level"), [(3600.0, 11), (400 * 86_400.0, 25)])
def test_long_delays(
    countdown: float, level: int, rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """They wait in the highest level of their seconds, with the moment in their header."""
    assert connect().publish(_task("later", countdown)).confirmed
    (copies,) = drain(rabbitmq_vhost.url, [f"celery_delayed_{level}"]).values()
    assert copies == 1


def test_a_worker_that_comes_first(
    rabbitmq_vhost: VirtualHost, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the worker has declared is what the producer would, and nothing is refused."""
    with _worker(rabbitmq_vhost.url, tmp_path) as worker:
        producer = connect()
        producer.publish(_task("a", 1.0))
        (run,) = worker.wait_for({"a"}, LIMIT)
    late = datetime.now(timezone.utc) - datetime.fromisoformat(run.headers["eta"])
    assert 0.0 <= late.total_seconds() < LIMIT
    assert [each.message for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_a_delayed_task_reaches_its_queue_once(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """Before the worker has bound anything, and after it has."""
    producer = connect()
    producer.publish(_task("a", 1.0))
    producer.publish(_task("b", 2.0))
    deadline = time.monotonic() + LIMIT
    while _ready(rabbitmq_vhost, EMBED) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert drain(rabbitmq_vhost.url, [EMBED]) == {"a": 1, "b": 1}


def test_after_a_reconnect_and_a_deleted_exchange(
    rabbitmq_vhost: VirtualHost, mortal_node: RabbitMQNode, connect: Connect
) -> None:
    """They are declared on each connection; one that was deleted meanwhile costs one message."""
    producer = connect()
    producer.publish(_task("first", 3600.0))
    mortal_node.save_queues()
    mortal_node.restart()
    assert producer.wait_connected(30.0)
    assert producer.publish(_task("second", 3600.0), timeout=LIMIT).confirmed
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.exchange_delete("celery_delayed_27")
    with pytest.raises(Exception, match="NOT_FOUND"):
        producer.publish(_task("third", 3600.0))
    assert producer.publish(_task("fourth", 3600.0)).confirmed
    assert drain(rabbitmq_vhost.url, ["celery_delayed_11"]).keys() == {"first", "second", "fourth"}


def _as_publisher(vhost: VirtualHost) -> str:
    """Return the URL of a user who may write and read, and declare nothing."""
    node = vhost.node
    node.add_user("publisher", "secret")
    node.set_permissions(vhost.name, "publisher", "^$", ".*", ".*")
    return f"amqp://publisher:secret@{node.host}:{node.port}/{vhost.name}"


def test_without_permission_to_declare(
    rabbitmq_vhost: VirtualHost, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The eta alone goes along; where others have declared the exchanges, they are used."""
    connect().publish(_task("declares the queues"))
    url = _as_publisher(rabbitmq_vhost)
    try:
        producer = connect(url, declare_topology="passive")
        assert producer.publish(_task("plain", 60.0)).confirmed
        assert drain(rabbitmq_vhost.url, [EMBED]).keys() == {"declares the queues", "plain"}
        assert "celery_delayed_27" in caplog.text
        connect().publish(_task("declares the levels", 60.0))
        other = connect(url, declare_topology="off")
        assert other.publish(_task("delayed", 60.0)).confirmed
        assert drain(rabbitmq_vhost.url, [EMBED]) == {}
    finally:
        delete_user(rabbitmq_vhost.node, "publisher")


def test_many_at_once_from_the_first_moment(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """On a live connection that has never needed it: nothing is lost, and others do not wait."""
    producer = connect()
    producer.publish(_task("connects"))
    futures = [producer.submit(_task(f"later {n}", 3600.0)) for n in range(200)]
    with in_time(0.5):
        assert producer.publish(_task("now")).confirmed
    for future in futures:
        assert future.result(LIMIT).confirmed
    assert drain(rabbitmq_vhost.url, ["celery_delayed_11"]).total() == 200


def test_an_expired_task_is_a_dead_letter(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A task that was not run in time is dead-lettered by the broker, and can be seen there."""
    connect().publish(CeleryTask(TASK, routing_key=EMBED, expires=0.2, task_id="stale"))
    deadline = time.monotonic() + LIMIT
    while not _ready(rabbitmq_vhost, "ml.dead_letter") and time.monotonic() < deadline:
        time.sleep(0.1)
    with open_channel(rabbitmq_vhost.url) as channel:
        _, properties, _ = channel.basic_get("ml.dead_letter")
    assert isinstance(properties, pika.BasicProperties)
    assert properties.headers["x-death"][0]["reason"] == "expired"
