"""Producers on the fresh virtual host of a real node, closed in time after each test.

Whatever a test does to the broker, the I/O loop must not fail: that is checked after each.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlproducer import MLProducer, Settings
from mlproducer.stores.protocol import Store
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.stopwatch import in_time

CLOSE_TIMEOUT = 1.0

STRICT_LIMIT = 1000
"""Bytes of the longest body that `strict_node` takes."""

QUICK = {
    "circuit_breaker_threshold": 1_000_000,
    "max_message_retries": 1000,
    "reconnect_initial_delay": 0.1,
    "reconnect_max_delay": 0.5,
    "max_reconnect_attempts": 1000,  # a node needs about 6 s to come back, or minutes
    "message_retry_base_delay": 0.5,
    "retry_sweep_interval": 0.2,
}
"""Delays that keep the tests short; those that measure a delay override them."""

Connect = Callable[..., MLProducer]


@pytest.fixture
def connect(rabbitmq_vhost: VirtualHost, caplog: pytest.LogCaptureFixture) -> Iterator[Connect]:
    """Make producers: ``connect(url=None, store=None, **settings)``."""
    producers: list[MLProducer] = []

    def make(url: str | None = None, store: Store | None = None, **settings: Any) -> MLProducer:
        chosen = Settings(url=url or rabbitmq_vhost.url, **{**QUICK, **settings})
        producers.append(MLProducer(chosen, store=store))
        return producers[-1]

    yield make
    for producer in producers:
        with in_time(CLOSE_TIMEOUT + 0.5):
            producer.close(CLOSE_TIMEOUT)
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [each.message for each in records if each.levelno >= logging.CRITICAL] == []


@pytest.fixture
def mortal_node(rabbitmq_vhost: VirtualHost) -> Iterator[RabbitMQNode]:
    """Yield the shared node to a test that ends it; afterwards a new one is in its place.

    What a killed node has on disk may be incomplete: after some kills of RabbitMQ 3.10 quorum
    queues could not be declared any more (541), or nacked whatever they were sent. One that was
    restarted in good order has once sent delayed tasks past their levels afterwards.
    """
    node = rabbitmq_vhost.node
    yield node
    node.close()
    node.start()
    node.add_vhost(rabbitmq_vhost.name)


@pytest.fixture(scope="module")
def strict_node() -> Iterator[RabbitMQNode]:
    """A node that takes bodies of up to `STRICT_LIMIT` bytes; RabbitMQ 4 reads it at boot alone."""
    with RabbitMQNode(config={"max_message_size": str(STRICT_LIMIT)}) as node:
        yield node


@pytest.fixture
def strict_vhost(strict_node: RabbitMQNode) -> VirtualHost:
    """The virtual host ``/`` of that node."""
    return VirtualHost("/", strict_node, strict_node.url)


@pytest.fixture
def proxy(rabbitmq_vhost: VirtualHost) -> Iterator[Proxy]:
    """A proxy in front of the shared node."""
    node = rabbitmq_vhost.node
    with Proxy((node.host, node.port)) as between:
        yield between
