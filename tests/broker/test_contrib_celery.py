"""The same program with and without a producer, on a real broker and worker: the same results.

``CELERY_PYTHON`` names an interpreter with another Celery, to try that one.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pika
import pytest
import redis
from attrs import frozen
from celery import Celery, signature
from kombu import Exchange, Queue

from mlproducer._store_url import read_redis
from mlproducer.contrib.celery import PublishFailedError, install, producer_of, uninstall
from mlproducer.contrib.celery.completed_tasks import RedisCompletedTasks
from mlproducer.testing import Certificates, RabbitMQNode, RedisServer
from mlproducer.testing.audit import open_channel
from mlproducer.testing.plugin import VirtualHost

pytestmark = pytest.mark.broker

LIMIT = 180.0
PYTHON = os.environ.get("CELERY_PYTHON", sys.executable)
SCRIPTS = Path(__file__).parent / "scripts"


@frozen
class Shop:
    """Runs the application's programs, each with or without a producer."""

    broker: str
    backend: str
    directory: Path
    quorum: bool = False

    def environ(self, *, installed: bool) -> dict[str, str]:
        """Return the environment of a program."""
        path = os.pathsep.join([str(SCRIPTS), str(Path(__file__).parents[2])])
        chosen = {"BROKER": self.broker, "BACKEND": self.backend, "PYTHONPATH": path}
        for name, wanted in (("INSTALL", installed), ("QUORUM", self.quorum)):
            if wanted:
                chosen[name] = "1"
        return {**os.environ, **chosen}

    def call(self, *, installed: bool) -> dict[str, Any]:
        """Run the program that calls, and return what came of each call."""
        done = subprocess.run(
            [PYTHON, "-m", "celery_shop"],
            env=self.environ(installed=installed),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=LIMIT * 2,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results: dict[str, Any] = json.loads(done.stdout)
        return results

    @contextmanager
    def running(self, *arguments: str, installed: bool) -> Iterator[subprocess.Popen[str]]:
        """Run a worker or beat in the background."""
        name = self.directory / f"{arguments[0]}.log"
        argv = [PYTHON, "-m", "celery", "-A", "celery_shop", *arguments, "--loglevel=INFO"]
        with name.open("w") as log:
            process = subprocess.Popen(
                argv,
                env=self.environ(installed=installed),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                text=True,
            )
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30.0)
                process.kill()
                process.wait()
        text = name.read_text()
        assert "CRITICAL" not in text, text
        assert text.count("Traceback") == text.count("\nValueError: it fails"), text

    @contextmanager
    def worker(self, *, installed: bool) -> Iterator[None]:
        """Run a prefork worker, which is ready once it has declared its queues."""
        options = ["--concurrency=2", "--without-gossip", "--without-mingle"]
        with self.running("worker", *options, installed=installed) as process:
            log = self.directory / "worker.log"
            until = time.monotonic() + LIMIT
            while " ready." not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            yield


EXPECTED: dict[str, Any] = {
    "delay": 3,
    "retry": 2,
    "no_retry": 3,
    "failure": "it fails",
    "chain": 10,
    "group": [0, 2, 4, 6],
    "by_name": 11,
    "starmap": [3, 7],
    "chunks": [[3, 7], [11]],
    "countdown": [3, True],
    "eta": [3, True],
}
WITH_REDIS = {
    "chord": 12,
    "replace": 5,
    "replace_many": 12,
    "link": [3],
    "link_error": ["ValueError"],
    "nested": [3, 7],
}


@functools.cache
def celery_version() -> tuple[int, int]:
    """Return the version of the Celery that is tried, as major and minor."""
    script = "import celery; print(celery.VERSION.major, celery.VERSION.minor)"
    major, minor = map(int, subprocess.check_output([PYTHON, "-c", script], text=True).split())
    return major, minor


