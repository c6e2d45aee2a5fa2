"""An outbox in PostgreSQL: rows of the application's transactions, and what becomes of them.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from sqlalchemy.orm import Session

from mlproducer import CeleryTask, Message, MLProducer, Outcome, RetryPolicy, outbox
from mlproducer._store_url import read_postgresql
from mlproducer.errors import (
    ConfigurationError,
    InvalidMessageError,
    MessageTooLargeError,
    RetriesExhaustedError,
    StoreError,
)
from mlproducer.stores.postgres import PostgreSQLStore, sql
from mlproducer.stores.postgres import store as store_module
from mlproducer.stores.postgres.listener import Listener
from mlproducer.stores.protocol import Change, Claim, Entry, Record, Row
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.stores.sqlite.outbox import opened
from mlproducer.testing import Behaviour, FakeBroker, PostgreSQLServer
from tests.helpers import LIMIT, make_envelope
from tests.stopwatch import Stopwatch
from tests.threaded.conftest import Connect, Serve


@pytest.fixture
def url(postgresql_server: PostgreSQLServer) -> str:
    """Name a table of the test's own, which is there."""
    table = f"test_{secrets.token_hex(4)}"
    postgresql_server.call(
        f"CREATE TABLE {table}_business (n int); GRANT ALL ON {table}_business TO app"
    )
    url = f"{postgresql_server.url}?table={table}"
    with closing(PostgreSQLStore(url)) as store:
        store.create()
    return url


@pytest.fixture
def business(url: str) -> str:
    """Name the application's table."""
    return f"{url.rpartition('=')[2]}_business"


@pytest.fixture
def broker(serve: Serve) -> FakeBroker:
    """Return a broker that confirms everything."""
    return serve()


@pytest.fixture
def producer(connect: Connect, broker: FakeBroker, url: str) -> MLProducer:
    """Return a producer on the table, which looks for rows by itself only each minute."""
    made = connect(broker, store_url=url, retry_sweep_interval=30.0)
    made.start()
    assert made.wait_connected(LIMIT)
    return made


@pytest.fixture
def connection(postgresql_server: PostgreSQLServer) -> Iterator[Any]:
    """Connect as the application does."""
    with psycopg.connect(postgresql_server.url) as made:
        yield made


@pytest.fixture
def engine(postgresql_server: PostgreSQLServer) -> Iterator[sqlalchemy.Engine]:
    """Yield SQLAlchemy's engine."""
    made = sqlalchemy.create_engine(
        postgresql_server.url.replace("postgresql://", "postgresql+psycopg://")
    )
    yield made
    made.dispose()


def message(name: str) -> Message:
    """Make a message with an id."""
    return Message(body=name.encode(), routing_key="k", message_id=name)


def bodies(broker: FakeBroker, n: int) -> list[bytes]:
    """Wait for messages, and return what they say."""
    return [each.body for each in broker.wait_for_messages(n, LIMIT)]


def until(come_about: Callable[[], object]) -> None:
    """Ask until it is so."""
    deadline, never = time.monotonic() + LIMIT, threading.Event()
    while not come_about():
        assert time.monotonic() < deadline
        never.wait(0.01)


# --- through psycopg -----------------------------------------------------------------------------


def test_commit_sends_and_rollback_does_not(
    producer: MLProducer, broker: FakeBroker, connection: Any, business: str
) -> None:
    """COMMIT decides about rows and tasks together; NOTIFY brings them long before the sweep."""
    outbox.add(connection, message("never"))
    connection.rollback()
    connection.execute(f"INSERT INTO {business} VALUES (1)")
    receipt = outbox.add(connection, message("sent"))
    assert (receipt.outcome, receipt.durable, receipt.message_id) == (
        Outcome.DEFERRED,
        True,
        "sent",
    )
    assert broker.messages == []
    connection.commit()
    assert bodies(broker, 1) == [b"sent"]
    assert receipt.result(LIMIT).confirmed
    assert receipt.confirmed
    until(lambda: producer.flush(LIMIT) == 0)


