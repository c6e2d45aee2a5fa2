"""The Redis store on a Redis that is not well: away, silent, full, flushed, failing over.

Runs on: pytest's main thread; processes of their own.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row
from mlproducer.stores.redis import RedisStore, connection
from mlproducer.testing import Proxy
from mlproducer.testing.erlang import free_port
from mlproducer.testing.redis_server import RedisServer
from tests.helpers import LIMIT, make_envelope
from tests.stopwatch import in_time

SILENCE = 0.5
SLACK = 0.25
"""Seconds that a busy machine may add."""

PATIENCE = 5.0


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """Yield a proxy in front of the shared Redis."""
    with Proxy((redis_server.host, redis_server.port)) as between:
        yield between


@pytest.fixture
def store(proxy: Proxy, prefix: str) -> Iterator[RedisStore]:
    """Yield a store that reaches Redis by the proxy; Redis knows its scripts."""
    with closing(RedisStore(f"redis://127.0.0.1:{proxy.port}", prefix=prefix)) as behind:
        (claim,) = behind.put([entry("first")], PATIENCE)
        behind.release([Change(claim, Record(make_envelope()), 0.0)])
        behind.done([row.claim for row in behind.claim(1)])
        yield behind
        proxy.heal()


@pytest.fixture
def other(redis_server: RedisServer, prefix: str) -> Iterator[RedisStore]:
    """Yield another process's store on the same rows."""
    with closing(RedisStore(redis_server.url, prefix=prefix)) as direct:
        yield direct


@contextmanager
def raising(store: RedisStore, said: str = "") -> Iterator[None]:
    """Expect an error that names the host, within the time that Redis has."""
    with (
        in_time(SILENCE + SLACK),
        pytest.raises(StoreError, match=f"the store at {store.name} .*{said}") as caught,
    ):
        yield
    assert caught.value.__context__ is None  # redis-py's frames know the password


def entry(name: str, delay: float | None = None) -> Entry:
    """Return an entry with a message id."""
    return Entry(Record(make_envelope(name)), delay)


def ids(rows: list[Row]) -> list[str]:
    """Return the rows' message ids."""
    return [row.record.envelope.message_id for row in rows]


def rows_in(server: RedisServer, prefix: str) -> int:
    """Count what lies in Redis, whether or not a store would find it."""
    return len(server.call("KEYS", f"{prefix}*:row:*"))


def until(come_about: Callable[[], object]) -> None:
    """Ask until it is so."""
    deadline, never = time.monotonic() + LIMIT, threading.Event()
    while not come_about():
        assert time.monotonic() < deadline
        never.wait(0.01)