@pytest.fixture(scope="module")
def results_server() -> Iterator[RedisServer]:
    """A Redis for results."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def shop(
    request: pytest.FixtureRequest,
    rabbitmq_vhost: VirtualHost,
    results_server: RedisServer,
    tmp_path: Path,
) -> Shop:
    """The application, with results by what is asked for."""
    backend, quorum = getattr(request, "param", ("redis", False))
    if quorum and celery_version() < (5, 5):
        pytest.skip("workers before Celery 5.5 cannot consume from quorum queues")
    redis.Redis.from_url(results_server.url).flushall()
    url = results_server.url if backend == "redis" else "rpc://"
    return Shop(rabbitmq_vhost.url, url, tmp_path, quorum)


@pytest.mark.parametrize(
    "shop",
    [("redis", False), ("rpc", False), ("redis", True)],
    ids=["redis", "rpc", "quorum"],
    indirect=True,
)
def test_the_same_results(shop: Shop) -> None:
    """Every kind of call, from a program to a prefork worker that itself sends tasks."""
    with shop.worker(installed=False):
        stock = shop.call(installed=False)
    with shop.worker(installed=True):
        ours = shop.call(installed=True)
    assert ours == stock
    expected = EXPECTED if shop.backend.startswith("rpc") else {**EXPECTED, **WITH_REDIS}
    assert {name: ours[name] for name in expected} == expected
    assert ours["options"]["a"] == "b"


def test_beat(shop: Shop) -> None:
    """Beat sends what is due, about as often as it should."""
    counter = redis.Redis.from_url(shop.backend)
    with shop.worker(installed=True), shop.running("beat", installed=True):
        until = time.monotonic() + LIMIT
        while int(counter.get("ticks") or 0) < 4:
            assert time.monotonic() < until, (shop.directory / "beat.log").read_text()
            time.sleep(0.05)


# --- on the wire -------------------------------------------------------------------------------

NAMED = ("message_id", "cluster_id")
"""Properties that stock Celery does not set, and a producer does."""

NOW = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)

OWN = Queue("own", Exchange("own", type="topic", delivery_mode=1), "own.#")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "numbers": {"priority": 3, "time_limit": 50, "soft_time_limit": 40.5, "retries": 2},
    "dates": {"eta": NOW + timedelta(hours=1), "expires": NOW + timedelta(hours=2)},
    "expires": {"expires": 60.4321},
    "headers": {"headers": {"f": 1.5, "t": (1, "2"), "n": None, "d": {"x": [True, 2**40]}}},
    "compressed": {"compression": "zlib"},
    "bzip2": {"compression": "bzip2"},
    "pickle": {"serializer": "pickle"},
    "transient": {"delivery_mode": "transient"},
    "answers": {"reply_to": "answers", "correlation_id": "own"},
    "names": {"app_id": "shop", "type": "kind", "shadow": "sum", "root_id": "r", "parent_id": "p"},
    "timestamp": {"timestamp": 1714564800},
    "links": {"link": [], "link_error": [], "group_id": "g", "group_index": 3},
    "stamps": {"stamped_headers": ["on"], "on": ["a", "b"]},
    "silent": {"ignore_result": True},
    "repr": {"argsrepr": "(...)", "kwargsrepr": "{...}"},
    "exchange": {"exchange": "jobs", "routing_key": "express.x"},
    "queue": {"queue": "express"},
    "unknown": {"whatever": 1},
    "bytes": {"headers": {"b": b"text", "l": [b"text", {"b": b"text"}], "n": b"\xff"}},
    "yaml": {"serializer": "yaml"},
    "nothing": {"priority": None, "expires": None, "mandatory": None, "delivery_mode": None},
    "replaced": {"replaced_task_nesting": 2, "route_name": "other", "add_to_parent": False},
    "in a chord": {"chord": signature("x", task_id="x"), "chain": [signature("y", task_id="y")]},
    "waits": {"retry_policy": {"max_retries": 1}, "timeout": 5.0, "mandatory": True},
    "a queue": {"queue": OWN, "routing_key": "own.x"},
    "a queue alone": {"queue": OWN},
    "an exchange": {"exchange": OWN.exchange, "routing_key": "own.y"},
    "its type": {"exchange": "own", "exchange_type": "topic", "routing_key": "own.z"},
}

QUEUES = {
    **dict.fromkeys(("exchange", "queue"), "express"),
    **dict.fromkeys(("a queue", "a queue alone", "an exchange", "its type"), "own"),
}
"""Where a message is to be found; otherwise in the default queue."""


def _sent(app: Celery, url: str, queue: str, options: dict[str, Any]) -> dict[str, Any]:
    app.send_task("shop.add", (1, "ä"), {"z": None}, task_id="the-id", **options)
    with open_channel(url) as channel:
        until = time.monotonic() + 5.0
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        while method is None and time.monotonic() < until:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
    assert method is not None
    names = vars(pika.BasicProperties())
    fields = {name: getattr(properties, name) for name in names if name not in NAMED}
    route = {"exchange": method.exchange, "routing_key": method.routing_key}
    return {**fields, **route, "body": body}


@pytest.mark.parametrize("protocol", [2, 1])
def test_the_same_message(rabbitmq_vhost: VirtualHost, protocol: int) -> None:
    """Field by field, whatever the options are; the producer adds an id and its attempt's mark."""
    app = Celery("shop", broker=rabbitmq_vhost.url, set_as_current=False)
    app.conf.task_protocol = protocol
    app.now = lambda: NOW
    jobs = Exchange("jobs", type="topic")
    app.conf.task_queues = [Queue("shop", jobs, "shop"), Queue("express", jobs, "express.#")]
    app.conf.task_default_queue = app.conf.task_default_routing_key = "shop"
    different = {}
    for name, options in OPTIONS.items():
        if protocol == 1 and name == "stamps":
            continue
        queue = QUEUES.get(name, "shop")
        declare = {"declare": list(app.amqp.queues.values())} if name == "exchange" else {}
        install(app, rollout=0.0)
        stock = _sent(app, rabbitmq_vhost.url, queue, options | declare)
        install(app, rollout=1.0)
        ours = _sent(app, rabbitmq_vhost.url, queue, options | declare)
        if stock["body"] != ours["body"] or stock != ours:
            different[name] = {
                key: (stock[key], ours[key]) for key in stock if stock[key] != ours[key]
            }
    uninstall(app)
    app.close()
    assert different == {}


