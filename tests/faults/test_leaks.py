"""Reconnecting many times leaves nothing behind: no thread, descriptor, connection or memory."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attrs import frozen

from mlproducer import MLProducer
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.rows import message
from tests.faults.test_losses import Connections
from tests.faults.traffic import FIGURES, LIMIT
from tests.long import GIVEN

pytestmark = pytest.mark.broker

PAGE = os.sysconf("SC_PAGE_SIZE")
FASTER = {"reconnect_initial_delay": 0.01, "reconnect_max_delay": 0.05}


@frozen
class Counts:
    """What a producer holds."""

    threads: int
    descriptors: int
    connections: int


def count(node: RabbitMQNode, proxy: Proxy) -> Counts:
    """Count, once the broker has seen the end of what is gone."""
    proxy.wait_for_connections(1, LIMIT)
    deadline = time.monotonic() + LIMIT
    while len(names := node.connections()) > 1:
        assert time.monotonic() < deadline, names
    return Counts(threading.active_count(), len(os.listdir("/proc/self/fd")), len(names))  # noqa: PTH208


def resident() -> int:
    """Bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def reconnect(producer: MLProducer, proxy: Proxy, times: int) -> None:
    """Cut a connection that has just been used, so often, and wait each time for the next."""
    connections = Connections(producer)
    for turn in range(1, times + 1):
        assert producer.publish(message(f"m{turn}")).confirmed
        (proxy.reset, proxy.fin)[turn % 2]()
        connections.wait_for(turn)


@pytest.mark.parametrize("times", [30, pytest.param(GIVEN.times or 300, marks=pytest.mark.slow)])
def test_reconnects(
    rabbitmq_vhost: VirtualHost,
    connect: Connect,
    proxy: Proxy,
    times: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After any number of reconnects there is as much of everything as before the first (110)."""
    caplog.set_level(logging.CRITICAL)  # what pytest keeps of a log is memory, too
    node = rabbitmq_vhost.node
    producer = connect(proxy.url(rabbitmq_vhost.url), **FASTER)
    assert producer.wait_connected(LIMIT)
    reconnect(producer, proxy, 10)  # what is made once is made
    before, memory = count(node, proxy), resident()
    reconnect(producer, proxy, times)
    after, grown = count(node, proxy), resident() - memory
    FIGURES[f"{times} reconnects"] = (
        f"before {before}, after {after}, memory + {grown / 1e6:.1f} MB"
    )
    assert after == before
    assert grown < 10_000_000


@pytest.mark.slow
def test_forks(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Each child publishes on a connection of its own, and nothing piles up in the parent (86)."""
    assert connect().wait_connected(LIMIT)
    times = GIVEN.times or 300
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.scripts.forks", str(times)],
        env={**os.environ, "RABBITMQ_URL": rabbitmq_vhost.url},
        stdout=subprocess.PIPE,
        check=True,
    )
    held = json.loads(told.stdout)
    found = drain(rabbitmq_vhost.url)
    FIGURES[f"{times} forks"] = (
        f"{len(found)} messages, {found.total() - len(found)} duplicates, {held}"
    )
    sides = ("child", "parent")
    assert found == {f"{side}-{number}": 1 for side in sides for number in range(times)}
    assert held["after"] == held["before"]


def test_failed_attempts(connect: Connect, proxy: Proxy, rabbitmq_vhost: VirtualHost) -> None:
    """A hundred attempts that fail half-way leave no descriptor and no thread."""
    producer = connect(proxy.url(rabbitmq_vhost.url), **FASTER, max_reconnect_attempts=1000)
    assert producer.publish(message("before")).confirmed
    before = count(rabbitmq_vhost.node, proxy)
    accepted = proxy.accepted
    for bytes_passed in (1, 500, 600):  # in the midst of Connection.Start, and after it
        proxy.cut_after(bytes_passed, "s2c")
        accepted = max(accepted, proxy.accepted) + 33
        proxy.wait_for_accepted(accepted, LIMIT)
    proxy.heal()
    assert producer.wait_connected(LIMIT)
    assert producer.publish(message("after"), timeout=LIMIT).confirmed
    assert count(rabbitmq_vhost.node, proxy) == before