def test_a_commit_is_told_at_once(
    producer: MLProducer, broker: FakeBroker, connection: Any
) -> None:
    """The best of several takes less than 50 ms; a busy machine may delay any single one."""
    took = []
    for n in range(10):
        outbox.add(connection, message(f"m{n}"))
        connection.commit()
        watch = Stopwatch()
        broker.wait_for_messages(n + 1, LIMIT)
        took.append(watch.own())
    assert min(took) < 0.05


def test_commits_beside_each_other_have_one_notification(
    connection: Any, url: str, postgresql_server: PostgreSQLServer, connect: Connect, serve: Serve
) -> None:
    """COMMITs with NOTIFY queue, so one at a time has it; a COMMIT by itself always has it."""
    channel = sql.channel(url.rpartition("=")[2])
    idle = connect(serve(), store_url=url)
    with (
        psycopg.connect(postgresql_server.url) as other,
        psycopg.connect(postgresql_server.url, autocommit=True) as listening,
    ):
        listening.execute(f"LISTEN {channel}")
        outbox.add(connection, message("a"), producer=idle)
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # what COMMIT does first
        outbox.add(other, message("b"), producer=idle)
        other.commit()
        postgresql_server.call(f"NOTIFY {channel}, 'b is committed'", user="app")
        connection.commit()
        postgresql_server.call(f"NOTIFY {channel}, 'a is committed'", user="app")
        outbox.add(other, message("c"), producer=idle)
        other.commit()
        heard = [each.payload for each in listening.notifies(timeout=LIMIT, stop_after=4)]
    assert heard == ["b is committed", "", "a is committed", ""]


def test_a_listener_looks_twice(url: str, postgresql_server: PostgreSQLServer) -> None:
    """Each notification wakes it at once, and again for a COMMIT beside the one that sent it."""
    wakes = threading.Semaphore(0)
    listener = Listener(read_postgresql(url), wakes.release)
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        for _ in range(3):  # the first two are of its LISTEN
            assert wakes.acquire(timeout=LIMIT)
            assert wakes.acquire(timeout=LIMIT)
            postgresql_server.call(f"NOTIFY {sql.channel(url.rpartition('=')[2])}", user="app")
    finally:
        listener.stop()
        thread.join(LIMIT)


def test_order_within_a_transaction(
    producer: MLProducer, broker: FakeBroker, connection: Any
) -> None:
    """Rows go out in the order in which they were added."""
    names = [f"m{n}" for n in range(300)]
    for name in names:
        outbox.add(connection, message(name))
    connection.commit()
    assert bodies(broker, 300) == [name.encode() for name in names]


@pytest.fixture
def relays(
    connect: Connect, broker: FakeBroker, url: str, connection: Any, engine: sqlalchemy.Engine
) -> Iterator[tuple[PostgreSQLStore, PostgreSQLStore]]:
    """Yield stores of two processes; in them are m0 n0 m1 n1 m2 n2 of two transactions, and s."""
    adds = connect(broker, store_url=url)
    with engine.begin() as other:
        for n in range(3):
            outbox.add(connection, message(f"m{n}"), producer=adds)
            with connection.transaction():
                outbox.add(connection, message("never"), producer=adds)
                raise psycopg.Rollback
            outbox.add(other, message(f"n{n}"), producer=adds)
        connection.commit()
    outbox.add(connection, message("s"), producer=adds)
    connection.commit()
    with closing(PostgreSQLStore(url)) as first, closing(PostgreSQLStore(url)) as second:
        yield first, second


def names(rows: Iterable[Row]) -> list[str]:
    """Return the ids of messages."""
    return [each.record.envelope.message_id for each in rows]


