"""A deadline that holds, whatever the network does: `publish` is back within its timeout + 0.25 s.

Each fault is tried with twenty threads at once, half of which want their message back. The longest
publish under each fault stands in `LONGEST`, and is printed by ``pytest -s``.
"""

from __future__ import annotations

import math
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
from attrs import frozen

from mlproducer import Message, MLProducer, _answers
from mlproducer.errors import (
    BrokerBlockedError,
    ConfirmTimeoutError,
    NotConnectedError,
    PublishError,
)
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Direction, Proxy
from tests.broker.conftest import Connect
from tests.stopwatch import Stopwatch, in_time

pytestmark = pytest.mark.broker

THREADS = 20
TIMEOUTS = (0.3, 1.0)
SLACK = 0.25
GRACE = 0.5
"""Seconds that `close` may take on top of its timeout."""

LONGEST: dict[tuple[str, float], float] = {}
"""Seconds of the longest publish, by fault and timeout."""


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print the longest publish under each fault, once all are known."""
    yield
    print(f"\n{'longest publish() under':<32}" + "".join(f"{f'T = {t:g} s':>12}" for t in TIMEOUTS))
    for fault in dict.fromkeys(fault for fault, _ in LONGEST):
        print(
            f"{fault:<32}"
            + "".join(f"{LONGEST.get((fault, t), math.nan):>10.3f} s" for t in TIMEOUTS)
        )


@frozen
class Stage:
    """Where a fault is played: a real node, and a proxy before it."""

    url: str
    node: RabbitMQNode
    proxy: Proxy
    connect: Connect

    def connected(self) -> MLProducer:
        """Return a producer whose link carries messages."""
        producer = self.connect(self.url)
        assert producer.publish(Message(body=b"", routing_key="ml.embed")).confirmed
        return producer


Fault = Callable[[Stage], AbstractContextManager[MLProducer]]


@contextmanager
def refused(stage: Stage) -> Iterator[MLProducer]:
    """Nothing listens."""
    stage.proxy.refuse()
    yield stage.connect(stage.url)


@contextmanager
def deaf(stage: Stage) -> Iterator[MLProducer]:
    """A server accepts and says nothing."""
    stage.proxy.deaf()
    yield stage.connect(stage.url)


class _WebServer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


@contextmanager
def not_amqp(stage: Stage) -> Iterator[MLProducer]:
    """A server answers in another protocol."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _WebServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host, port = server.server_address[:2]
        yield stage.connect(f"amqp://guest:guest@{host!s}:{port}/")
        server.shutdown()
        thread.join(30.0)


@contextmanager
def frozen_before(stage: Stage) -> Iterator[MLProducer]:
    """The broker is stopped by SIGSTOP before the first connection."""
    with stage.node.frozen():
        yield stage.connect(stage.url)


@contextmanager
def frozen_later(stage: Stage) -> Iterator[MLProducer]:
    """The broker is stopped by SIGSTOP under a connection."""
    producer = stage.connected()
    with stage.node.frozen():
        yield producer


def hole(direction: Direction) -> Fault:
    """The network swallows what is sent, without a reset."""

    @contextmanager
    def fault(stage: Stage) -> Iterator[MLProducer]:
        producer = stage.connected()
        stage.proxy.hole(direction)
        yield producer

    return fault


@contextmanager
def blocked(stage: Stage) -> Iterator[MLProducer]:
    """The broker has a memory alarm."""
    producer = stage.connected()
    with stage.node.memory_alarm():
        yield producer


@contextmanager
def slow(stage: Stage) -> Iterator[MLProducer]:
    """The network carries 1 kB/s; the bodies have 100 kB."""
    producer = stage.connected()
    stage.proxy.rate(1000)
    yield producer


@frozen
class Case:
    """A fault, what publishes may say under it, and how many bytes their bodies have."""

    fault: Fault
    errors: tuple[type[PublishError], ...]
    size: int = 100


UNCONNECTED = (NotConnectedError,)
SILENT = (ConfirmTimeoutError,)
CASES = {
    "down": Case(refused, UNCONNECTED),
    "deaf": Case(deaf, UNCONNECTED),
    "not AMQP": Case(not_amqp, UNCONNECTED),
    "frozen before connecting": Case(frozen_before, UNCONNECTED),
    "frozen": Case(frozen_later, SILENT),
    "black hole to the broker": Case(hole("c2s"), SILENT),
    "black hole from the broker": Case(hole("s2c"), SILENT),
    "black hole both ways": Case(hole("both"), SILENT),
    "blocked": Case(blocked, (*SILENT, BrokerBlockedError)),
    "1 kB/s, bodies of 100 kB": Case(slow, SILENT, 100_000),
}


@pytest.mark.parametrize("name", CASES)
def test_no_publish_outlasts_its_deadline(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, name: str
) -> None:
    """Twenty threads are back within T + 0.25 s with the right reason; close is in time too."""
    stage = Stage(proxy.url(rabbitmq_vhost.url), rabbitmq_vhost.node, proxy, connect)
    case = CASES[name]
    with case.fault(stage) as producer:
        for timeout in TIMEOUTS:
            watch = Stopwatch()
            answers = publish_at_once(producer, b"x" * case.size, timeout)
            waited = watch.waited()
            assert {type(error) for error, _, _ in answers} <= set(case.errors)
            LONGEST[name, timeout] = longest = max(took for _, took, _ in answers)
            assert longest - waited < timeout + SLACK
            # Only an I/O thread that has no CPU gives back what it could have kept.
            assert waited > _answers.GRACE or not any(given_back for _, _, given_back in answers)
        with in_time(0.3 + GRACE):
            producer.close(0.3)


def publish_at_once(
    producer: MLProducer, body: bytes, timeout: float
) -> list[tuple[PublishError | None, float, bool]]:
    """Publish from twenty threads at once: why it failed, after how many seconds, and whether a
    message that was to be retried was given back.
    """
    start = threading.Barrier(THREADS)

    def publish(number: int) -> tuple[PublishError | None, float, bool]:
        message = Message(body=body, routing_key="ml.embed")
        start.wait(30.0)
        began, retry, given_back = time.monotonic(), number % 2 == 0, False
        try:
            error = producer.publish(message, timeout=timeout, retry=retry).reason
        except PublishError as raised:
            error, given_back = raised, retry
        return error, time.monotonic() - began, given_back

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(publish, range(THREADS), timeout=timeout + 10.0))
