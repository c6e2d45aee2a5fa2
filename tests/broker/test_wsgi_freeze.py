"""The health of a producer whose broker hangs: it is told at once, and truly."""

from __future__ import annotations

import gc
import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from mlproducer import MLProducer, Outcome, SummarizationTask, wsgi
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.helpers import LIMIT

pytestmark = pytest.mark.broker

MAX_TIME = 0.005
"""Seconds within which /health answers."""

TASK = SummarizationTask("share", {"text": "text"})


class Health:
    """Asks after a producer's health, and measures how long each answer takes.

    :ivar cpu: seconds of this thread's own time that each took
    :ivar wall: seconds that each took, with whatever else the machine did meanwhile
    """

    def __init__(self, producer: MLProducer) -> None:
        self._app = wsgi.make_app(producer)
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Return status and content."""
        environ: dict[str, Any] = {"PATH_INFO": "/health"}
        setup_testing_defaults(environ)
        statuses: list[str] = []
        began, spent = time.perf_counter(), time.thread_time()
        body = b"".join(self._app(environ, lambda status, _headers: statuses.append(status)))  # type: ignore[arg-type]
        self.cpu.append(time.thread_time() - spent)
        self.wall.append(time.perf_counter() - began)
        return int(statuses[0].split()[0]), json.loads(body)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage of a whole test run out of what is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_health_while_the_broker_hangs(connect: Connect, rabbitmq_vhost: VirtualHost) -> None:
    """From the freeze to its discovery and after it no answer waits, and each takes < 5 ms of CPU.

    Of its time on the wall only the least is judged, since a busy machine may delay the others.
    """
    producer = connect(publish_timeout=0.5)
    disconnected, connected = threading.Event(), threading.Event()
    producer.on("disconnected", disconnected.set)
    assert producer.wait_connected(LIMIT)
    producer.on("connected", connected.set)
    health = Health(producer)
    assert health.ask()[0] == 200
    with rabbitmq_vhost.node.frozen(), no_collection():
        assert producer.publish(TASK).outcome is Outcome.DEFERRED
        submitted = [producer.submit(TASK) for _ in range(500)]
        deadline = time.monotonic() + 2 * LIMIT
        while not disconnected.wait(0.005):
            assert time.monotonic() < deadline
            health.ask()
        for _ in range(200):
            status, content = health.ask()
            assert (status, content["healthy"]) == (503, False)
            assert producer.status().broker in content["reason"]
        over_http = times_over_http(producer)
    assert connected.wait(2 * LIMIT)
    assert health.ask()[0] == 200
    assert all(each.result(2 * LIMIT).confirmed for each in submitted)
    assert len(health.cpu) > 300
    assert statistics.quantiles(health.cpu, n=100)[98] < MAX_TIME
    assert min(health.wall) < MAX_TIME  # a busy machine may delay most of them
    assert min(over_http) < MAX_TIME


def times_over_http(producer: MLProducer) -> list[float]:
    """Ask a server 100 times, and return the seconds that each answer took."""
    times = []
    with wsgi.serve(producer, 0) as server:
        for _ in range(100):
            began = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
            with closing(connection):
                connection.request("GET", "/health")
                assert connection.getresponse().status == 503
            times.append(time.perf_counter() - began)
    return times


def test_blocked(connect: Connect, rabbitmq_vhost: VirtualHost) -> None:
    """While the broker blocks publishers a producer is 503, and says who blocks."""
    producer = connect()
    blocked, unblocked = threading.Event(), threading.Event()
    producer.on("blocked", blocked.set)
    producer.on("unblocked", unblocked.set)
    assert producer.publish(TASK).confirmed
    health = Health(producer)
    with rabbitmq_vhost.node.memory_alarm():
        waiting = producer.submit(TASK)
        assert blocked.wait(LIMIT)
        status, content = health.ask()
        assert (status, content["rabbitmq"]["blocked"]) == (503, True)
        broker = producer.status().broker
        assert content["reason"] == f"{broker} blocks publishers: a memory or disk alarm"
    assert unblocked.wait(LIMIT)
    assert waiting.result(LIMIT).confirmed
    assert health.ask()[0] == 200