def test_dead_letters_over_a_slow_link(
    store: RedisStore, other: RedisStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that writes many bytes has the time that they take."""
    monkeypatch.setattr(
        "mlproducer.stores.redis.store.RATE", 1_000_000
    )  # and more on a busy machine
    big = make_envelope(body=b"x" * 500_000)
    other.put([Entry(Record(big), 0.0) for _ in range(20)], PATIENCE)
    rows = store.claim(20)
    assert len(rows) == 20
    proxy.rate(8e6, "c2s")
    dead = [Change(row.claim, Record(big, attempts=4, dead=True), 0.0) for row in rows]
    assert store.release(dead) == []
    assert other.depth() == Depth(dead=20)


# --- away --------------------------------------------------------------------------------------


def test_rows_outlive_kill_9(mortal_redis: RedisServer) -> None:
    """What was put, claimed and deleted before is so afterwards, and the store comes back alone."""
    with closing(RedisStore(mortal_redis.url)) as store:
        gone, held, _ = store.put([entry("gone"), entry("held"), entry("due", 0.0)], PATIENCE)
        store.done([gone])
        mortal_redis.kill()
        with raising(store, "cannot be reached: Connection refused"):
            store.depth()
        mortal_redis.start()
        assert store.depth() == Depth(2, 0)
        assert store.renew([held]) == []
        assert ids(store.claim(10)) == ["due"]


def test_a_connection_that_was_closed_meanwhile_costs_no_error(mortal_redis: RedisServer) -> None:
    """Whether Redis was restarted or has ended the connection, the next put works."""
    with closing(RedisStore(mortal_redis.url)) as store:
        store.put([entry("a", 0.0)], PATIENCE)
        mortal_redis.kill()
        mortal_redis.start()
        store.put([entry("b", 0.0)], PATIENCE)
        mortal_redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        store.put([entry("c", 0.0)], PATIENCE)
        assert ids(store.claim(10)) == ["a", "b", "c"]


def test_a_redis_that_is_loading_says_so(mortal_redis: RedisServer) -> None:
    """Until Redis has loaded its data, nothing is taken; then all is there."""
    with closing(RedisStore(mortal_redis.url)) as store:
        store.put([entry(f"m{number}", 0.0) for number in range(50)], PATIENCE)
        mortal_redis.configure("appendonly", "no")
        mortal_redis.call("SAVE")
        mortal_redis.kill()
        mortal_redis.config |= {
            "appendonly": "no",
            "key-load-delay": "10000",  # microseconds for each key
            "loading-process-events-interval-bytes": "1024",
        }
        mortal_redis.launch()
        until(lambda: "Loading" in mortal_redis.log_tail(3))
        with raising(store, "is still loading its data"):
            store.depth()
        mortal_redis.wait_ready()
        assert store.depth() == Depth(50, 0)


def test_what_is_no_redis_is_named(prefix: str) -> None:
    """A port where something else listens gives a store error."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65_536)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        store = RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", prefix=prefix)
        with raising(store, "did not answer as Redis does"):
            store.depth()
        thread.join(LIMIT)


