"""The connection ends in the middle of a burst, in every way in which one can end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from mlproducer import MLProducer
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.faults.traffic import FIGURES, LIMIT, SLACK, Traffic, balance, tell
from tests.stopwatch import Stopwatch

pytestmark = pytest.mark.broker

ONE_STEP = 0.65
"""Seconds of the first reconnect delay, 0.5 s, with all of its jitter."""


class Connections:
    """Counts how often a producer was connected."""

    def __init__(self, producer: MLProducer) -> None:
        self.count = 0
        self.times: list[float] = []
        self._changed = threading.Condition()  # guards: count, times
        producer.on("connected", self._hear)

    def _hear(self) -> None:
        with self._changed:
            self.count += 1
            self.times.append(time.monotonic())
            self._changed.notify_all()

    def wait_for(self, n: int, timeout: float = LIMIT) -> None:
        """Wait until it has connected so often."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= n, timeout)


def stop(node: RabbitMQNode) -> None:
    """``rabbitmqctl stop``, and a start."""
    node.ctl("stop")
    node.restart()


def stop_app(node: RabbitMQNode) -> None:
    """Stop the broker in its Erlang machine, and start it again."""
    node.ctl("stop_app")
    node.ctl("start_app")


@pytest.mark.parametrize(
    "how",
    [pytest.param(stop, marks=pytest.mark.slow, id="stop"), pytest.param(stop_app, id="stop_app")],
)
def test_stopped_in_good_order(
    rabbitmq_vhost: VirtualHost,
    connect: Connect,
    mortal_node: RabbitMQNode,
    how: Callable[[RabbitMQNode], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broker that says goodbye (320) loses nothing, and is no error with a traceback (12)."""
    producer = connect()
    connections = Connections(producer)
    with Traffic(producer) as traffic:
        traffic.more(500)
        how(mortal_node)
        connections.wait_for(2)
        traffic.more(500)
    account = balance(traffic, rabbitmq_vhost.url)
    tell(f"graceful {how.__name__}", traffic, account)
    assert traffic.own < producer.settings.publish_timeout + SLACK
    ours = [each for each in caplog.records if each.name.startswith("mlproducer")]
    assert [each.message for each in ours if each.exc_info] == []


@pytest.mark.slow
def test_all_connections_closed_every_half_second(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """Twenty times: each reconnect gets in at its first try, and nothing is lost (13)."""
    producer = connect(reconnect_initial_delay=0.1, reconnect_max_delay=32.0)
    connections = Connections(producer)
    slowest = 0.0
    with Traffic(producer) as traffic:
        connections.wait_for(1)
        for turn in range(1, 21):
            traffic.more(50)
            started = time.monotonic()
            rabbitmq_vhost.node.close_all_connections()
            connections.wait_for(turn + 1)
            slowest = max(slowest, connections.times[turn] - started)
            traffic.last(max(0.0, started + 0.5 - time.monotonic()))
        traffic.more(50)
    account = balance(traffic, rabbitmq_vhost.url)
    tell("close_all_connections x 20", traffic, account, f", slowest reconnect {slowest:.2f} s")
    assert connections.count == 21
    assert producer.status().reconnect_attempts == 0
    assert traffic.own < producer.settings.publish_timeout + SLACK


@pytest.mark.parametrize("how", ["reset", "fin", "half_close"])
def test_cut_by_the_network(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, how: str
) -> None:
    """RST, FIN and half a FIN are losses: found at once, and the next attempt is soon (14)."""
    producer = connect(proxy.url(rabbitmq_vhost.url), reconnect_initial_delay=0.5)
    connections = Connections(producer)
    slowest = 0.0
    with Traffic(producer) as traffic:
        connections.wait_for(1)
        for turn in range(1, 4):
            traffic.more(300)
            watch = Stopwatch()
            getattr(proxy, how)()
            connections.wait_for(turn + 1)
            slowest = max(slowest, watch.own())
        traffic.more(300)
    account = balance(traffic, rabbitmq_vhost.url)
    tell(f"{how} x 3", traffic, account, f", slowest reconnect {slowest:.2f} s")
    assert slowest < ONE_STEP + 1.0
    assert account.in_doubt <= 3 * traffic.threads


def test_a_message_whose_ack_was_destroyed_arrives_twice_at_most(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy
) -> None:
    """Acks swallowed, then a reset, five times: one copy more for each message in flight (16).

    Before each next loss, the messages of the last are confirmed: none is lost twice.
    """
    producer = connect(proxy.url(rabbitmq_vhost.url))
    connections = Connections(producer)
    with Traffic(producer) as traffic:
        connections.wait_for(1)
        for turn in range(1, 6):
            traffic.more(100)
            proxy.hole("s2c")
            traffic.last(0.2)
            proxy.reset()
            proxy.heal()
            connections.wait_for(turn + 1)
            for receipt in traffic.journal.receipts:
                assert receipt.result(LIMIT).confirmed
        traffic.more(100)
    account = balance(traffic, rabbitmq_vhost.url)
    tell("acks destroyed x 5", traffic, account)
    FIGURES["duplicates per message in flight at a loss"] = (
        f"{account.duplicates / max(1, account.in_doubt):.2f} (acks destroyed on purpose)"
    )
    assert account.most == 2
    assert 0 < account.in_doubt <= 5 * traffic.threads