def test_a_transaction_is_not_shared(relays: tuple[PostgreSQLStore, PostgreSQLStore]) -> None:
    """The owner of its first rows claims the next ones, until these are gone."""
    first, second = relays
    rows = first.claim(3)
    assert names(rows) == ["m0", "n0", "m1"]
    assert names(second.claim(1)) == ["s"]
    assert second.claim(9) == []
    rows += first.claim(1)
    assert names(rows[3:]) == ["n1"]
    first.done([each.claim for each in rows])
    assert names(second.claim(9)) == ["m2", "n2"]


def test_claims_at_the_same_time(
    relays: tuple[PostgreSQLStore, PostgreSQLStore], connection: Any, url: str
) -> None:
    """Rows behind one that another claim has locked are left."""
    table = url.rpartition("=")[2]
    connection.execute(f"SELECT FROM {table} WHERE message_id = 'm1' FOR UPDATE")
    assert names(relays[0].claim(9)) == ["m0", "n0", "n1", "n2", "s"]
    connection.rollback()
    assert relays[1].claim(9) == []
    assert names(relays[0].claim(9)) == ["m1", "m2"]


def test_a_retry_holds_up_no_other_rows(
    relays: tuple[PostgreSQLStore, PostgreSQLStore],
) -> None:
    """Order is promised without faults only."""
    first, second = relays
    first.release([Change(each.claim, each.record, 60.0) for each in first.claim(2)])
    assert names(second.claim(9)) == ["m1", "n1", "m2", "n2", "s"]


def test_savepoints(producer: MLProducer, broker: FakeBroker, connection: Any) -> None:
    """What a savepoint takes back is not sent."""
    outbox.add(connection, message("before"))
    with connection.transaction():
        outbox.add(connection, message("within"))
        raise psycopg.Rollback
    outbox.add(connection, message("after"))
    connection.commit()
    assert bodies(broker, 2) == [b"before", b"after"]


def test_a_connection_with_cursors_of_another_kind(
    producer: MLProducer, postgresql_server: PostgreSQLServer, broker: FakeBroker
) -> None:
    """Whatever its cursors take and give."""
    server = postgresql_server.url
    for kind in (psycopg.RawCursor, psycopg.ClientCursor):
        with psycopg.connect(server, cursor_factory=kind, row_factory=dict_row) as each:
            outbox.add(each, message(kind.__name__))
    assert bodies(broker, 2) == [b"RawCursor", b"ClientCursor"]


def test_autocommit_is_refused(
    producer: MLProducer, postgresql_server: PostgreSQLServer, connection: Any
) -> None:
    """But for a transaction that was begun in it."""
    with psycopg.connect(postgresql_server.url, autocommit=True) as each:
        with pytest.raises(ConfigurationError, match="autocommit"):
            outbox.add(each, message("m"))
        with each.transaction(), pytest.raises(InvalidMessageError):
            outbox.add(each, "no task")  # type: ignore[arg-type]
        with each.transaction():
            outbox.add(each, message("m"))
        with each.pipeline():
            each.execute("SELECT 1")
            with pytest.raises(ConfigurationError, match="autocommit"):
                outbox.add(each, message("m"))
        with each.transaction(), each.pipeline():
            each.execute("SELECT 1")
            outbox.add(each, message("m"))


def test_it_is_checked_before_the_row(producer: MLProducer, connection: Any, url: str) -> None:
    """As by `publish()`; the transaction goes on."""
    connection.execute("SELECT 1")
    long = Message(body=b"", routing_key="k" * 256)
    large = Message(body=bytes(producer.settings.max_message_bytes + 1), routing_key="k")
    for task, error in ((long, InvalidMessageError), (large, MessageTooLargeError)):
        with pytest.raises(error):
            outbox.add(connection, task)
    with pytest.raises(ConfigurationError, match="RetryPolicy"):
        outbox.add(connection, message("m"), retry=3)  # type: ignore[arg-type]
    for each in (object(), None, psycopg.AsyncConnection):
        with pytest.raises(ConfigurationError, match="accepted are"):
            outbox.add(each, message("m"))
    connection.commit()
    table = url.rpartition("=")[2]
    assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


