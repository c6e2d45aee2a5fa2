"""The PostgreSQL store on a server that is not well: away, frozen, full, read-only, failing over.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import psycopg
import pytest

from mlproducer import Message, MLProducer, Settings, outbox
from mlproducer.errors import StoreError
from mlproducer.stores.postgres import PostgreSQLStore, sql
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row
from mlproducer.testing import FakeBroker, PostgreSQLServer, Proxy
from mlproducer.testing.erlang import free_port
from mlproducer.testing.postgresql_server import as_user
from mlproducer.testing.workspace import Workspace
from tests.helpers import make_envelope
from tests.stopwatch import in_time

LIMIT = 120.0
SILENCE = 1.0
CONNECTING = 2.0
SLACK = 0.75
"""Seconds for the order to cancel, and what a busy machine may add."""

PATIENCE = 5.0
HOUR = 3600.0


@pytest.fixture(scope="module")
def mortal() -> Iterator[PostgreSQLServer]:
    """Yield a server that the tests of this file may end; each leaves it running."""
    with PostgreSQLServer(config={"max_connections": "20"}) as server:
        yield server


@pytest.fixture
def url(mortal: PostgreSQLServer) -> str:
    """Name a table of the test's own."""
    return f"{mortal.url}?table=test_{secrets.token_hex(4)}"


@pytest.fixture
def store(url: str) -> Iterator[PostgreSQLStore]:
    """Yield a store whose table is there, and whose connection is up."""
    with closing(PostgreSQLStore(url)) as made:
        made.create()
        yield made


@contextmanager
def raising(store: PostgreSQLStore, said: str = "", within: float = SILENCE) -> Iterator[None]:
    """Expect an error that names host and database, in time, and nothing of psycopg's."""
    with (
        in_time(within + SLACK),
        pytest.raises(StoreError, match=f"the store at {store.name} .*{said}") as caught,
    ):
        yield
    assert caught.value.__context__ is None  # psycopg's frames know the password
    assert store.address.options["password"] not in str(caught.value)


def entry(name: str, delay: float | None = None) -> Entry:
    """Return an entry with a message id."""
    return Entry(Record(make_envelope(name)), delay)


def ids(rows: list[Row]) -> list[str]:
    """Return the rows' message ids."""
    return [row.record.envelope.message_id for row in rows]


def until(come_about: Callable[[], object]) -> None:
    """Ask until it is so."""
    deadline, never = time.monotonic() + LIMIT, threading.Event()
    while not come_about():
        assert time.monotonic() < deadline
        never.wait(0.01)


# --- away ----------------------------------------------------------------------------------------


