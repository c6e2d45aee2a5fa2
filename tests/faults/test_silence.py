"""A broker, or the path to it, that falls silent without a word: found out in time, and survived.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import threading
import time

import pytest

from mlproducer import MLProducer
from mlproducer.testing import Proxy
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Direction
from tests.broker.conftest import Connect
from tests.faults.traffic import FIGURES, FOUND, LIMIT, SLACK, Traffic, balance, tell

pytestmark = pytest.mark.broker

FOUND_IDLE = 35.5
"""Seconds within which a silent broker is found out without traffic."""


class Ends:
    """Hears when a producer gives its connection up."""

    def __init__(self, producer: MLProducer) -> None:
        self.heard = threading.Event()
        self.at = 0.0
        producer.on("disconnected", self._hear)

    def _hear(self) -> None:
        if not self.heard.is_set():
            self.at = time.monotonic()
            self.heard.set()


@pytest.mark.slow
def test_frozen_for_six_seconds(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Less than the timeout (2 s) and the probe's limit (5 s): everything arrives exactly once."""
    producer = connect(publish_timeout=2.0)
    ends = Ends(producer)
    with Traffic(producer) as traffic:
        traffic.more(500)
        with rabbitmq_vhost.node.frozen():
            traffic.last(6.0)
        traffic.more(500)
    account = balance(traffic, rabbitmq_vhost.url)
    tell("frozen for 6 s, timeout 2 s", traffic, account)
    assert not ends.heard.is_set()
    assert account.in_doubt > 0
    assert account.duplicates == 0
    assert traffic.longest < 2.0 + SLACK


@pytest.mark.slow
def test_frozen_for_twenty_seconds(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Found out within 10.5 s; what was in flight is sent again after the thaw, once (22)."""
    producer = connect()
    ends = Ends(producer)
    with Traffic(producer) as traffic:
        traffic.more(500)
        frozen_at = time.monotonic()
        with rabbitmq_vhost.node.frozen():
            assert ends.heard.wait(30.0)
            traffic.last(max(0.0, frozen_at + 20.0 - time.monotonic()))
        thawed_at = time.monotonic()
        assert producer.wait_connected(LIMIT)
        recovery = time.monotonic() - thawed_at
        traffic.more(500)
    account = balance(traffic, rabbitmq_vhost.url)
    found = ends.at - frozen_at
    tell(
        "frozen for 20 s, with traffic",
        traffic,
        account,
        f", found after {found:.2f} s, connected {recovery:.2f} s after the thaw",
    )
    assert found <= FOUND
    assert traffic.longest < producer.settings.publish_timeout + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["both", "c2s", "s2c"])
def test_black_hole(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, direction: Direction
) -> None:
    """A path that swallows, both ways or one, is found out within 10.5 s of traffic (23, 25)."""
    producer = connect(proxy.url(rabbitmq_vhost.url))
    ends = Ends(producer)
    with Traffic(producer) as traffic:
        traffic.more(500)
        started = time.monotonic()
        proxy.hole(direction)
        assert ends.heard.wait(FOUND + 5.0)
        proxy.heal()
        healed_at = time.monotonic()
        assert producer.wait_connected(LIMIT)
        recovery = time.monotonic() - healed_at
        traffic.more(500)
    account = balance(traffic, rabbitmq_vhost.url)
    found = ends.at - started
    tell(
        f"black hole {direction}, with traffic",
        traffic,
        account,
        f", found after {found:.2f} s, connected {recovery:.2f} s after its end",
    )
    assert found <= FOUND
    assert traffic.longest < producer.settings.publish_timeout + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["frozen", "hole"])
def test_silent_without_traffic(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, fault: str
) -> None:
    """Without traffic the health check finds it out, within its interval of 30 s and 5 s."""
    producer = connect(proxy.url(rabbitmq_vhost.url))
    ends = Ends(producer)
    assert producer.wait_connected(LIMIT)
    node = rabbitmq_vhost.node
    started = time.monotonic()
    if fault == "frozen":
        with node.frozen():
            assert ends.heard.wait(FOUND_IDLE + 5.0)
    else:
        proxy.hole()
        assert ends.heard.wait(FOUND_IDLE + 5.0)
        proxy.heal()
    found = ends.at - started
    FIGURES[f"{fault}, idle"] = f"found after {found:.2f} s"
    assert found <= FOUND_IDLE
    assert producer.wait_connected(LIMIT)