@pytest.mark.parametrize("through", ["psycopg", "sqlalchemy"])
def test_a_row_that_is_refused_is_not_shown(
    producer: MLProducer, connection: Any, engine: sqlalchemy.Engine, url: str, through: str
) -> None:
    """PostgreSQL quotes the row that a constraint refuses; that is taken out of the error."""
    table = url.rpartition("=")[2]
    connection.execute(f"ALTER TABLE {table} ADD CHECK (routing_key <> 'k')")
    connection.commit()
    text = "what it says"
    with Session(engine) as session, pytest.raises(Exception, match="violates check") as caught:
        outbox.add(session if through == "sqlalchemy" else connection, message(text))
    shown = "".join(traceback.format_exception(caught.value))
    assert text not in shown
    assert text.encode().hex() not in shown


def test_hooks_and_policies_are_the_producers(
    producer: MLProducer, broker: FakeBroker, connection: Any
) -> None:
    """Headers that hooks add are in the row, and a policy of the message's own too."""
    producer.before_publish(lambda _task, headers: headers.update(tenant="t"))
    outbox.add(connection, message("m"), retry=RetryPolicy(7, 0.1, 0.2), producer=producer)
    connection.commit()
    (received,) = broker.wait_for_messages(1, LIMIT)
    assert received.properties.headers["tenant"] == "t"


class NoQueue(Behaviour):
    """Refuses what is no dead letter."""

    def on_publish(self, connection: Any, channel: int, tag: int, message: Any) -> None:
        """Nack what is for the exchange x."""
        if message.exchange == "bookmarkai.ml":
            connection.nack(channel, tag)
        else:
            super().on_publish(connection, channel, tag, message)


def test_retry_false_is_one_attempt(
    connect: Connect, serve: Serve, connection: Any, url: str
) -> None:
    """Then it is dead-lettered, and the receipt says so."""
    broker = serve(NoQueue())
    producer = connect(broker, store_url=url)
    producer.start()
    assert producer.wait_connected(LIMIT)
    receipt = outbox.add(connection, message("m"), retry=False, producer=producer)
    connection.commit()
    with pytest.raises(RetriesExhaustedError):
        receipt.result(LIMIT)


def test_another_process_delivers(
    connect: Connect, broker: FakeBroker, url: str, connection: Any
) -> None:
    """The receipt of a producer without a broker learns it from the store."""
    without = connect("amqp://u:p@127.0.0.1:1/", store_url=url)
    without.start()
    receipt = outbox.add(connection, message("m"), producer=without)
    lost = outbox.add(connection, message("n"), producer=without)
    connection.rollback()
    receipt = outbox.add(connection, message("m"), producer=without)
    connection.commit()
    connect(broker, store_url=url).start()
    assert receipt.result(LIMIT).confirmed
    with pytest.raises(TimeoutError):
        lost.result(0.2)


def test_without_a_producer_that_runs(connect: Connect, url: str, connection: Any) -> None:
    """The row waits, and the receipt says no more than that."""
    idle = connect("amqp://u:p@127.0.0.1:1/", store_url=url)
    receipt = outbox.add(connection, message("m"))
    connection.commit()
    with pytest.raises(TimeoutError):
        receipt.result(0.05)
    assert idle.status().connection_state.name == "DISCONNECTED"
    with closing(PostgreSQLStore(url)) as store:
        assert store.depth().waiting == 1
        assert store.backlog[0] == 1
        assert 0 < store.backlog[1] < LIMIT


def test_rows_that_were_claimed_ahead(url: str) -> None:
    """They come next, are nobody else's, and go back without a doubt when the store is closed."""
    with closing(PostgreSQLStore(url)) as first, closing(PostgreSQLStore(url)) as second:
        first.put([Entry(Record(make_envelope(f"m{n}")), 0.0) for n in range(6)], LIMIT)
        assert first.claim_ahead(3)
        assert [each.record.envelope.message_id for each in first.claim(2)] == ["m0", "m1"]
        assert not first.claim_ahead(3)
        assert [each.record.envelope.message_id for each in second.claim(1)] == ["m3"]
        first.give_back()
        assert first.claim_ahead(1)
        first.close()
        rows = second.claim(10)
        assert [(each.record.envelope.message_id, each.record.doubtful) for each in rows] == [
            ("m0", True),
            ("m1", True),
            ("m2", False),
            ("m4", False),
            ("m5", False),
        ]


