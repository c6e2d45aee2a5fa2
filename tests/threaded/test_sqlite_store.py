"""The SQLite store on a disk that is well: its file, its statements, users that share it.

What every store does is in test_store_conformance.py, what goes wrong in tests/faults.

Runs on: pytest's main thread; a second thread where two share a store.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Depth, Entry, Record, Row
from mlproducer.stores.sqlite import SQLiteStore, database
from mlproducer.stores.sqlite import rows as rows_of
from tests.helpers import LIMIT, Background, make_envelope
from tests.stopwatch import in_time

Open = Callable[..., SQLiteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file that is not there yet."""
    return tmp_path / "store.db"


@pytest.fixture
def connect(path: Path) -> Iterator[Open]:
    """Open the file: ``connect(lease=...)``."""
    with ExitStack() as stores:
        yield lambda **options: stores.enter_context(closing(SQLiteStore(path, **options)))


def waiting(*names: str, size: int = 10) -> list[Entry]:
    """Return entries that are due at once."""
    return [Entry(Record(make_envelope(name, body=b"x" * size)), 0.0) for name in names]


def ids(rows: list[Row]) -> list[str]:
    """Return the rows' message ids."""
    return [row.record.envelope.message_id for row in rows]


# --- the file ----------------------------------------------------------------------------------


def test_nothing_is_opened_before_the_first_use(path: Path, connect: Open) -> None:
    """Making a store touches no disk, closing it then neither."""
    store = connect()
    store.close()
    assert not path.exists()
    assert store.depth() == Depth()
    assert path.exists()


def test_a_relative_path_is_the_directorys_in_which_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that changes its directory keeps its store."""
    monkeypatch.chdir(tmp_path)
    with closing(SQLiteStore("store.db")) as store:
        monkeypatch.chdir("/")
        store.put(waiting("a"), LIMIT)
        assert store.name == str(tmp_path / "store.db")
    assert (tmp_path / "store.db").exists()


@pytest.mark.parametrize("name", ["a b.db", "50%.db", "what?mode=memory", "hash#.db", "böse.db"])
def test_any_name_is_a_files(tmp_path: Path, name: str) -> None:
    """No character of a path means something to SQLite."""
    with closing(SQLiteStore(tmp_path / name)) as store:
        store.put(waiting("a"), LIMIT)
        assert (tmp_path / name).stat().st_size > 0
        assert ids(store.claim(1)) == ["a"]


def test_the_last_that_closes_leaves_one_file(path: Path, connect: Open) -> None:
    """What was in the log is in the file then; only reserve and locks lie beside it."""
    first, second = connect(), connect()
    first.put(waiting("a"), LIMIT)
    assert second.depth() == Depth(1)
    first.close()
    assert Path(f"{path}-wal").exists()
    second.close()
    left = sorted(each.name for each in path.parent.iterdir())
    assert left == ["store.db", "store.db-owners", "store.db-reserve"]


def test_an_old_sqlite_is_told(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what is missing."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 32, 3))
    with pytest.raises(StoreError, match=r"needs SQLite 3\.33"):
        connect().depth()


# --- statements --------------------------------------------------------------------------------


def trace(store: SQLiteStore) -> list[str]:
    """Write down what a store has SQLite do, from now on."""
    store.depth()
    connections = store._database._connections
    assert connections is not None
    said: list[str] = []
    connections.safe.set_trace_callback(lambda text: said.append(text.split()[0]))
    connections.quick.set_trace_callback(lambda text: said.append(text.split()[0]))
    return said


def test_a_call_has_few_statements_however_many_rows(
    connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement may wait for the interpreter's lock, so none of them is for one row."""
    monkeypatch.setattr(database, "LOOK", 3600.0)  # other processes are asked at intervals
    store = connect()
    said = trace(store)

    def during(call: Callable[[], object]) -> list[str]:
        said.clear()
        call()
        return list(said)

    entries = [Entry(Record(make_envelope())) for _ in range(1000)]
    claims = store.put(entries, LIMIT)
    changes = [Change(claim, Record(make_envelope()), 0.0) for claim in claims]
    stored = during(lambda: store.put(entries, LIMIT))
    assert stored == ["BEGIN", *["INSERT"] * len(stored[2:]), "COMMIT"]
    assert len(stored) <= 7
    assert len(during(lambda: store.renew(claims))) == 4
    assert len(during(lambda: store.release(changes))) <= 8
    rows: list[Row] = []
    assert len(during(lambda: rows.extend(store.claim(1000)))) == 5
    assert during(lambda: store.done([row.claim for row in rows])) == ["DELETE"]
    assert during(store.depth) == ["SELECT"]
    assert len(rows) == 1000


