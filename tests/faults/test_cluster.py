"""Three nodes: the one in use dies, the majority freezes, all are restarted in turn.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import frozen

from mlproducer import MLProducer, Settings
from mlproducer.testing import RabbitMQCluster, RabbitMQNode
from tests.broker.conftest import QUICK
from tests.faults.test_losses import Connections
from tests.faults.traffic import LIMIT, SLACK, Traffic, balance, tell

pytestmark = [pytest.mark.broker, pytest.mark.cluster, pytest.mark.slow]

FAILOVER = 2.0
"""Seconds within which publishing goes on at another node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    """Three nodes, for all tests here."""
    with RabbitMQCluster(3) as three:
        yield three


@frozen
class Stage:
    """A virtual host of the cluster and a producer on it."""

    nodes: tuple[RabbitMQNode, ...]
    url: str
    producer: MLProducer

    def split(self) -> tuple[RabbitMQNode, list[RabbitMQNode]]:
        """Return the node in use, and the others."""
        address = self.producer.status().broker
        in_use = next(node for node in self.nodes if f"{node.host}:{node.port}" == address)
        return in_use, [node for node in self.nodes if node is not in_use]


@pytest.fixture
def stage(cluster: RabbitMQCluster) -> Iterator[Stage]:
    """A connected producer on a fresh virtual host; afterwards all nodes run."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.nodes[0].add_vhost(name)
    url = cluster.url_for(name)
    settings: dict[str, Any] = {**QUICK, "reconnect_initial_delay": 0.5}
    producer = MLProducer(Settings(url=url, **settings))
    assert producer.wait_connected(LIMIT)
    yield Stage(cluster.nodes, url.split(",")[0], producer)
    producer.close(1.0)
    for node in cluster.nodes:
        if not node.running:
            node.restart()


def test_node_in_use_is_killed(stage: Stage) -> None:
    """Another node confirms within 2 s; nothing is lost (58, 59)."""
    connections = Connections(stage.producer)
    in_use, others = stage.split()
    for node in stage.nodes:
        node.save_queues()
    with Traffic(stage.producer) as traffic:
        traffic.more(500)
        killed_at = time.monotonic()
        in_use.kill()
        connections.wait_for(1)
        failover = connections.times[0] - killed_at
        traffic.more(200)
    assert stage.producer.status().broker in [f"{node.host}:{node.port}" for node in others]
    account = balance(traffic, others[0].url_for(stage.url.rpartition("/")[2]))
    tell("cluster, node in use killed", traffic, account, f", failover {failover:.2f} s")
    assert failover < FAILOVER
    assert traffic.longest < stage.producer.settings.publish_timeout + SLACK


def test_majority_frozen(stage: Stage) -> None:
    """No confirm without a majority; thawed, the late ones come: 0 lost, 0 twice (57)."""
    disconnected = threading.Event()
    stage.producer.on("disconnected", disconnected.set)
    in_use, others = stage.split()
    with Traffic(stage.producer) as traffic:
        traffic.more(500)
        with others[0].frozen(), others[1].frozen():
            traffic.last(9.0)
        traffic.more(200)
    account = balance(traffic, in_use.url_for(stage.url.rpartition("/")[2]))
    tell("cluster, two of three frozen for 9 s", traffic, account)
    assert not disconnected.is_set()
    assert account.in_doubt > 0
    assert account.duplicates == 0
    assert traffic.longest < stage.producer.settings.publish_timeout + SLACK


def test_rolling_restart(stage: Stage) -> None:
    """Each node is stopped and started in turn under load: nothing is lost (61)."""
    with Traffic(stage.producer, pause=0.02) as traffic:
        traffic.more(300)
        for node in stage.nodes:
            node.restart()
            traffic.more(300)
    account = balance(traffic, stage.url)
    tell("cluster, rolling restart", traffic, account)
    assert traffic.longest < stage.producer.settings.publish_timeout + SLACK
