"""Several brokers in one URL: one is enough, and each process begins with another."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mlproducer import Message, MLProducer, Outcome
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.audit import Journal, drain
from tests.broker.conftest import Connect
from tests.helpers import LIMIT
from tests.stopwatch import Stopwatch, in_time

pytestmark = pytest.mark.broker

FAILOVER = 2.0
"""Seconds within which publishing goes on at another broker."""


@pytest.fixture(scope="module")
def second_node() -> Iterator[RabbitMQNode]:
    """A broker of its own, not clustered with the shared one."""
    with RabbitMQNode() as node:
        yield node


def address(node: RabbitMQNode) -> str:
    """``host:port``, as a producer's status names it."""
    return f"{node.host}:{node.port}"


def publish(producer: MLProducer, journal: Journal, names: range) -> None:
    """Publish one after the other, and write down what was said."""
    for n in names:
        journal.publish(producer, Message(body=b"x", routing_key="ml.embed", message_id=f"m{n}"))


def test_publishing_goes_on_at_the_other_broker(
    mortal_node: RabbitMQNode, second_node: RabbitMQNode, connect: Connect
) -> None:
    """When the broker in use is killed, the next message is confirmed by the other within 2 s."""
    nodes = {address(node): node for node in (mortal_node, second_node)}
    journal = Journal()
    producer = connect(f"{mortal_node.url},{second_node.url}", reconnect_initial_delay=0.5)
    publish(producer, journal, range(100))
    in_use = nodes.pop(producer.status().broker)
    (other,) = nodes.values()
    assert drain(in_use.url) == {f"m{n}": 1 for n in range(100)}
    in_use.kill()
    watch = Stopwatch()
    publish(producer, journal, range(100, 200))
    assert producer.flush(LIMIT) == 0
    took = watch.own()
    print(f"\nbroker killed: 100 further messages confirmed by the other after {took:.2f} s")
    assert took < FAILOVER
    assert producer.status().broker == address(other)
    assert journal.count(Outcome.CONFIRMED) == len(journal) == 200
    assert drain(other.url) == {f"m{n}": 1 for n in range(100, 200)}


@pytest.mark.parametrize("first", [True, False], ids=["first in the URL", "last in the URL"])
def test_one_broker_is_down_from_the_start(
    rabbitmq_node: RabbitMQNode, connect: Connect, first: bool
) -> None:
    """A broker that is not there costs nothing: the first publish is confirmed by the other."""
    urls = ["amqp://guest:guest@127.0.0.1:1/", rabbitmq_node.url]
    with in_time(4 * FAILOVER):
        for _ in range(4):  # either order of the routes comes up, save once in eight runs
            producer = connect(",".join(urls if first else reversed(urls)))
            receipt = producer.publish(Message(body=b"x", routing_key="ml.embed"), timeout=LIMIT)
            assert receipt.reason is None
            assert producer.status().broker == address(rabbitmq_node)
    assert drain(rabbitmq_node.url).total() == 4


SHOW_FIRST = """
import sys
from mlproducer import MLProducer, Settings
producer = MLProducer(Settings(url=sys.argv[1]))
producer.start()
print(producer.status().broker)
producer.close(0.0)
"""


def test_each_process_begins_with_another_broker() -> None:
    """The order is shuffled per process, so that a runtime spreads over the brokers."""
    with ExitStack() as stack:  # deaf, so that each process stays with its first
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
        ports = [server.getsockname()[1] for server in servers]
        url = ",".join(f"amqp://guest:guest@127.0.0.1:{port}/" for port in ports)
        processes = [
            subprocess.Popen([sys.executable, "-c", SHOW_FIRST, url], stdout=subprocess.PIPE)
            for _ in range(6)
        ]
        begun = [process.communicate(timeout=LIMIT)[0].decode().strip() for process in processes]
    assert set(begun) <= {f"127.0.0.1:{port}" for port in ports}
    assert len(set(begun)) > 1  # all alike by chance: once in 8 ** 5 runs