def test_rows_outlive_kill_9(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """What was put, claimed and deleted before is so afterwards, and the store comes back alone."""
    gone, held, _ = store.put([entry("gone"), entry("held"), entry("due", 0.0)], PATIENCE)
    store.done([gone])
    mortal.kill()
    with raising(store, "cannot be reached: Connection refused"):
        store.depth()
    mortal.start()
    assert store.depth() == Depth(2, 0)
    assert store.renew([held]) == []
    assert ids(store.claim(10)) == ["due"]


def test_sessions_that_were_ended_cost_no_error(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """Whether the server was restarted or has ended the session, the next put works."""
    store.put([entry("a", 0.0)], PATIENCE)
    mortal.restart()
    store.put([entry("b", 0.0)], PATIENCE)
    mortal.end_sessions()
    store.put([entry("c", 0.0)], PATIENCE)
    assert ids(store.claim(10)) == ["a", "b", "c"]


def test_nobody_there_and_no_such_name(url: str) -> None:
    """A port where nothing listens, a name that is none, a server that is something else."""
    away = PostgreSQLStore(f"postgresql://u:secret@127.0.0.1:{free_port()}/d")
    with raising(away, "Connection refused", CONNECTING):
        away.depth()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        other = PostgreSQLStore(f"postgresql://u:secret@127.0.0.1:{port}/d")
        with raising(other, "did not answer in time", CONNECTING):
            other.depth()


def test_another_host_takes_over(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """Of several hosts the one that can be reached, and takes writes, is used."""
    store.put([entry("a", 0.0)], PATIENCE)
    password = store.address.options["password"]
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{mortal.port}"
    several = f"postgresql://app:{password}@{hosts}/app?table={store.table}"
    with closing(PostgreSQLStore(several)) as other:
        assert ids(other.claim(1)) == ["a"]


# --- frozen --------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[PostgreSQLStore, Claim], object]] = {
    "put": lambda store, _: store.put([entry("late", 0.0)], PATIENCE),
    "release": lambda store, claim: store.release([Change(claim, Record(make_envelope()), 0.0)]),
    "renew": lambda store, claim: store.renew([claim]),
    "done": lambda store, claim: store.done([claim]),
    "claim": lambda store, _: store.claim(10),
    "depth": lambda store, _: store.depth(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_frozen_server_is_given_up(
    mortal: PostgreSQLServer, store: PostgreSQLStore, name: str
) -> None:
    """On a connection that lives, and then on a new one; afterwards nothing of it is there."""
    claim, waits = store.put([entry("a"), entry("b", 0.0)], PATIENCE)
    with mortal.frozen():
        with raising(store, "did not answer in time"):
            CALLS[name](store, claim)
        with raising(store, "did not answer in time", CONNECTING):
            store.depth()
    until(lambda: _answers(store))
    if name == "done":  # may have been carried out, or not
        return
    assert store.depth() == Depth(2, 0)
    assert store.renew([claim]) == []
    assert ids(store.claim(10)) == ["b"]
    assert waits.key > claim.key


def _answers(store: PostgreSQLStore) -> bool:
    try:
        store.depth()
    except StoreError:
        return False
    return True


def test_a_put_that_ends_without_an_answer_is_undone(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """The server holds it up behind a lock, and goes on when it has been given up."""
    with psycopg.connect(mortal.url) as blocker:
        blocker.execute(f"LOCK TABLE {store.table} IN EXCLUSIVE MODE")
        with raising(store, "did not answer in time|cancelled"):
            store.put([entry("late", 0.0)], PATIENCE)
    assert store.depth() == Depth(0, 0)
    assert store.claim(10) == []


def test_a_failover_that_loses_an_undoing(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """What was undone is undone again over a new connection, by which it may be there again."""
    with Proxy((mortal.host, mortal.port)) as address:
        url = f"postgresql://app:{mortal.password}@127.0.0.1:{address.port}/app?table={store.table}"
        with closing(PostgreSQLStore(url)) as far:
            far.put([entry("kept", 0.0)], PATIENCE)
            address.hole("s2c")
            with raising(far, "did not answer in time"):
                far.put([entry("raised", 0.0)], PATIENCE)
            mortal.call(f"CREATE TABLE {store.table}_then AS SELECT * FROM {store.table}")
            address.reset()
            address.heal()
            assert far.depth() == Depth(1, 0)
            mortal.call(
                f"INSERT INTO {store.table} SELECT * FROM {store.table}_then ON CONFLICT DO NOTHING"
            )
            assert far.depth() == Depth(2, 0)
            address.reset()
            assert far.depth() == Depth(1, 0)
            assert ids(store.claim(10)) == ["kept"]


def test_a_put_that_is_late_for_some_of_its_rows_stores_none(
    store: PostgreSQLStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time after which it may do nothing is over in the middle of the statement."""
    entries = [entry(f"m{n}") for n in range(1000)]
    known = store._connection.server_time
    shortest, longest = 0.0, PATIENCE
    for _ in range(30):  # towards the time that it takes, and then around it
        limit = (shortest + longest) / 2
        late = partial(_later, known, limit)
        monkeypatch.setattr(store._connection, "server_time", late)
        try:
            stored = len(store.put(entries, PATIENCE))
        except StoreError:
            stored = 0
        assert store.depth().total == stored
        shortest, longest = (shortest, limit) if stored else (limit, longest)
        if longest - shortest < longest / 50:
            shortest, longest = shortest * 0.98, longest * 1.02
        store._run(f"DELETE FROM {store.table}", {})


def _later(known: Callable[[float], float], limit: float, _moment: float) -> float:
    return known(time.monotonic() + limit)


def test_publishers_deadlines_hold(mortal: PostgreSQLServer, url: str) -> None:
    """With messages written ahead: what raised while it was frozen is never sent."""
    with FakeBroker() as broker:
        settings = Settings(url=broker.url, store_url=f"{url}&write_ahead=1")
        with MLProducer(settings) as producer:
            producer.publish(Message(body=b"before", routing_key="k"))
            with mortal.frozen():
                for _ in range(3):
                    with (
                        in_time(0.4 + 0.25),
                        pytest.raises(StoreError, match="has not answered in time"),
                    ):
                        producer.publish(Message(body=b"never", routing_key="k"), timeout=0.4)
            until(lambda: producer.flush(LIMIT) == 0)
            producer.publish(Message(body=b"after", routing_key="k"))
        assert [each.body for each in broker.messages] == [b"before", b"after"]


def test_a_claim_that_was_begun_is_given_up(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """The next call waits for it, in time; it has claimed nothing then (143)."""
    store.put([entry("a", 0.0), entry("b", 0.0)], PATIENCE)
    store.depth()
    with mortal.frozen():
        assert store.claim_ahead(10)
        with raising(store, "did not answer in time"):
            store.depth()
    until(lambda: _answers(store))
    assert ids(store.claim(10)) == ["a", "b"]
    assert store.depth() == Depth(2, 0)


def test_a_claim_that_was_begun_when_the_session_ended(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """What it had claimed is due again, and not in doubt."""
    store.put([entry("a", 0.0), entry("b", 0.0)], PATIENCE)
    assert store.claim_ahead(10)
    mortal.end_sessions()
    until(lambda: _answers(store))
    rows = store.claim(10)
    assert ids(rows) == ["a", "b"]
    assert not any(row.record.doubtful for row in rows)


# --- refusals ------------------------------------------------------------------------------------


def test_a_server_that_became_read_only(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """As a standby is; when it takes writes again, all goes on."""
    store.put([entry("a", 0.0)], PATIENCE)
    mortal.call("ALTER ROLE app SET default_transaction_read_only = on")
    mortal.end_sessions()
    with raising(store, "is read-only"):
        store.put([entry("b", 0.0)], PATIENCE)
    mortal.call("ALTER ROLE app RESET default_transaction_read_only")
    store.put([entry("c", 0.0)], PATIENCE)
    assert ids(store.claim(10)) == ["a", "c"]


def test_too_many_connections(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """It says so, and connects when there is room."""
    mortal.end_sessions()
    mortal.call("ALTER ROLE app CONNECTION LIMIT 1")
    with psycopg.connect(mortal.url), raising(store, "too many connections"):
        store.depth()
    mortal.call("ALTER ROLE app CONNECTION LIMIT -1")
    assert store.depth() == Depth(0, 0)


def test_a_statement_timeout(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """The server cancels what waits for a lock; nothing of it is left."""
    mortal.call("ALTER ROLE app SET statement_timeout = '200ms'")
    mortal.end_sessions()
    with psycopg.connect(mortal.url) as blocker:
        blocker.execute(f"LOCK TABLE {store.table} IN EXCLUSIVE MODE")
        with raising(store, "has cancelled a statement"):
            store.put([entry("late", 0.0)], PATIENCE)
    mortal.call("ALTER ROLE app RESET statement_timeout")
    assert store.depth() == Depth(0, 0)


def test_no_session_waits_for_a_lock_for_a_client_that_has_left(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """Also where the lock is needed to connect: each attempt would keep one of the connections."""
    mortal.end_sessions()
    with psycopg.connect(mortal.url) as blocker:
        blocker.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [store.table])
        with raising(store, "did not answer in time", CONNECTING):
            store.depth()
        there = "SELECT pid FROM pg_stat_activity WHERE application_name = 'mlproducer'"
        until(lambda: not mortal.call(there))
    assert store.depth() == Depth(0, 0)


def test_serialisation_failures(mortal: PostgreSQLServer, url: str) -> None:
    """Where each transaction is serialisable, conflicts are tried again and none is lost."""
    mortal.call("ALTER ROLE app SET default_transaction_isolation = serializable")
    done: list[str] = []
    try:
        with closing(PostgreSQLStore(url)) as first:
            first.create()
            for batch in range(5):
                first.put([entry(f"{batch}-{n}", 0.0) for n in range(20)], PATIENCE)
            threads = [threading.Thread(target=_empty, args=(url, done)) for _ in range(3)]
            for each in threads:
                each.start()
            for each in threads:
                each.join(LIMIT)
            assert first.depth() == Depth(0, 0)
    finally:
        mortal.call("ALTER ROLE app RESET default_transaction_isolation")
    assert sorted(done) == sorted(f"{batch}-{n}" for batch in range(5) for n in range(20))


def _empty(url: str, done: list[str]) -> None:
    deadline = time.monotonic() + LIMIT
    with closing(PostgreSQLStore(url)) as store:
        while time.monotonic() < deadline:
            rows = store.claim(7)
            if not rows and store.depth().total == 0:
                return
            store.done([row.claim for row in rows])
            done.extend(ids(rows))


def test_the_wrong_password_and_the_wrong_database(mortal: PostgreSQLServer) -> None:
    """Each has its words, and the password is in none of them."""
    wrong = PostgreSQLStore(mortal.url_for(password="PRIVATE-password"))
    with raising(wrong, "refuses the user or the password"):
        wrong.depth()
    nowhere = PostgreSQLStore(f"{mortal.url.rpartition('/')[0]}/nowhere")
    with raising(nowhere, "has no database of this name"):
        nowhere.depth()


def test_a_role_that_may_not_make_the_table(mortal: PostgreSQLServer) -> None:
    """It is told what to do; once the table is there, it needs no right to make one."""
    table = f"test_{secrets.token_hex(4)}"
    mortal.call(f"CREATE ROLE {table} LOGIN PASSWORD 'other'")
    with closing(PostgreSQLStore(f"{mortal.url_for(table, 'other')}?table={table}")) as poor:
        with raising(poor, "relay --create-table"):
            poor.put([entry("a", 0.0)], PATIENCE)
        mortal.call(outbox.schema(table), user="app")
        with raising(poor, "does not permit this role"):
            poor.put([entry("a", 0.0)], PATIENCE)
        mortal.call(
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table}, {table}_fates TO {table};"
            f"GRANT USAGE, SELECT, UPDATE ON SEQUENCE {table}_key_seq TO {table}"
        )
        poor.put([entry("a", 0.0)], PATIENCE)
        assert ids(poor.claim(1)) == ["a"]


def test_another_table_of_its_name(mortal: PostgreSQLServer, store: PostgreSQLStore) -> None:
    """One that a later version has made, and one that is the application's."""
    mortal.call(f"COMMENT ON TABLE {store.table} IS 'mlproducer messages, version 2'", user="app")
    store.close()
    with raising(store, "of version 2, made by a later mlproducer"):
        store.depth()
    mortal.call(f"CREATE TABLE {store.table}_theirs (n int)", user="app")
    theirs = PostgreSQLStore(f"{mortal.url}?table={store.table}_theirs")
    with raising(theirs, "is not a store of mlproducer"):
        theirs.depth()


def test_a_damaged_row_is_put_aside(
    mortal: PostgreSQLServer, store: PostgreSQLStore, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and stays in the table; the others go on."""
    store.put([entry("a", 0.0), entry("b", 0.0)], PATIENCE)
    mortal.call(f"UPDATE {store.table} SET body = 'other' WHERE message_id = 'a'")
    assert ids(store.claim(10)) == ["b"]
    assert "is damaged" in caplog.text
    assert store.claim(10) == []
    assert store.depth() == Depth(1, 0)
    assert mortal.call(f"SELECT message_id FROM {store.table} WHERE state = 3") == [("a",)]


def test_a_token_without_room_to_grow_holds_nothing_up(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """It was written by others; the row has a place, and so a fence, like any other."""
    store.put([entry("a", 0.0), entry("b", 0.0)], PATIENCE)
    mortal.call(f"UPDATE {store.table} SET token = {2**63 - 1} WHERE message_id = 'a'")
    rows = store.claim(10)
    assert ids(rows) == ["a", "b"]
    assert store.renew([row.claim for row in rows]) == []


def test_a_backlog_after_a_vacuum_of_the_empty_table(
    mortal: PostgreSQLServer, store: PostgreSQLStore
) -> None:
    """PostgreSQL expects no rows then; what it is asked for still takes no scan for each row."""
    entries = [entry(f"m{n}", 0.0) for n in range(20_000)]
    batches = [entries[begin : begin + 1000] for begin in range(0, len(entries), 1000)]
    for batch in batches[:5]:
        store.done(store.put(batch, PATIENCE))
    mortal.call(f"VACUUM (TRUNCATE FALSE) {store.table}")
    for batch in batches:
        store.put(batch, PATIENCE)
    rows = store.claim(1000)
    assert len(rows) == 1000
    claims = [row.claim for row in rows]
    assert store.renew(claims) == []
    assert store.release([Change(row.claim, row.record, 0.0) for row in rows[:500]]) == []
    store.done(claims)
    assert store.depth().total >= sql.COUNTED
    assert mortal.call(f"SELECT count(*) FROM {store.table}") == [(len(entries) - len(rows),)]


# --- clocks and leases ---------------------------------------------------------------------------


def test_a_server_whose_clock_was_put_forward_is_asked_again(store: PostgreSQLStore) -> None:
    """What seems late only by its new clock is done after all."""

    def set_clock() -> None:
        store._connection._ahead -= HOUR  # as if the server's clock had said so before

    set_clock()
    (claim,) = store.put([entry("a")], PATIENCE)
    set_clock()
    assert store.release([Change(claim, Record(make_envelope("a")), 0.0)]) == []
    set_clock()
    rows = store.claim(10)
    assert ids(rows) == ["a"]
    store.release([Change(rows[0].claim, Record(make_envelope("letter"), dead=True), 0.0)])
    (letter,) = store.letters(1)
    set_clock()
    assert store.seize(letter) is not None


def test_clocks_that_drift_apart_are_compared_again(store: PostgreSQLStore) -> None:
    """A connection of days does not rely on what it heard of the server's clock at its start."""
    store._connection._ahead += HOUR
    store._connection._trusted_until = 0.0
    store.depth()
    (now,) = store._run("SELECT extract(epoch FROM clock_timestamp())::float8", {})[0]
    assert abs(store._connection.server_time(time.monotonic()) - now) < LIMIT


def test_a_lease_longer_than_ones_own_horizon_holds(url: str) -> None:
    """Processes on one store need not have the same ``ML_STORE_LEASE``."""
    with closing(PostgreSQLStore(url, lease=60.0, horizon=60.0)) as patient:
        (claim,) = patient.put([Entry(Record(make_envelope("a")), ahead=True)], PATIENCE)
        with closing(PostgreSQLStore(url, lease=1.0, horizon=2.0)) as hasty:
            assert hasty.claim(10) == []
            assert hasty.depth() == Depth(ahead=1)
            patient._run(
                f"UPDATE {patient.table} SET due = due + make_interval(secs => {HOUR})", {}
            )
            assert ids(hasty.claim(10)) == ["a"]  # the server's clock was put back
        assert patient.renew([claim]) == [claim]


# --- a pooler ------------------------------------------------------------------------------------


@pytest.fixture
def pooled(mortal: PostgreSQLServer) -> Iterator[str]:
    """Yield the URL of a pgbouncer in transaction mode, with two sessions for all."""
    workspace = Workspace("mlproducer-pgbouncer-")
    workspace.path.chmod(0o711)
    port = free_port()
    settings = workspace.path / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\napp = host={mortal.host} port={mortal.port} dbname=app user=app"
        f" password={mortal.password}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 2\nunix_socket_dir =\n"
    )
    settings.chmod(0o644)
    program = workspace.spawn("pgbouncer", [*as_user(), "pgbouncer", str(settings)], os.environ)
    try:
        until(lambda: "process up" in program.log_tail())
        yield f"postgresql://app:any@127.0.0.1:{port}/app"
    finally:
        program.kill()
        workspace.close()


def test_pgbouncer_in_transaction_mode(
    pooled: str, mortal: PostgreSQLServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The store works; an outbox's rows wait for the sweep, which one log line says."""
    url = f"{pooled}?table=test_{secrets.token_hex(4)}"
    with closing(PostgreSQLStore(url)) as first, closing(PostgreSQLStore(url)) as second:
        for n in range(20):
            first.put([entry(f"a{n}", 0.0), entry(f"b{n}")], PATIENCE)
        rows = second.claim(100)
        assert ids(rows) == [f"a{n}" for n in range(20)]
        second.done([row.claim for row in rows])
        assert first.depth() == Depth(20, 0)
        first.close()
        assert len(second.claim(100)) == 20
        second.done([row.claim for row in rows])
    with caplog.at_level(logging.WARNING), FakeBroker() as broker:
        settings = Settings(url=broker.url, store_url=url, retry_sweep_interval=0.2)
        with MLProducer(settings) as producer:
            producer.start()
            assert producer.wait_connected(LIMIT)
            until(lambda: "is behind a pooler" in caplog.text)
            with psycopg.connect(mortal.url) as connection:
                message = Message(body=b"", routing_key="k", message_id="outbox")
                outbox.add(connection, message, producer=producer)
            found = broker.wait_for_messages(1, LIMIT)
            until(lambda: "outbox" in [each.properties.message_id for each in broker.messages])
            assert found


@pytest.fixture
def large(store: PostgreSQLStore, url: str, mortal: PostgreSQLServer) -> Iterator[Proxy]:
    """Yield a proxy to a server with 12 MB of messages."""
    big = make_envelope(body=secrets.token_bytes(500_000))
    for _ in range(4):
        store.put([Entry(Record(big), 0.0) for _ in range(6)], PATIENCE)
    with Proxy((mortal.host, mortal.port)) as proxy:
        yield proxy


def test_large_messages_over_a_slow_link(large: Proxy, url: str, mortal: PostgreSQLServer) -> None:
    """An answer that goes on arriving is waited for."""
    large.rate(6e6, "s2c")
    behind = url.replace(f":{mortal.port}", f":{large.port}")
    with closing(PostgreSQLStore(behind)) as store:
        assert len(store.claim(100)) == 24


def test_large_messages_over_a_slower_link(
    large: Proxy, url: str, mortal: PostgreSQLServer
) -> None:
    """Where an answer takes too long nevertheless, the next call asks for fewer rows."""
    large.rate(1.5e6, "s2c")
    behind = url.replace(f":{mortal.port}", f":{large.port}")
    with closing(PostgreSQLStore(behind)) as store:
        with pytest.raises(StoreError, match="in time"):
            store.claim(100)
        assert 0 < len(store.claim(100)) < 24


def test_more_rows_than_are_counted(store: PostgreSQLStore, mortal: PostgreSQLServer) -> None:
    """Counting takes no longer the more there are: the statistics say how many."""
    store.put([entry("first", 0.0)], PATIENCE)
    columns = ", ".join(("token", *sql.COLUMNS))
    mortal.call(
        f"INSERT INTO {store.table} ({columns}) SELECT {columns} FROM {store.table}, "
        f"generate_series(1, {sql.COUNTED})"
    )
    deadline, never = time.monotonic() + 3 * LIMIT, threading.Event()
    while store.depth() != Depth(waiting=sql.COUNTED + 1):
        assert time.monotonic() < deadline, store.depth()
        never.wait(0.1)
    assert store.backlog[0] == sql.COUNTED + 1
