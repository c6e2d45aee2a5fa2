"""What a message holds in memory while it is in flight, and while it waits for a retry.

A process of its own submits messages to a scripted broker that does not confirm; then the broker
drops the connection and refuses new ones, so that they are deferred to the memory store; then it is
back, so that all are in flight a second time. Python's own account of its memory is read at each of
these points, for two sizes of texts: how it grows with the size says how often the library holds a
body. Futures that the user holds are counted.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.harness import Contestant
from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most
from mlproducer.testing import Behaviour, FakeBroker

SIZES = (1_000, 10_000)
LIMIT = 30.0


class _Mute(Behaviour):
    """Confirms what comes until it is told not to."""

    mute = False

    def on_publish(self, connection: Any, channel: int, tag: int, message: Any) -> None:
        """Confirm, or say nothing."""
        if not self.mute:
            super().on_publish(connection, channel, tag, message)


def run(lab: Lab) -> Report:
    """Take the marks for each size."""
    count = 500 if lab.scale.quick else 2000
    small, large = (_marks(count, size) for size in SIZES)
    step = SIZES[1] - SIZES[0]
    figures = [Figure(f"{state}, 1 kB text", [small[state]], "bytes/message") for state in small]
    figures += [
        Figure(f"bodies held, {state}", [(large[state] - small[state]) / step], "x", at_most(1.1))
        for state in small
    ]
    return Report(figures=figures)


def _marks(count: int, size: int) -> dict[str, float]:
    """Give the bytes per message in each state."""
    behaviour = _Mute()
    with FakeBroker(behaviour) as broker:
        options = json.dumps({"url": broker.url, "window": 2 * count})
        with Contestant("hoard", [sys.executable, "-m", "benchmarks.hoard", options]) as hoard:
            hoard.ask(do="submit", count=count, size=size)
            hoard.ask(do="settle")
            behaviour.mute = True
            return _marks_of(hoard, broker, count, size)


def _marks_of(hoard: Contestant, broker: FakeBroker, count: int, size: int) -> dict[str, float]:
    empty = _memory(hoard)
    hoard.ask(do="submit", count=count, size=size)
    broker.wait_for_messages(2 * count, LIMIT)
    marks = {"in flight": _memory(hoard)}
    broker.stop_listening()
    for connection in broker.connections:
        connection.drop()
    hoard.ask(do="wait_deferred", count=count)
    marks["deferred"] = _memory(hoard)
    broker.listen_again()
    broker.wait_for_messages(3 * count, LIMIT)
    marks["in flight again"] = _memory(hoard)
    return {state: (mark - empty) / count for state, mark in marks.items()}


def _memory(hoard: Contestant) -> int:
    return int(hoard.ask(do="memory")["answer"])
