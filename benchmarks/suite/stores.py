"""What durability costs: SQLite written ahead, against no durable store, and a backlog drained.

The same library twice, alternating: with the memory store, and with every message in an SQLite file
before it is sent. For 32 threads the measure is what one fsync for each message would allow, taken
in the same round on the same disk. Then one process leaves a backlog while there is no broker, and
another one drains it.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import BLOCKING, PIPELINED, Player
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Report, at_least, at_most, ratios
from mlproducer.testing.erlang import free_port

BACKLOG, QUICK_BACKLOG = 100_000, 10_000
THREADS = 32
SYNCS = 50
LIMIT = 600.0
GROWTH = 40.0
"""Megabytes that either process may grow by, whatever the backlog."""

MEMORY, AHEAD = "memory", "SQLite ahead"


def run(lab: Lab) -> Report:
    """Compare rates, then drain a backlog."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        folder = Path(directory)
        return Report(figures=[*_rates(lab, folder), *_backlog(lab, folder)])


def _rates(lab: Lab, folder: Path) -> list[Figure]:
    url = f"sqlite:///{folder / 'ahead.db'}?write_ahead=1"
    stores = {MEMORY: "memory://", AHEAD: url}
    with ExitStack() as stack:
        players = {}
        for name, store_url in stores.items():
            contestant = lab.contestant(OURS, workers=THREADS, store_url=store_url)
            if contestant is None:
                raise RuntimeError("the library itself is not installed")
            players[name] = stack.enter_context(contestant)
        many = lab.play([Player(name, each, PIPELINED) for name, each in players.items()])
        syncs = [_syncs_per_second(folder) for _ in range(lab.scale.rounds)]
        threads = lab.play(
            [Player(name, each, BLOCKING, THREADS) for name, each in players.items()]
        )
    ahead = threads.rates(AHEAD)
    return [
        Figure(
            "publish_many, SQLite ahead / memory",
            ratios(many.rates(AHEAD), many.rates(MEMORY)),
            target=at_least(0.5),
        ),
        Figure(
            "32 threads, SQLite ahead / one fsync each", ratios(ahead, syncs), target=at_least(8)
        ),
        Figure("32 threads, SQLite ahead / memory", ratios(ahead, threads.rates(MEMORY))),
        Figure("fsync of this disk", syncs, "1/s"),
    ]


def _syncs_per_second(folder: Path) -> float:
    """Say how many messages a second would be stored with a write and an fsync for each."""
    with (folder / "sync").open("wb", buffering=0) as file:
        begun = time.perf_counter()
        for _ in range(SYNCS):
            file.write(bytes(4096))
            os.fsync(file.fileno())
        return SYNCS / (time.perf_counter() - begun)


def _backlog(lab: Lab, folder: Path) -> list[Figure]:
    count = QUICK_BACKLOG if lab.scale.quick else BACKLOG
    store = f"sqlite:///{folder / 'backlog.db'}"
    nobody = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    left = process("leave", count, nobody, store)
    lab.broker.purge()
    emptied = drained(count, lab.broker.url, store)
    contestant = lab.contestant(OURS)
    if contestant is None:
        raise RuntimeError("the library itself is not installed")
    with contestant:
        lab.broker.purge()
        normal = Player(OURS, contestant, PIPELINED).play(count).rate
    rate = count / emptied["seconds"]
    return [
        Figure(f"draining {count:,} / publish_many", [rate / normal], target=at_least(0.5)),
        Figure("draining", [rate], "messages/s"),
        Figure("leaving them, no broker", [count / left["seconds"]], "messages/s"),
        Figure("memory grown while draining", [emptied["grown"] / 1e6], "MB", at_most(GROWTH)),
        Figure("memory grown while leaving", [left["grown"] / 1e6], "MB", at_most(GROWTH)),
    ]


def drained(count: int, broker: str, store: str) -> dict[str, Any]:
    """Have a process of its own deliver a backlog, and give its figures."""
    return process("drain", count, broker, store)


def process(mode: str, count: int, broker: str, store: str, limit: float = LIMIT) -> dict[str, Any]:
    """Have a process of its own do what `benchmarks.backlog` does, and give its figures."""
    command = [sys.executable, "-m", "benchmarks.backlog", mode, str(count), broker, store]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.backlog {mode} failed: {done.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