def test_a_backlog_is_claimed_ahead(
    connect: Connect, broker: FakeBroker, connection: Any, url: str
) -> None:
    """Each row goes out once, in the order of the rows; none of it stays claimed."""
    waiting = connect(broker, store_url=url)
    names = [f"m{n}" for n in range(2500)]
    for name in names:
        outbox.add(connection, message(name), producer=waiting)
    connection.commit()
    waiting.start()
    assert waiting.flush(LIMIT) == 0
    assert bodies(broker, len(names)) == [name.encode() for name in names]


def test_the_end_of_a_backlog_is_seen_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of many rows is kept for a while, but not once none was left to claim."""
    monkeypatch.setattr(store_module, "MANY", 1)
    monkeypatch.setattr(store_module, "COUNTING", 1e-9)
    with closing(PostgreSQLStore(url)) as store:
        store.put([Entry(Record(make_envelope("m")), 0.0)], LIMIT)
        assert store.depth().waiting == 1
        store.done([row.claim for row in store.claim(2)])
        assert store.depth().waiting == 1
        assert store.claim(2) == []
        assert store.depth().waiting == 0


def test_a_table_of_an_earlier_version(
    relays: tuple[PostgreSQLStore, PostgreSQLStore],
    url: str,
    postgresql_server: PostgreSQLServer,
    connect: Connect,
    broker: FakeBroker,
    connection: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is used as it is, which is logged once; `create` makes what it lacks."""
    first, second = relays
    table = url.rpartition("=")[2]
    there = (
        f"SELECT (SELECT count(*) FROM pg_trigger WHERE tgrelid = '{table}'::regclass),"
        " (SELECT count(*) FROM pg_attribute"
        f" WHERE attrelid = '{table}'::regclass AND attname IN ('follows', 'xact'))"
    )
    postgresql_server.call(f"DROP FUNCTION {table}_notify CASCADE", user="app")
    postgresql_server.call(f"ALTER TABLE {table} DROP follows, DROP xact", user="app")
    assert postgresql_server.call(there) == [(0, 0)]
    outbox.add(connection, message("t"), producer=connect(broker, store_url=url))
    connection.commit()
    assert names(first.claim(1)) == ["m0"]
    first.close()
    assert names(first.claim(1)) == ["m0"]
    assert caplog.text.count("earlier version's") == 1
    for _ in range(2):
        with closing(PostgreSQLStore(url)) as store:
            store.create()
        assert postgresql_server.call(there) == [(1, 2)]
    assert caplog.text.count("earlier version's") == 1
    assert names(second.claim(9)) == ["n0", "m1", "n1", "m2", "n2", "s", "t"]


# --- through SQLAlchemy --------------------------------------------------------------------------


def test_sqlalchemy(
    producer: MLProducer, broker: FakeBroker, engine: sqlalchemy.Engine, business: str
) -> None:
    """A session, a connection, and savepoints of both."""
    row = sqlalchemy.text(f"INSERT INTO {business} VALUES (1)")
    with Session(engine) as session:
        session.execute(row)
        outbox.add(session, CeleryTask("t", routing_key="k", task_id="1"))
        with session.begin_nested() as inner:
            outbox.add(session, CeleryTask("t", routing_key="k", task_id="2"))
            inner.rollback()
        session.commit()
        outbox.add(session, CeleryTask("t", routing_key="k", task_id="3"))
    with engine.begin() as connection:
        connection.execute(row)
        outbox.add(connection, CeleryTask("t", routing_key="k", task_id="4"))
    found = broker.wait_for_messages(2, LIMIT)
    assert [each.properties.message_id for each in found] == ["1", "4"]
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.connect() as other, pytest.raises(ConfigurationError, match="autocommit"):
        outbox.add(other, message("m"))