# --- silent ------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[RedisStore, Claim], object]] = {
    "put": lambda store, _: store.put([entry("late", 0.0)], PATIENCE),
    "release": lambda store, claim: store.release([Change(claim, Record(make_envelope()), 0.0)]),
    "renew": lambda store, claim: store.renew([claim]),
    "done": lambda store, claim: store.done([claim]),
    "claim": lambda store, _: store.claim(10),
    "letters": lambda store, _: store.letters(10),
    "seize": lambda store, claim: store.seize(Row(claim, Record(make_envelope()))),
    "depth": lambda store, _: store.depth(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("connected", [True, False])
def test_no_call_waits_longer_than_half_a_second(
    mortal_redis: RedisServer, name: str, connected: bool
) -> None:
    """A frozen Redis costs half a second, on a connection that lives and on a new one."""
    with closing(RedisStore(mortal_redis.url)) as store:
        claim = Claim(1, 1)
        if connected:
            (claim,) = store.put([entry("a")], PATIENCE)
        with mortal_redis.frozen(), raising(store, "did not answer in time"):
            CALLS[name](store, claim)


def test_impatience_is_respected(mortal_redis: RedisServer) -> None:
    """A put gives up when its publishers do, and leaves nothing behind."""
    with closing(RedisStore(mortal_redis.url)) as store:
        store.done(store.put([entry("known")], PATIENCE))
        with mortal_redis.frozen(), in_time(0.1 + SLACK), pytest.raises(StoreError):
            store.put([entry("late", 0.0)], 0.1)
        assert store.depth() == Depth(0, 0)


def test_entries_are_read_when_redis_is_ready(
    mortal_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that has idled is tried first, so that meanwhile publishers may give up."""
    read = []

    def entries() -> Iterator[Entry]:
        read.append(time.monotonic())
        yield entry("a")

    with closing(RedisStore(mortal_redis.url)) as store:
        store.depth()
        monkeypatch.setattr(connection, "IDLE", 0.0)
        with mortal_redis.frozen(), raising(store):
            store.put(entries(), PATIENCE)
        assert read == []
        store.put(entries(), PATIENCE)
        assert len(read) == 1


@pytest.mark.parametrize("delay", [None, 0.0])
def test_a_put_that_redis_reads_too_late_is_refused(
    mortal_redis: RedisServer, delay: float | None
) -> None:
    """A frozen Redis that wakes up takes nothing whose publisher was told of an error."""
    with closing(RedisStore(mortal_redis.url)) as store:
        store.done(store.put([entry("known")], PATIENCE))  # Redis knows the script now
        with mortal_redis.frozen(), raising(store):
            store.put([entry("late", delay)], PATIENCE)
        mortal_redis.call("PING")  # whatever it was sent while frozen, it has read before
        assert rows_in(mortal_redis, "mlproducer:") == 0
        with closing(RedisStore(mortal_redis.url)) as other:
            assert other.claim(10) == []


def test_a_paused_redis_is_silent_too(mortal_redis: RedisServer) -> None:
    """CLIENT PAUSE, as in a planned failover: an error in time, and nothing left afterwards."""
    with closing(RedisStore(mortal_redis.url)) as store:
        store.done(store.put([entry("known")], PATIENCE))
        mortal_redis.call("CLIENT", "PAUSE", 2 * 1000, "ALL")
        with raising(store):
            store.put([entry("late", 0.0)], PATIENCE)
        mortal_redis.call("PING")  # answered when the pause ends
        assert rows_in(mortal_redis, "mlproducer:") == 0
        assert store.depth() == Depth(0, 0)


@pytest.mark.parametrize("delay", [None, 0.0])
def test_a_put_without_an_answer_is_undone(
    redis_server: RedisServer,
    proxy: Proxy,
    prefix: str,
    store: RedisStore,
    other: RedisStore,
    delay: float | None,
) -> None:
    """Redis has the row, the publisher an error: it is never sent, and the next call deletes it."""
    proxy.hole("s2c")
    with raising(store, "did not answer in time"):
        store.put([entry("a", delay), entry("b", delay)], PATIENCE)
    assert rows_in(redis_server, prefix) == 2
    assert other.claim(10) == []
    with raising(store):  # while Redis cannot be reached, nothing else is done either
        store.depth()
    proxy.heal()
    assert store.depth() == Depth(0, 0)
    assert rows_in(redis_server, prefix) == 0


def test_a_put_that_is_held_up_on_its_way_is_refused(
    redis_server: RedisServer, proxy: Proxy, prefix: str, store: RedisStore, other: RedisStore
) -> None:
    """What the network delivers after the publisher was told of an error has no effect."""
    proxy.stall("c2s")
    with raising(store):
        store.put([entry("late", 0.0)], PATIENCE)
    proxy.resume()
    proxy.wait_for_connections(0, LIMIT)
    assert rows_in(redis_server, prefix) == 0
    assert store.depth() == Depth(0, 0)
    assert other.claim(10) == []


def test_a_claim_without_an_answer_is_given_back(
    proxy: Proxy, store: RedisStore, other: RedisStore
) -> None:
    """Rows that were claimed unheard are due at once, and without a doubt."""
    other.put([entry("a", 0.0)], PATIENCE)
    proxy.hole("s2c")
    with raising(store):
        store.claim(10)
    assert other.claim(10) == []
    proxy.heal()
    store.depth()
    (row,) = other.claim(10)
    assert not row.record.doubtful


def test_a_release_without_an_answer_can_be_repeated(
    proxy: Proxy, store: RedisStore, other: RedisStore
) -> None:
    """The claim still holds, since the release has not happened."""
    (claim,) = store.put([entry("a")], PATIENCE)
    record = Record(make_envelope("a"), attempts=1)
    proxy.hole("s2c")
    with raising(store):
        store.release([Change(claim, record, 0.0)])
    proxy.heal()
    assert store.renew([claim]) == []
    assert other.claim(10) == []
    assert store.release([Change(claim, record, 0.0)]) == []
    assert [row.record.attempts for row in other.claim(10)] == [1]


def test_a_release_is_not_taken_back_from_whoever_claimed_since(
    proxy: Proxy, store: RedisStore, other: RedisStore
) -> None:
    """What another process has claimed after the lost answer stays its own."""
    (claim,) = store.put([entry("a")], PATIENCE)
    proxy.hole("s2c")
    with raising(store):
        store.release([Change(claim, Record(make_envelope("a")), 0.0)])
    (row,) = other.claim(10)
    proxy.heal()
    assert store.renew([claim]) == [claim]
    assert other.renew([row.claim]) == []


def test_a_put_is_good_even_if_its_second_half_goes_unanswered(
    proxy: Proxy, store: RedisStore, other: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A delayed row is stored claimed, then let go; where that fails, the next call does it."""
    before = proxy.passed("s2c")
    store.put([entry("a")], PATIENCE)
    answer = proxy.passed("s2c") - before
    proxy.cut_after(proxy.passed("s2c") + answer, "s2c")
    store.put([entry("b", 0.0)], PATIENCE)
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    proxy.heal()
    store.depth()
    assert ids(other.claim(10)) == ["b"]


# --- full, closed, flushed ---------------------------------------------------------------------


def test_a_full_redis_still_delivers_and_deletes(mortal_redis: RedisServer) -> None:
    """Out of memory nothing more is stored, but what is there goes its way."""
    with closing(RedisStore(mortal_redis.url)) as store:
        held, _ = store.put([entry("held"), entry("due", 0.0)], PATIENCE)
        mortal_redis.configure("maxmemory", "1mb")
        assert mortal_redis.call("CONFIG", "GET", "maxmemory-policy")[1] == b"noeviction"
        with raising(store, "is out of memory"):
            store.put([entry("more")], PATIENCE)
        (row,) = store.claim(10)
        assert store.renew([held, row.claim]) == []
        assert store.release([Change(held, Record(make_envelope()), 0.0)]) == []
        store.done([row.claim])
        assert store.depth() == Depth(1, 0)
        mortal_redis.configure("maxmemory", "0")
        store.put([entry("more")], PATIENCE)
        assert store.depth() == Depth(2, 0)


def test_after_flushall_the_store_goes_on(mortal_redis: RedisServer) -> None:
    """Rows are lost with their Redis; new ones are taken, and old claims do them no harm."""
    with closing(RedisStore(mortal_redis.url)) as store:
        (old,) = store.put([entry("old")], PATIENCE)
        mortal_redis.call("FLUSHALL")
        mortal_redis.call("SCRIPT", "FLUSH")
        (new,) = store.put([entry("new")], PATIENCE)
        assert store.renew([old, new]) == [old]
        store.done([old])
        assert store.depth() == Depth(1, 0)


def replicate(replica: RedisServer, primary: RedisServer) -> None:
    """Make one Redis the copy of another, and wait until it is."""
    replica.call("REPLICAOF", primary.host, primary.port)
    until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))


