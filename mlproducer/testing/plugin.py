"""pytest fixtures: one running broker for the whole run, a fresh virtual host for each test.

Owns the fixtures' life. Use with ``pytest_plugins = ["mlproducer.testing.plugin"]`` in the topmost
``conftest.py``. The only module here that imports pytest.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from attrs import field, frozen

from mlproducer.testing.node import RabbitMQNode
from mlproducer.testing.redis_server import RedisServer

__all__ = ["VirtualHost", "rabbitmq_node", "rabbitmq_vhost", "redis_server"]


@frozen
class VirtualHost:
    """A virtual host made for one test."""

    name: str
    node: RabbitMQNode
    url: str = field(repr=False)


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[RabbitMQNode]:
    """A running broker, shared by all tests: who kills or freezes it brings it back."""
    with RabbitMQNode() as node:
        yield node


@pytest.fixture
def rabbitmq_vhost(rabbitmq_node: RabbitMQNode) -> Iterator[VirtualHost]:
    """A virtual host of the shared broker, empty, deleted after the test."""
    name = f"test-{secrets.token_hex(4)}"
    rabbitmq_node.add_vhost(name)
    yield VirtualHost(name, rabbitmq_node, rabbitmq_node.url_for(name))
    rabbitmq_node.delete_vhost(name)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A running Redis, shared by all tests: each takes a prefix of its own."""
    with RedisServer() as server:
        yield server