def test_sqlite_for_development(connect: Connect, serve: Serve, tmp_path: Path) -> None:
    """The row waits in the application's own file until it is moved to the store, in order."""
    broker = serve()
    producer = connect(broker, store_url=f"sqlite:///{tmp_path}/store.db")
    path = f"{tmp_path}/application.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with closing(SQLiteStore(tmp_path / "store.db")) as store:
        mover = outbox.Mover(path, store)
        with pytest.raises(StoreError, match="cannot be used"):
            mover.move()
        with Session(engine) as session:
            outbox.add(session, message("never"))
            session.rollback()
            for name in ("a", "b"):
                receipt = outbox.add(session, message(name))
            assert mover.move() == 0
            session.commit()
        assert receipt.durable
        assert mover.move() == 2
        assert mover.move() == 0
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.connect() as other, pytest.raises(ConfigurationError, match="autocommit"):
        outbox.add(other, message("m"))
    engine.dispose()
    producer.start()
    assert bodies(broker, 2) == [b"a", b"b"]


class Busy:
    """A store that does something else before it takes anything."""

    def __init__(self, store: SQLiteStore, first: Callable[[], object]) -> None:
        self._store, self._first = store, first

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages."""
        self._first()
        return self._store.put(entries, patience)


@pytest.fixture
def application(connect: Connect, serve: Serve, tmp_path: Path) -> str:
    """Return the path of an application's file with 250 rows in its outbox."""
    connect(serve(), store_url=f"sqlite:///{tmp_path}/store.db")
    path = f"{tmp_path}/application.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with Session(engine) as session:
        for n in range(250):
            outbox.add(session, message(f"m{n}"))
        session.commit()
    engine.dispose()
    return path


def test_rows_are_moved_by_one_process_at_a_time(application: str, tmp_path: Path) -> None:
    """Two that read the same rows would store each twice; and between two batches one may end."""
    with closing(SQLiteStore(tmp_path / "store.db")) as store:
        other = outbox.Mover(application, store)
        moved: list[int] = []
        busy: Any = Busy(store, lambda: moved.append(other.move()))
        mover = outbox.Mover(application, busy)
        while count := mover.move():
            moved.append(count)
        assert moved == [0, 100, 0, 100, 0, 50]
        assert store.depth().waiting == 250


@pytest.mark.parametrize("hold", ["BEGIN IMMEDIATE", "BEGIN; SELECT * FROM mlproducer_outbox"])
def test_rows_that_cannot_be_deleted_are_not_stored(
    application: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: str
) -> None:
    """A transaction of the application that lasts long, even one that reads, doubles no message."""
    monkeypatch.setattr(outbox, "BUSY", 0.05)
    with (
        closing(SQLiteStore(tmp_path / "store.db")) as store,
        closing(sqlite3.connect(application, isolation_level=None)) as connection,
    ):
        mover = outbox.Mover(application, store)
        for statement in hold.split("; "):
            connection.execute(statement).fetchone()
        for _ in range(2):
            with pytest.raises(StoreError, match="cannot be used"):
                mover.move()
        connection.execute("ROLLBACK")
        while mover.move():
            pass
        assert store.depth().waiting == 250


NO_DELETE = """
    CREATE TRIGGER t BEFORE DELETE ON mlproducer_outbox BEGIN SELECT RAISE(ABORT, 'no'); END
"""
NO_COMMIT = """
    CREATE TABLE child (key REFERENCES mlproducer_outbox DEFERRABLE INITIALLY DEFERRED);
    INSERT INTO child VALUES (1);
    UPDATE mlproducer_outbox SET body = 'damaged' WHERE key = 2;
"""