@pytest.mark.parametrize("shop", [("redis", False), ("redis", True)], indirect=True)
def test_a_fresh_virtual_host(shop: Shop) -> None:
    """What is sent before the first worker starts waits for it, in queues as it declares them."""
    script = (
        "from celery_shop import *; from mlproducer.contrib.celery import producer_of\n"
        "note.delay(1, 'now'); note.apply_async((2, 'later'), countdown=3)\n"
        "note.apply_async((3, 'express'), queue='express', routing_key='express.x')"
    )
    environ = shop.environ(installed=True)
    subprocess.run([PYTHON, "-c", script], env=environ, cwd=shop.directory, check=True, timeout=30)
    with shop.worker(installed=False):
        results = redis.Redis.from_url(shop.backend)
        until = time.monotonic() + LIMIT
        while not all(map(results.exists, ("now", "later", "express"))):
            assert time.monotonic() < until, (shop.directory / "worker.log").read_text()
            time.sleep(0.05)


def test_a_task_that_no_queue_gets(
    rabbitmq_vhost: VirtualHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes a dead letter, for which there is a queue, also where nothing was declared."""
    for name in ("BASE_DELAY", "MAX_DELAY"):
        monkeypatch.setenv(f"ML_MESSAGE_RETRY_{name}", "50")
    monkeypatch.setenv("ML_RETRY_SWEEP_INTERVAL", "50")
    app = Celery("shop", broker=rabbitmq_vhost.url, set_as_current=False)
    app.conf.task_ignore_result = True
    install(app)
    app.send_task("shop.add", (1, 2), exchange="amq.direct", routing_key="nobody")
    assert producer_of(app).flush(LIMIT) == 0
    uninstall(app)
    app.close()
    assert rabbitmq_vhost.node.queue_depth(rabbitmq_vhost.name, "ml.dead_letter") == 1


# --- beside the tasks --------------------------------------------------------------------------


def test_health_checks_ask_for_nothing_that_is_not_there(
    rabbitmq_vhost: VirtualHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each would cost a channel, and a line in the broker's log."""
    monkeypatch.setenv("ML_HEALTH_CHECK_INTERVAL", "20")
    app = Celery("shop", broker=rabbitmq_vhost.url, set_as_current=False)
    install(app)
    app.send_task("shop.add", (1, 2), ignore_result=True)
    threading.Event().wait(0.5)
    assert producer_of(app).is_healthy()
    uninstall(app)
    app.close()
    assert [each for each in caplog.messages if "health check" in each] == []


def test_tls(tmp_path: Path) -> None:
    """``broker_use_ssl`` holds for the producer too: it knows the broker, or refuses it."""
    certificates = Certificates(tmp_path)
    with RabbitMQNode(tls=certificates.server_tls()) as node:
        app = Celery("shop", broker=node.tls_url.replace("amqps", "amqp"), set_as_current=False)
        app.conf.broker_use_ssl = {"ca_certs": str(certificates.ca)}
        install(app)
        app.send_task("shop.add", (1, 2), ignore_result=True, retry=False)
        assert node.queue_depth("/", "celery") == 1
        uninstall(app)
        app.conf.broker_use_ssl = True
        install(app)
        with pytest.raises(PublishFailedError):
            app.send_task("shop.add", (1, 2), ignore_result=True, retry=False)
        uninstall(app)
        app.close()


def test_what_is_noted_is_left_out(shop: Shop) -> None:
    """Acknowledged and not run, in a prefork worker; a copy that comes after the first likewise."""
    script = "import celery_shop; celery_shop.late.apply_async((), task_id='{}')"
    environ = shop.environ(installed=True)
    counter = redis.Redis.from_url(shop.backend)
    notes = RedisCompletedTasks(read_redis(f"{shop.backend}?prefix=notes"))
    notes.add("noted:shop.late:0:0", 60.0)

    def send(name: str) -> None:
        argv = [PYTHON, "-c", script.format(name)]
        subprocess.run(argv, env=environ, cwd=shop.directory, check=True, timeout=30)

    send("noted")
    send("fresh")
    with shop.worker(installed=True):
        log = shop.directory / "worker.log"

        def wait_for(text: str) -> None:
            until = time.monotonic() + LIMIT
            while text not in log.read_text():
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)

        wait_for("shop.late[noted] has been completed before")
        wait_for("shop.late[fresh] succeeded")
        send("fresh")  # as a producer may that has lost its connection
        wait_for("shop.late[fresh] has been completed before")
    assert counter.get("late") == b"1"
