"""Processes that share an SQLite store: many at once, killed, frozen, forked, locked out.

Runs on: pytest's main thread; processes of their own.
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Depth, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore
from tests.helpers import LIMIT, make_envelope

LONG = 120.0
SLACK = 0.5

never = threading.Event()


def entry(name: str, delay: float | None = 0.0) -> Entry:
    """Give a message of 1 kB; without a delay it is claimed."""
    return Entry(Record(make_envelope(name, body=b"x" * 1000)), delay)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file that is not there yet."""
    return tmp_path / "store.db"


@contextmanager
def process(role: str, path: Path, lease: float = 30.0) -> Iterator[subprocess.Popen[str]]:
    """Run another user of the store; it is ended with the block."""
    script = [sys.executable, "-m", "tests.faults.scripts.sqlite_process"]
    with subprocess.Popen(
        [*script, role, str(path), str(lease)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next line of a process."""
    assert running.stdout is not None
    line: dict[str, Any] = json.loads(running.stdout.readline())
    return line


def all_said(running: subprocess.Popen[str], timeout: float = LONG) -> list[dict[str, Any]]:
    """Wait for a process's end, and give all further lines that are complete."""
    assert running.stdout is not None
    limit = threading.Timer(timeout, running.kill)
    limit.start()
    lines = running.stdout.readlines()  # communicate() would leave out what readline() has buffered
    limit.cancel()
    running.wait(LIMIT)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def names(path: Path) -> set[str]:
    """Give the ids of all rows, by SQLite itself, of a file that has to be whole."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {name for (name,) in connection.execute("SELECT message_id FROM messages")}


def test_eight_processes_do_each_row_once(path: Path) -> None:
    """Each of 5,000 rows is claimed by one of eight processes, and none is doubtful (96)."""
    store = SQLiteStore(path)
    ids = [f"m{number}" for number in range(5000)]
    store.put([entry(each) for each in ids], LIMIT)
    workers = [process("finish", path) for _ in range(8)]
    running = [worker.__enter__() for worker in workers]
    lines = [line for each in running for line in all_said(each)]
    for worker in workers:
        worker.__exit__(None, None, None)
    assert {each.returncode for each in running} == {0}
    assert Counter(line["done"] for line in lines if "done" in line) == Counter(ids)
    assert not any(line.get("doubtful") for line in lines)
    assert store.depth() == Depth()
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_what_it_had_stored(path: Path, seed: int) -> None:
    """After kill -9 at any instant the file is whole, and has each batch that was stored (97)."""
    chance = random.Random(seed)
    stored: set[str] = set()
    deleted: set[str] = set()
    batches: list[set[str]] = []
    for _ in range(8):
        with process("write", path) as running:
            first = said(running)
            never.wait(chance.uniform(0.0, 0.15))
            running.kill()
            lines = [first, *all_said(running)]
        batches += [set(line["stored"]) for line in lines if "stored" in line]
        deleted.update(*(line["deleting"] for line in lines if "deleting" in line))
        stored.update(*batches)
        found = names(path)
        assert stored - deleted <= found
    last = {each for each in found - stored if each not in deleted}
    assert (
        len({each.rpartition("-")[0] for each in last}) <= 8
    )  # stored, and killed before it spoke
    with closing(SQLiteStore(path)) as store:
        assert store.depth().waiting == len(names(path))
        assert len(store.put([entry("after")], LIMIT)) == 1


def test_frozen_past_its_lease_it_changes_nothing(path: Path) -> None:
    """What it had claimed is another's: it can renew, release and delete nothing (96)."""
    with closing(SQLiteStore(path, lease=0.5)) as store:
        store.put([entry("m")], LIMIT)
        with process("claim", path, lease=0.5) as running:
            assert said(running) == {"claimed": "m"}
            assert store.claim(1) == []
            running.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + LIMIT
            rows = store.claim(1)
            while not rows and time.monotonic() < deadline:
                never.wait(0.02)
                rows = store.claim(1)
            (row,) = rows
            assert row.record.doubtful
            running.send_signal(signal.SIGCONT)
            assert running.stdin is not None
            running.stdin.write("try\n")
            running.stdin.flush()
            assert said(running) == {"lost": 1, "refused": 1}
        assert store.renew([row.claim]) == []
        assert store.depth() == Depth(waiting=1)


@pytest.mark.parametrize("role", ["fork", "fork-new"])
def test_forks_at_any_moment(path: Path, role: str) -> None:
    """Children of a process that opens, writes or closes store at once; all are well (85)."""
    with process(role, path) as running:
        lines = all_said(running)
    assert running.returncode == 0
    report = lines[-1]
    assert set(report["statuses"]) == {0}
    children = {line["stored"] for line in lines[:-1]}
    assert len(children) == len(report["statuses"])
    assert names(path) == children


def test_a_child_has_locks_of_its_own_and_no_claims(path: Path) -> None:
    """A child has its own lock on the file, and its close leaves the parent's claim alone (85)."""
    with process("inherit", path) as running:
        child, parent = all_said(running)
    assert child["locks"] > 0
    assert parent == {"status": 0, "lost": 0, "due": 0}


@pytest.fixture
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Give another program's connection, which has the lock on writing."""
    with closing(SQLiteStore(path)) as store:
        store.put([entry("before")], LIMIT)
    with closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def test_a_fork_that_could_not_wait(path: Path) -> None:
    """A child forked in the middle of the opening is refused, and never waits for SQLite (85)."""
    with closing(SQLiteStore(path)) as store:
        store.put([entry("before")], LIMIT)
    with closing(sqlite3.connect(path)) as other, process("refuse", path) as running:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        assert other.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        assert "was in use when this process was forked" in said(running)["refused"]
        assert said(running) == {"status": 0}
        other.close()
        assert all_said(running) == [{"depth": 1}]
    assert running.returncode == 0


def test_locked_for_three_seconds(path: Path, locked: sqlite3.Connection) -> None:
    """Whoever can wait so long gets in, and the entries are read no earlier than that (94)."""
    read: list[float] = []
    freed: list[float] = []

    def entries() -> Iterator[Entry]:
        read.append(time.monotonic())
        yield entry("patient")

    def free() -> None:
        freed.append(time.monotonic())
        locked.execute("COMMIT")

    with closing(SQLiteStore(path)) as store:
        timer = threading.Timer(3.0, free)
        timer.start()
        store.put(entries(), 5.0)
        timer.join(LIMIT)
        assert freed[0] <= read[0] <= freed[0] + SLACK
        assert store.depth() == Depth(waiting=2)


def test_locked_out(path: Path, locked: sqlite3.Connection) -> None:
    """Who cannot wait is told so in time; nothing was read, and nothing is stored later (94)."""
    read: list[Entry] = []
    with closing(SQLiteStore(path)) as store:
        for patience in (0.05, 0.5):
            started = time.monotonic()
            with pytest.raises(StoreError, match=f"{path} is locked by another writer"):
                store.put((read.append(each) or each for each in [entry("late")]), patience)
            assert patience * 0.9 <= time.monotonic() - started < patience + SLACK
        assert read == []
        started = time.monotonic()
        with pytest.raises(StoreError, match=f"{path} is locked by another writer"):
            store.claim(1)
        assert time.monotonic() - started < 0.25 + SLACK
        assert store.depth() == Depth(waiting=1)  # who only reads is not locked out
        locked.execute("COMMIT")
        assert [row.record.envelope.message_id for row in store.claim(10)] == ["before"]