def test_rows_whose_deletion_fails_are_stored_once(
    application: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in which nothing can be deleted, or committed, such as on a full disk, doubles none.

    A trigger and a foreign key take the disk's part. A damaged row is put aside in the end.
    """

    @contextmanager
    def strict(path: str, busy: float) -> Iterator[sqlite3.Connection]:
        with opened(path, busy) as connection:
            connection.execute("PRAGMA foreign_keys = on")
            yield connection

    monkeypatch.setattr("mlproducer.stores.sqlite.outbox.opened", strict)
    with (
        closing(SQLiteStore(tmp_path / "store.db")) as store,
        closing(sqlite3.connect(application, isolation_level=None)) as connection,
    ):
        mover = outbox.Mover(application, store)
        for make, undo, stored in [
            (NO_DELETE, "DROP TRIGGER t", 0),
            (NO_COMMIT, "DROP TABLE child", 99),
        ]:
            connection.executescript(make)
            for _ in range(2):
                with pytest.raises(StoreError, match="cannot be used"):
                    mover.move()
                assert store.depth().waiting == stored
            connection.execute(undo)
        while mover.move():
            pass
        assert store.depth().waiting == 249
        aside = connection.execute("SELECT key FROM mlproducer_outbox_quarantine").fetchall()
        assert aside == [(2,)]


@pytest.mark.parametrize(
    "damage", ["body = 'text'", "accepted_at = 'soon'", "retry = 5", "routing_key = x'00'"]
)
def test_a_damaged_row_is_put_aside(
    application: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and kept; those behind it are moved."""
    with closing(sqlite3.connect(application)) as connection:
        connection.execute(f"UPDATE mlproducer_outbox SET {damage} WHERE message_id = 'm7'")
        connection.commit()
        with closing(SQLiteStore(tmp_path / "store.db")) as store:
            mover = outbox.Mover(application, store)
            while mover.move():
                pass
            assert store.depth().waiting == 249
        assert "row 8 of the outbox" in caplog.text
        kept = connection.execute("SELECT message_id FROM mlproducer_outbox_quarantine")
        assert kept.fetchall() == [("m7",)]


# --- through Django ------------------------------------------------------------------------------


def test_django(
    producer: MLProducer, broker: FakeBroker, postgresql_server: PostgreSQLServer
) -> None:
    """In ``atomic`` blocks, nested ones too; not in autocommit."""
    import django
    from django.conf import settings
    from django.db import connections, transaction

    if not settings.configured:
        settings.configure(SECRET_KEY="of a test")
        django.setup()
    server = postgresql_server
    connections.databases["outbox"] = connections.configure_settings(
        {
            "default": {"ENGINE": "django.db.backends.dummy"},
            "outbox": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": server.database,
                "USER": server.user,
                "PASSWORD": server.password,
                "HOST": server.host,
                "PORT": server.port,
            },
        }
    )["outbox"]
    connection = connections["outbox"]
    try:
        with transaction.atomic(using="outbox"):
            outbox.add(connection, message("sent"))
            with transaction.atomic(using="outbox"):
                outbox.add(connection, message("never"))
                transaction.set_rollback(True, using="outbox")
        assert bodies(broker, 1) == [b"sent"]
        with pytest.raises(ConfigurationError, match="autocommit"):
            outbox.add(connection, message("m"))
    finally:
        connection.close()


# --- notifications -------------------------------------------------------------------------------


def test_a_lost_listener_comes_back(
    producer: MLProducer,
    broker: FakeBroker,
    postgresql_server: PostgreSQLServer,
    connection: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All sessions are ended; the next COMMIT is heard again, or found when it listens again.

    Each loss is told.
    """
    listens = "SELECT 1 FROM pg_stat_activity WHERE state = 'idle' AND query LIKE 'LISTEN%'"
    for _ in range(2):
        until(lambda: postgresql_server.call(listens))  # else there is no session of its own to end
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            postgresql_server.end_sessions()
            until(lambda: "no notifications from" in caplog.text)
    with psycopg.connect(postgresql_server.url) as again:
        outbox.add(again, message("m"))
    assert bodies(broker, 1) == [b"m"]
    assert postgresql_server.password not in caplog.text
