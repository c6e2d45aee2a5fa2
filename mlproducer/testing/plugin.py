"""pytest fixtures: a producer with no broker; or one running broker, and a virtual host per test.

Where ``RABBITMQ_TEST_URL`` names a broker, that one is used as it is: its tests must not kill it,
and share the URL's virtual host. Nothing else here connects to a broker that it has not started.

Owns the fixtures' life. Use with ``pytest_plugins = ["mlproducer.testing.plugin"]`` in the topmost
``conftest.py``. The only module here that imports pytest.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from attrs import field, frozen

from mlproducer._broker_url import Defaults, parse
from mlproducer.settings import Settings
from mlproducer.testing.differences import are_tasks, differences, is_task
from mlproducer.testing.node import RabbitMQError, RabbitMQNode, RabbitMQNotInstalled
from mlproducer.testing.postgresql_server import PostgreSQLServer
from mlproducer.testing.recording import RecordingProducer
from mlproducer.testing.redis_server import RedisServer

__all__ = [
    "GivenBroker",
    "VirtualHost",
    "postgresql_server",
    "rabbitmq_node",
    "rabbitmq_vhost",
    "recording_producer",
    "redis_server",
]

GIVEN = "RABBITMQ_TEST_URL"


@frozen
class VirtualHost:
    """A virtual host made for one test."""

    name: str
    node: RabbitMQNode
    url: str = field(repr=False)


class GivenBroker(RabbitMQNode):
    """A broker that was there before the tests: it has addresses, and takes no orders."""

    def __init__(self, url: str) -> None:
        broker, *others = parse(url, Defaults(), GIVEN)
        if others or broker.tls:
            raise RabbitMQError(f"{GIVEN} must be one amqp:// URL")
        super().__init__(port=broker.port)
        self.host, self.user, self.password = broker.host, broker.user, broker.password
        self.virtual_host = broker.virtual_host

    def __repr__(self) -> str:
        return f"<GivenBroker {self.host}:{self.port}>"

    @property
    def url(self) -> str:
        """Its address, with the virtual host that was given."""
        return self.url_for(self.virtual_host)

    @property
    def running(self) -> bool:
        """Whether it takes connections."""
        return self._listens()

    def ctl(self, *arguments: str) -> str:
        """Raise `RabbitMQError`: it is not ours to order about."""
        raise RabbitMQError(f"the broker of {GIVEN} takes no orders; without it, one is started")

    def eval(self, expression: str) -> str:
        """Raise `RabbitMQError`, as `ctl`."""
        return self.ctl(expression)

    def launch(self) -> None:
        """Raise `RabbitMQError`, as `ctl`."""
        self.ctl()

    def close(self) -> None:
        """Leave it as it is."""


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Show what two tasks, or lists of tasks, say, where a test finds that they differ."""
    if op != "==":
        return None
    if is_task(left) and is_task(right):
        return ["tasks differ:", *differences([left], [right])]
    if are_tasks(left) and are_tasks(right):
        return ["tasks differ:", *differences(left, right)]  # type: ignore[arg-type] # they are lists
    return None


@pytest.fixture
def recording_producer() -> Iterator[RecordingProducer]:
    """A producer that notes what is published, and publishes nothing; see `RecordingProducer`.

    Of the environment it reads nothing.
    """
    with RecordingProducer(Settings()) as producer:
        yield producer


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[RabbitMQNode]:
    """A running broker, shared by all tests: who kills or freezes it brings it back.

    It is skipped where RabbitMQ is not installed. ``RABBITMQ_TEST_URL`` names another one to use.
    """
    url = os.environ.get(GIVEN)
    if url:
        yield GivenBroker(url)
        return
    with ExitStack() as stack:
        try:
            node = stack.enter_context(RabbitMQNode())
        except RabbitMQNotInstalled as missing:
            pytest.skip(str(missing))
        yield node


@pytest.fixture
def rabbitmq_vhost(rabbitmq_node: RabbitMQNode) -> Iterator[VirtualHost]:
    """A virtual host of the shared broker, empty, deleted after the test.

    Of a broker that was given, it is the URL's own, as it is.
    """
    if isinstance(rabbitmq_node, GivenBroker):
        yield VirtualHost(rabbitmq_node.virtual_host, rabbitmq_node, rabbitmq_node.url)
        return
    name = f"test-{secrets.token_hex(4)}"
    rabbitmq_node.add_vhost(name)
    yield VirtualHost(name, rabbitmq_node, rabbitmq_node.url_for(name))
    rabbitmq_node.delete_vhost(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis, shared by all tests: each takes a prefix of its own."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """A running PostgreSQL, shared by all tests: each takes a table of its own."""
    with PostgreSQLServer() as server:
        yield server
