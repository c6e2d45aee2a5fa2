"""pytest fixtures: a producer without a broker; a private broker, and a virtual host for each test.

If ``RABBITMQ_TEST_URL`` names a broker, that one is used instead: tests cannot kill or freeze it,
and all of them use the URL's virtual host. Nothing else here connects to a broker that it has not
started.

Owns the servers that the fixtures start. Use with
``pytest_plugins = ["mlproducer.testing.plugin"]`` in the topmost ``conftest.py``. The only module
here that imports pytest.

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
from mlproducer.testing.node import RabbitMQError, RabbitMQNode, RabbitMQNotInstalled
from mlproducer.testing.postgresql_server import PostgreSQLServer
from mlproducer.testing.recording import RecordingProducer
from mlproducer.testing.redis_server import RedisServer
from mlproducer.testing.task_differences import are_tasks, differences, is_task

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
    """The broker that ``RABBITMQ_TEST_URL`` names: tests can connect to it, but not control it."""

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
        """The URL, with its virtual host."""
        return self.url_for(self.virtual_host)

    @property
    def running(self) -> bool:
        """Whether the broker answers."""
        return self._answers()

    def ctl(self, *arguments: str) -> str:
        """Raise `RabbitMQError`: tests may only connect to this broker."""
        raise RabbitMQError(
            f"the broker that {GIVEN} names can only be connected to; unset {GIVEN} to have the "
            "tests start one that they can stop, freeze and configure"
        )

    def eval(self, expression: str) -> str:
        """Raise `RabbitMQError`, as `ctl` does."""
        return self.ctl(expression)

    def launch(self) -> None:
        """Raise `RabbitMQError`, as `ctl` does."""
        self.ctl()

    def close(self) -> None:
        """Do nothing: the broker goes on running."""


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Show, field by field, how two tasks or two lists of tasks differ."""
    if op != "==":
        return None
    if is_task(left) and is_task(right):
        return ["tasks differ:", *differences([left], [right])]
    if are_tasks(left) and are_tasks(right):
        return ["tasks differ:", *differences(left, right)]  # type: ignore[arg-type] # they are lists
    return None


@pytest.fixture
def recording_producer() -> Iterator[RecordingProducer]:
    """A producer that records what is published; see `RecordingProducer`.

    It does not read the environment.
    """
    with RecordingProducer(Settings()) as producer:
        yield producer


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[RabbitMQNode]:
    """A running broker, shared by all tests: one that kills or freezes it brings it back.

    Tests that use it are skipped if RabbitMQ is not installed. ``RABBITMQ_TEST_URL`` names another
    broker to use.
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
    """An empty virtual host of the shared broker, deleted after the test.

    With ``RABBITMQ_TEST_URL`` it is the URL's own virtual host, which may not be empty.
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
    """A running Redis, shared by all tests: each uses a prefix of its own."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    """A running PostgreSQL, shared by all tests: each uses a table of its own."""
    with PostgreSQLServer() as server:
        yield server