def offset(server: RedisServer, role: str) -> int:
    """Say how much of what was written this Redis has."""
    lines = server.call("INFO", "replication").decode().splitlines()
    (line,) = [each for each in lines if each.startswith(f"{role}_repl_offset:")]
    return int(line.partition(":")[2])


def test_a_failover_costs_errors_and_no_row(mortal_redis: RedisServer) -> None:
    """A replica takes nothing until it is promoted; then the store goes on with all rows."""
    with (
        RedisServer() as replica,
        Proxy((mortal_redis.host, mortal_redis.port)) as address,
        closing(RedisStore(f"redis://127.0.0.1:{address.port}")) as store,
    ):
        replicate(replica, mortal_redis)
        (held, _) = store.put([entry("held"), entry("due", 0.0)], PATIENCE)
        until(lambda: offset(replica, "slave") >= offset(mortal_redis, "master"))
        address.retarget((replica.host, replica.port))
        mortal_redis.kill()
        address.reset()
        assert store.depth() == Depth(2, 0)
        with raising(store, "is a read-only replica"):
            store.put([entry("refused")], PATIENCE)
        replica.call("REPLICAOF", "NO", "ONE")
        store.put([entry("taken", 0.0)], PATIENCE)
        assert ids(store.claim(10)) == ["due", "taken"]
        assert store.renew([held]) == []