def test_messages_are_not_read_to_find_what_is_due(connect: Open) -> None:
    """Due rows and counts come from the index alone; rows are found by their keys."""
    store = connect()
    trace(store)
    connection = store._database._connections.quick  # type: ignore[union-attr]
    now = {"now": 1.0}
    claims = [(1, "[]")]
    statements = [
        (rows_of.DUE, {**now, "limit": 1, "room": 1}),
        (rows_of.DEPTH, {**now, "gone": "[]"}),
        *((each, {**now, "me": 1}) for each in rows_of.GIVE_BACK),
        *((each, {**now, "dead": "[]"}) for each in rows_of.TAKE_OVER),
        (rows_of.TRACE, {"keys": "[]"}),
        (rows_of.LEAVE_FATES, (1.0, 1, "[]")),
        (rows_of.LETTERS, {"after": 0, "limit": 1, "room": 1}),
        (rows_of.HELD, ("[]",)),
        (rows_of.DONE, claims[0]),
        (rows_of.CLAIM, {"step": 1, "me": 1, "due": 1.0, "keys": "[]"}),
        (rows_of.RENEW, claims[0]),
        (rows_of.READ, ("[]",)),
        (rows_of.change(2), [None] * 32),
    ]
    for statement, values in statements:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
        scans = [step for step in plan if step.startswith(("SCAN messages", "SCAN m "))]
        assert [step for step in scans if "COVERING INDEX" not in step] == [], statement


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1500), st.sampled_from([0, 1000, 100_000]))
def test_rows_are_split_for_few_statements(count: int, size: int) -> None:
    """Every row once, in order; sizes are powers of two, and little of a statement is empty."""
    rows = [(number, b"p", b"x" * size) for number in range(count)]
    if count * size > 20_000_000:
        rows = rows[: 20_000_000 // size]
    pieces = list(rows_of.in_pieces(rows))
    values = [piece[start : start + 3] for _, piece in pieces for start in range(0, len(piece), 3)]
    assert [tuple(each) for each in values if each[0] is not None] == rows
    for lines, piece in pieces:
        assert len(piece) == lines * 3
        assert lines <= rows_of.FEW_ROWS or piece.count(None) <= len(piece) / 4
        assert lines * size <= rows_of.MOST_BYTES or lines == 1
        assert lines * 14 < 32_766


# --- users that share a file -------------------------------------------------------------------


def test_the_longest_horizon_holds_for_all(path: Path, connect: Open) -> None:
    """Who has short leases does not take what is claimed by one that has long ones."""
    connect(lease=1000.0, horizon=1000.0).put([Entry(Record(make_envelope()))], LIMIT)
    assert connect(lease=1.0, horizon=1.0).claim(10) == []


def test_a_row_waits_no_longer_than_the_horizon(connect: Open) -> None:
    """A delay beyond it is cut."""
    now = [100.0]
    store = connect(lease=10.0, horizon=20.0, clock=lambda: now[0])
    store.put([Entry(Record(make_envelope("a")), 5000.0)], LIMIT)
    now[0] += 19.0
    assert store.claim(1) == []
    now[0] += 2.0
    assert ids(store.claim(1)) == ["a"]


TRY = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=0.05, isolation_level=None)
try:
    connection.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print(error)
"""


def test_stores_of_one_process_keep_each_others_locks(path: Path, connect: Open) -> None:
    """Locks belong to the process: opening and closing one store leaves those of another."""
    first, second = connect(), connect()
    second.put(waiting("a"), LIMIT)
    said: list[str] = []

    def entries() -> Iterator[Entry]:
        second.close()
        assert connect().depth() == Depth(1)
        run = [sys.executable, "-c", TRY, str(path)]
        said.append(subprocess.check_output(run, text=True, timeout=LIMIT))
        yield from waiting("b")

    first.put(entries(), LIMIT)
    assert said == ["database is locked\n"]
    assert ids(second.claim(10)) == ["a", "b"]


def test_another_thread_waits_its_turn(connect: Open) -> None:
    """A command's thread may ask while the retry thread is in a call; neither gets an error."""
    store = connect()
    background = Background()
    for number in range(20):
        background.call(store.put, waiting(f"m{number}"), LIMIT)
    assert 0 <= store.depth().stored <= 20
    assert len({claim.key for (claim,) in background.gather()}) == 20
    assert store.depth() == Depth(20)


def test_entries_are_read_when_the_store_is_ready(path: Path, connect: Open) -> None:
    """Those who give up while another writer is at it are not stored."""
    store = connect()
    store.depth()
    read: list[float] = []

    def entries() -> Iterator[Entry]:
        read.append(time.monotonic())
        yield from waiting("a")

    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with (
            in_time(0.6, 0.25),
            pytest.raises(StoreError, match=f"{path} is locked by another writer"),
        ):
            store.put(entries(), 0.3)
        other.execute("ROLLBACK")
    assert read == []
    store.put(entries(), 0.3)
    assert ids(store.claim(1)) == ["a"]


# --- what is stored ----------------------------------------------------------------------------


def test_text_that_is_no_unicode_is_stored_nevertheless(connect: Open) -> None:
    """An error's text may hold anything; it is for people, and must not cost the message."""
    store = connect()
    store.put([Entry(Record(make_envelope(), reason="bad \ud800 text"), 0.0)], LIMIT)
    assert [row.record.reason for row in store.claim(1)] == ["bad ? text"]


def test_rows_can_be_read_with_sqlites_own_shell(path: Path, connect: Open) -> None:
    """Columns have names and types that say what they are; no format of our own is in the way."""
    store = connect()
    record = Record(make_envelope("a", exchange="x", routing_key="k"), 2, True, reason="NackError")
    store.put([Entry(record, 0.0)], LIMIT)
    with closing(sqlite3.connect(path)) as other:
        (row,) = other.execute(
            "SELECT message_id, exchange, routing_key, attempts, reason, state FROM messages"
        ).fetchall()
    assert row == ("a", "x", "k", 2, "NackError", 1)


def test_deletion_makes_room_for_what_comes(path: Path, connect: Open) -> None:
    """A file in which rows come and go does not grow."""
    store = connect()
    sizes = []
    for _ in range(5):
        claims = store.put([Entry(Record(make_envelope(body=bytes(1000))))] * 2000, LIMIT)
        store.done(claims)
        sizes.append(path.stat().st_size + Path(f"{path}-wal").stat().st_size)
    assert sizes[-1] <= sizes[1] * 1.5


def test_a_key_is_never_used_again(path: Path, connect: Open) -> None:
    """Not even when all rows are gone and the file was closed meanwhile."""
    store = connect()
    (old,) = store.put([Entry(Record(make_envelope()))], LIMIT)
    store.done([old])
    store.close()
    (new,) = store.put([Entry(Record(make_envelope()))], LIMIT)
    assert new.key > old.key
