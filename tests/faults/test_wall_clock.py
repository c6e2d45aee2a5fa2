"""The wall clock jumps by an hour, both ways, under a publisher: libfaketime moves it (106)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT

HOUR = 3600
COUNT = 20


class Fickle(Behaviour):
    """Nacks the first copy of each message."""

    def __init__(self) -> None:
        self.copies: Counter[str] = Counter()

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Refuse, then confirm."""
        name = str(message.properties.message_id)
        self.copies[name] += 1
        settle = connection.nack if self.copies[name] == 1 else connection.ack
        settle(channel, tag)


@frozen
class Publisher:
    """A process, and the file that says how far its clock is off."""

    process: subprocess.Popen[str]
    clock: Path

    def jump(self, seconds: int) -> None:
        """Move its clock, and see that it has moved."""
        before = self.ask(now=None)
        self.clock.write_text(f"{seconds:+d}\n", encoding="ascii")
        deadline = time.monotonic() + LIMIT
        while abs(self.ask(now=None) - before) < HOUR / 2:
            assert time.monotonic() < deadline, "libfaketime does not work"

    def ask(self, **order: Any) -> Any:
        """Give an order, and wait for what comes of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def publisher(url: str, store_url: str, folder: Path) -> Iterator[Publisher]:
    """Start one whose clock is right so far."""
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    clock = folder / "clock"
    clock.write_text("+0\n", encoding="ascii")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.scripts.clock", url, store_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        },
    )
    with process:
        yield Publisher(process, clock)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LIMIT) == 0


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
@pytest.mark.parametrize("store", ["memory", "sqlite", "sqlite ahead"])
def test_the_clock_jumps_during_an_outage(tmp_path: Path, store: str, jump: int) -> None:
    """Nothing waits longer than its delay, nothing is lost, nothing is sent too often."""
    path = f"sqlite:///{tmp_path / 'store.db'}"
    urls = {"memory": "memory://", "sqlite": path, "sqlite ahead": f"{path}?write_ahead=1"}
    behaviour = Fickle()
    with FakeBroker(behaviour) as broker:
        broker.stop_listening()
        with publisher(broker.url, urls[store], tmp_path) as each:
            assert set(each.ask(publish=COUNT)) == {"deferred"}
            each.jump(jump)
            assert set(each.ask(publish=COUNT)) == {"deferred"}
            broker.listen_again()
            assert each.ask(flush=LIMIT) == 0
            each.jump(0)
            assert set(each.ask(publish=COUNT)) == {"deferred"}  # nacked, and retried at once
            assert each.ask(flush=LIMIT) == 0
    assert len(behaviour.copies) == 3 * COUNT
    assert set(behaviour.copies.values()) == {2}