def test_a_failover_that_loses_an_undoing(mortal_redis: RedisServer) -> None:
    """What a put stored whose answer was lost is undone again on the server that takes over."""
    with (
        RedisServer() as replica,
        Proxy((mortal_redis.host, mortal_redis.port)) as address,
        closing(RedisStore(f"redis://127.0.0.1:{address.port}")) as store,
    ):
        replicate(replica, mortal_redis)
        store.put([entry("kept", 0.0)], PATIENCE)
        address.hole("s2c")
        with raising(store, "did not answer in time"):
            store.put([entry("raised", 0.0)], PATIENCE)
        until(lambda: offset(replica, "slave") >= offset(mortal_redis, "master"))
        replica.call("REPLICAOF", "NO", "ONE")
        address.reset()
        address.heal()
        assert store.depth() == Depth(1, 0)
        address.retarget((replica.host, replica.port))
        address.reset()
        assert store.depth() == Depth(1, 0)
        assert rows_in(replica, "mlproducer:") == 1


def test_a_demoted_redis_is_left_alone(mortal_redis: RedisServer) -> None:
    """A connection to what has become a replica is given up, and made again when it is primary."""
    with RedisServer() as primary, closing(RedisStore(mortal_redis.url)) as store:
        store.put([entry("a", 0.0)], PATIENCE)
        replicate(mortal_redis, primary)
        with raising(store, "is a read-only replica"):
            store.claim(10)
        mortal_redis.call("REPLICAOF", "NO", "ONE")
        assert store.claim(10) == []


def cluster_node() -> RedisServer:
    """Make a node; by default its second port might be taken."""
    return RedisServer(config={"cluster-enabled": "yes", "cluster-port": str(free_port())})


def test_in_a_cluster_the_node_with_the_rows_is_found() -> None:
    """The URL may name any node: the store goes to the one that has its hash slot."""
    with cluster_node() as one, cluster_node() as two:
        one.call("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        two.call("CLUSTER", "ADDSLOTSRANGE", 8192, 16_383)
        one.call("CLUSTER", "MEET", two.host, two.port, two.config["cluster-port"])
        until(lambda: b"cluster_state:ok" in one.call("CLUSTER", "INFO"))
        until(lambda: b"cluster_state:ok" in two.call("CLUSTER", "INFO"))
        with closing(RedisStore(one.url)) as first, closing(RedisStore(two.url)) as second:
            first.put([entry("a", 0.0), entry("b", 0.0)], PATIENCE)
            assert ids(second.claim(10)) == ["a", "b"]
        sizes = sorted(node.call("DBSIZE") for node in (one, two))
        assert sizes[0] == 0
        assert sizes[1] > 0


# --- two processes -----------------------------------------------------------------------------

TAKING = """
import sys
from mlproducer.stores.redis import RedisStore

store = RedisStore(sys.argv[1], prefix=sys.argv[2])
while rows := store.claim(7):
    assert store.renew([row.claim for row in rows]) == []
    for row in rows:
        print(row.record.envelope.message_id)
    store.done([row.claim for row in rows])
store.close()
"""


def test_two_processes_get_each_row_once(redis_server: RedisServer, prefix: str) -> None:
    """Processes that empty one store together share its rows, and miss none."""
    names = [f"m{number}" for number in range(2000)]
    with closing(RedisStore(redis_server.url, prefix=prefix)) as store:
        store.put([entry(name, 0.0) for name in names], PATIENCE)
        argv = [sys.executable, "-c", TAKING, redis_server.url, prefix]
        takers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        taken = [taker.communicate(timeout=60)[0].split() for taker in takers]
        assert [taker.returncode for taker in takers] == [0, 0]
        assert sorted(taken[0] + taken[1]) == sorted(names)
        assert store.depth() == Depth(0, 0)
