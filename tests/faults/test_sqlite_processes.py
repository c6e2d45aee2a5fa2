"""Processes that share an SQLite store: many at once, killed, frozen, forked, locked out.

Runs on: pytest's main thread; processes of their own.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Depth, Entry, Record, Row
from mlproducer.stores.sqlite import SQLiteStore, database, file, owners
from tests.helpers import LIMIT, make_envelope
from tests.stopwatch import Stopwatch, in_time

LONG = 120.0
SLACK = 0.5

never = threading.Event()


def entry(name: str, delay: float | None = 0.0) -> Entry:
    """Return a message of 1 kB; without a delay it is claimed."""
    return Entry(Record(make_envelope(name, body=b"x" * 1000)), delay)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file that is not there yet."""
    return tmp_path / "store.db"


@contextmanager
def process(
    role: str, path: Path, lease: float = 30.0, before: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run another user of the store; it is ended with the block."""
    script = [*before, sys.executable, "-m", "tests.faults.scripts.sqlite_process"]
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
    """Wait for a process's end, and return all further lines that are complete."""
    assert running.stdout is not None
    limit = threading.Timer(timeout, running.kill)
    limit.start()
    lines = running.stdout.readlines()  # communicate() would leave out what readline() has buffered
    limit.cancel()
    running.wait(LIMIT)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def names(path: Path) -> set[str]:
    """Return the ids of all rows, by SQLite itself, of a file that has to be whole."""
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
    """Yield another program's connection, which has the lock on writing."""
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
    """A call that can wait so long gets in, and entries are read no earlier than that (94)."""
    read: list[float] = []
    freed: list[Stopwatch] = []

    def entries() -> Iterator[Entry]:
        read.append(freed[0].own())
        yield entry("patient")

    def free() -> None:
        freed.append(Stopwatch())
        locked.execute("COMMIT")

    with closing(SQLiteStore(path)) as store:
        timer = threading.Timer(3.0, free)
        timer.start()
        store.put(entries(), 5.0)
        timer.join(LIMIT)
        assert read[0] <= SLACK
        assert store.depth() == Depth(waiting=2)


def test_locked_out(path: Path, locked: sqlite3.Connection) -> None:
    """Who cannot wait is told so in time; nothing was read, and nothing is stored later (94)."""
    read: list[Entry] = []
    with closing(SQLiteStore(path)) as store:
        for patience in (0.05, 0.5):
            with (
                in_time(patience + SLACK, patience * 0.9),
                pytest.raises(StoreError, match=f"{path} is locked by another writer"),
            ):
                store.put((read.append(each) or each for each in [entry("late")]), patience)
        assert read == []
        with (
            in_time(0.25 + SLACK),
            pytest.raises(StoreError, match=f"{path} is locked by another writer"),
        ):
            store.claim(1)
        assert store.depth() == Depth(waiting=1)  # who only reads is not locked out
        locked.execute("COMMIT")
        assert [row.record.envelope.message_id for row in store.claim(10)] == ["before"]


# --- owners that have ended ----------------------------------------------------------------------

HELD = 202
ALL = Depth(waiting=201, dead=1)
TAKEN_OVER = 2.0
"""Seconds within which rows of a process that was killed on this machine are another's."""


def held_by(running: subprocess.Popen[str]) -> None:
    """Wait until another process holds its rows."""
    assert said(running) == {"held": HELD}


def take_over(store: SQLiteStore, watch: Stopwatch) -> None:
    """Claim what a dead owner held, in time, with a doubt."""
    rows: list[Row] = []
    while len(rows) < HELD and watch.wall() < LIMIT:
        rows += store.claim(1000)
        never.wait(0.05)
    assert watch.own() < TAKEN_OVER
    assert len(rows) == HELD
    assert all(row.record.doubtful for row in rows)


@pytest.mark.parametrize("role", ["ahead", "ahead-with-child"])
def test_rows_of_a_killed_process_are_taken_over_at_once(path: Path, role: str) -> None:
    """What it had stored ahead, claimed, and buried, whatever its lease and its children."""
    with process(role, path, lease=1000.0) as running, closing(SQLiteStore(path)) as store:
        held_by(running)
        assert store.depth() == Depth(waiting=1, dead=1, ahead=200)
        assert store.claim(1000) == []
        watch = Stopwatch()
        running.kill()
        running.wait(LIMIT)
        take_over(store, watch)


def test_a_fresh_process_counts_what_a_killed_one_held(path: Path) -> None:
    """Before it has claimed anything, or written; no process id is asked."""
    with process("ahead", path, lease=1000.0) as running:
        held_by(running)
        running.kill()
        running.wait(LIMIT)
    with closing(SQLiteStore(path)) as store:
        assert store.depth() == ALL
        take_over(store, Stopwatch())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces")
def test_process_ids_of_another_namespace_mean_nothing(path: Path) -> None:
    """Two containers share a directory: the living is never taken for dead, the dead is seen."""
    inside = ("unshare", "--pid", "--fork", "--kill-child", "--uts")
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us make namespaces")
    with (
        process("ahead", path, lease=1000.0, before=inside) as running,
        closing(SQLiteStore(path)) as store,
    ):
        held_by(running)
        deadline = time.monotonic() + TAKEN_OVER
        while time.monotonic() < deadline:
            assert store.claim(1000) == []
            never.wait(0.1)
        watch = Stopwatch()
        running.kill()
        take_over(store, watch)


def test_a_stopped_process_lives(path: Path) -> None:
    """It holds its rows until its lease ends, and no longer."""
    with process("ahead", path, lease=4.0) as running, closing(SQLiteStore(path)) as store:
        held_by(running)
        begun = time.monotonic()
        running.send_signal(signal.SIGSTOP)
        while time.monotonic() < begun + 1.5:
            assert store.claim(1000) == []
            assert store.depth().ahead == 200
            never.wait(0.1)
        never.wait(begun + 4.5 - time.monotonic())
        assert store.depth() == ALL
        assert len(store.claim(1000)) == HELD


def test_of_rows_of_another_machine_nothing_is_known(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks are not seen here, so its lease decides."""
    now = [time.monotonic()]
    with closing(SQLiteStore(path, lease=10.0, clock=lambda: now[0])) as store:
        with monkeypatch.context() as there:
            there.setattr(owners, "_machine", lambda: 4711)
            away = SQLiteStore(path, lease=10.0, clock=lambda: now[0])
            away.put([entry("away", None)], LIMIT)
            away._database.owner.leave()
        never.wait(database.LOOK * 1.2)
        assert store.claim(1) == []
        now[0] += 10.1
        assert [row.record.envelope.message_id for row in store.claim(1)] == ["away"]
        away.close()


def test_where_the_locks_were_removed_nothing_is_known(path: Path) -> None:
    """A file of locks that is another than the owner's says nothing of it."""
    with process("ahead", path, lease=1000.0) as running, closing(SQLiteStore(path)) as store:
        held_by(running)
        Path(f"{path}-owners").unlink()
        deadline = time.monotonic() + database.LOOK * 2
        while time.monotonic() < deadline:
            store.put([entry("new", 60.0)], LIMIT)
            assert store.claim(1000) == []
            never.wait(0.1)
        assert Path(f"{path}-owners").exists()


def test_a_store_that_was_dropped_lets_its_rows_go(path: Path) -> None:
    """One that is not closed, only forgotten, is not taken for a living owner."""
    with closing(SQLiteStore(path)) as store:
        dropped = SQLiteStore(path, lease=1000.0)
        dropped.put([entry("a", None)], LIMIT)
        assert store.claim(1) == []
        with warnings.catch_warnings():
            # From 3.13 on Python warns of a connection that was not closed, which is so by intent.
            warnings.simplefilter("ignore", ResourceWarning)
            del dropped
            gc.collect()
        watch = Stopwatch()
        while not (rows := store.claim(1)):
            assert watch.own() < TAKEN_OVER
            never.wait(0.05)
        assert rows[0].record.envelope.message_id == "a"


def test_twenty_processes_on_a_fresh_file(path: Path) -> None:
    """All come at once, one makes the file, and none is refused or loses a row (95)."""
    with ExitStack() as stack:
        running = [stack.enter_context(process("create", path)) for _ in range(20)]
        assert [said(each) for each in running] == [{"ready": True}] * 20
        for each in running:
            assert each.stdin is not None
            each.stdin.write("now\n")
            each.stdin.flush()
        assert [all_said(each) for each in running] == [[{"stored": True}]] * 20
    assert len(names(path)) == 100
    assert not list(path.parent.glob("*.new*"))


def test_a_file_that_is_made_between_two_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is no log without a file, and no error says to remove it."""
    look = file._has_log
    others: list[SQLiteStore] = []

    def between(name: str) -> bool:
        monkeypatch.setattr(file, "_has_log", look)
        others.append(SQLiteStore(path))
        others[0].put([entry("other")], LIMIT)
        return look(name)

    monkeypatch.setattr(file, "_has_log", between)
    with closing(SQLiteStore(path)) as store:
        store.put([entry("mine")], LIMIT)
    others[0].close()
    assert names(path) == {"other", "mine"}


def test_a_process_that_ends_with_an_open_store_says_nothing(path: Path) -> None:
    """The interpreter lets go of the store when the modules that it uses are gone already."""
    program = (
        "import sys\n"
        "from mlproducer.stores.sqlite import SQLiteStore, owners\n"
        "store = SQLiteStore(sys.argv[1])\n"
        "store.claim(1)\n"
        "owners.used = lambda: store\n"  # it goes with a module, as that of a module does
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
