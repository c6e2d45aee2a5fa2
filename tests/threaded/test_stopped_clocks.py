"""Libraries for tests that stop or move time, while a producer is connected."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import freezegun
import pytest
import time_machine

from mlproducer import MLProducer, Settings
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, make_message
from tests.threaded.brokers import Silent
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import events_of

STOPS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "freezegun, later": lambda: freezegun.freeze_time("2090-01-01"),
    "freezegun, earlier": lambda: freezegun.freeze_time("1970-01-02"),
    "time-machine": lambda: time_machine.travel("2020-01-01", tick=False),
}

BROKER = """
import sys
from mlproducer.testing import FakeBroker
with FakeBroker() as broker:
    print(broker.url, flush=True)
    sys.stdin.readline()
    print(broker.accepted, flush=True)
"""


@contextmanager
def broker_elsewhere() -> Iterator[tuple[str, Callable[[], int]]]:
    """A broker in a process of its own, whose clock goes on; its URL, and who came."""
    with subprocess.Popen(
        [sys.executable, "-c", BROKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield url, lambda: int(process.communicate("\n", timeout=LIMIT)[0])


def real_seconds() -> float:
    """Return the time of the system, which is not stopped."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@pytest.mark.parametrize("stop", STOPS)
def test_heartbeats_go_on(stop: str) -> None:
    """The broker hears from us while the clock stands, and after it."""
    with broker_elsewhere() as (url, accepted):
        settings = Settings(url=url, **{**QUICK, "heartbeat": 1})
        with MLProducer(settings) as producer:
            assert producer.publish(make_message()).confirmed
            lost = events_of(producer, "disconnected")
            with STOPS[stop]():
                threading.Event().wait(2.6)
                assert producer.publish(make_message()).confirmed
            threading.Event().wait(2.6)
            assert producer.publish(make_message()).confirmed
            assert lost.seen == []
        assert accepted() == 1


class NacksTwice(Behaviour):
    """Refuses the first two times."""

    def __init__(self) -> None:
        self.left = 2

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Nack, then ack."""
        self.left -= 1
        (connection.nack if self.left >= 0 else connection.ack)(channel, tag)


@pytest.mark.parametrize("stop", STOPS)
def test_retries_and_reconnects_go_on(connect: Connect, serve: Serve, stop: str) -> None:
    """What began before, meanwhile or after the clock stood still comes to its end."""
    broker = serve(NacksTwice())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    happened = events_of(producer, "connected", "disconnected")
    with STOPS[stop]():
        assert producer.submit(make_message()).result(LIMIT).attempts == 3
        broker.connections[0].reset()
        happened.wait_for("disconnected", "connected")
        broker.connections[0].reset()  # its delay begins now, and ends after it
    happened.wait_for("disconnected", "connected", "disconnected", "connected")
    assert producer.publish(make_message()).result(LIMIT).confirmed


@pytest.mark.parametrize("stop", STOPS)
def test_timeouts_are_real(connect: Connect, serve: Serve, stop: str) -> None:
    """A call ends at its limit, not when the clock goes on."""
    producer = connect(serve(Silent()), confirm_give_up=60.0)
    assert producer.wait_connected(LIMIT)
    with STOPS[stop]():
        begun = real_seconds()
        assert not producer.publish(make_message(), timeout=0.3).confirmed
        assert 0.3 <= real_seconds() - begun < 10.0
