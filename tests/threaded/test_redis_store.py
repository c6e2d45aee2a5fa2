"""What is particular to the Redis store, on a Redis that is well; see also the conformance suite.

Runs on: pytest's main thread; a second process where something forks.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row
from mlproducer.stores.redis import RedisStore, scripts
from mlproducer.testing.redis_server import RedisError, RedisServer
from tests.helpers import LIMIT, make_envelope
from tests.pure.refusals import tells_nothing

HOUR = 3600.0

Open = Callable[..., RedisStore]


@pytest.fixture
def prefix() -> str:
    """Return a prefix that no other test has."""
    return f"test-{secrets.token_hex(4)}:"


@pytest.fixture
def connect(redis_server: RedisServer, prefix: str) -> Iterator[Open]:
    """Open stores on the same rows: ``connect(lease=...)``."""
    with ExitStack() as stores:

        def make(**options: float) -> RedisStore:
            url = f"{redis_server.url}?socket_timeout={LIMIT:.0f}"
            store = RedisStore(url, prefix=prefix, **options)  # type: ignore[arg-type]
            return stores.enter_context(closing(store))

        yield make


def ids(rows: list[Row]) -> list[str]:
    """Return the rows' message ids."""
    return [row.record.envelope.message_id for row in rows]


def waiting(*names: str) -> list[Entry]:
    """Return entries that are due at once."""
    return [Entry(Record(make_envelope(name)), 0.0) for name in names]


def keys(server: RedisServer, prefix: str) -> set[str]:
    """Return the names of all keys of a store, without what they begin with."""
    found = server.call("KEYS", f"{prefix}*")
    return {key.decode().removeprefix(f"{prefix}{{store}}:") for key in found}


# --- rows --------------------------------------------------------------------------------------


def test_a_thousand_rows_are_one_command(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """Every call of the protocol is one round trip, however many rows it has."""
    store = connect()
    store.depth()

    def commands(call: Callable[[], object]) -> int:
        redis_server.call("CONFIG", "RESETSTAT")
        call()
        stats = redis_server.call("INFO", "commandstats").decode()
        (line,) = [each for each in stats.splitlines() if each.startswith("cmdstat_evalsha:")]
        return int(line.partition("calls=")[2].partition(",")[0])

    claims: list[Claim] = []
    entries = [Entry(Record(make_envelope())) for _ in range(1000)]
    store.put([Entry(Record(make_envelope(), dead=True))], 30.0)  # the scripts are known by now
    assert commands(lambda: claims.extend(store.put(entries, 30.0))) == 1
    assert commands(lambda: store.renew(claims)) == 1
    changes = [Change(each, Record(make_envelope()), 0.0) for each in claims]
    assert commands(lambda: store.release(changes)) == 1
    rows: list[Row] = []
    assert commands(lambda: rows.extend(store.claim(1000))) == 1
    assert commands(lambda: store.done([row.claim for row in rows])) == 1
    assert commands(store.depth) == 1
    assert len(rows) == 1000
    assert store.depth() == Depth(0, 1)


def test_all_keys_lie_on_one_node_and_go_with_the_rows(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """Keys begin with the prefix and share a hash tag; of deleted rows nothing stays."""
    store = connect()
    claims = store.put([*waiting("a"), Entry(Record(make_envelope()), ahead=True)], 30.0)
    claims += store.put([Entry(Record(make_envelope(), dead=True), 0.0)], 30.0)
    names = redis_server.call("KEYS", f"{prefix}*")
    assert len(names) == 8
    assert all(name.startswith(f"{prefix}{{store}}:".encode()) for name in names)
    store.release([Change(claims[1], Record(make_envelope()), 0.0)])
    assert sum(name.startswith("own:") for name in keys(redis_server, prefix)) == 0
    store.done(claims)
    assert keys(redis_server, prefix) == {"last"}


def test_only_a_dead_letter_replaces_the_message(connect: Open) -> None:
    """A release that gives up no message keeps the one that was put, whatever body it names."""
    store = connect()
    (claim,) = store.put([Entry(Record(make_envelope("a", body=b"message")))], 30.0)
    store.release([Change(claim, Record(make_envelope("a", body=b""), attempts=1), 0.0)])
    (row,) = store.claim(1)
    assert (row.record.envelope.body, row.record.attempts) == (b"message", 1)
    letter = Record(make_envelope("a", body=b"letter"), attempts=2, dead=True, reason="R: r")
    store.release([Change(row.claim, letter, 0.0)])
    assert store.depth() == Depth(0, 1)
    (row,) = store.letters(10)
    assert (row.record.envelope.body, row.record.reason) == (b"letter", "R: r")
    taken = store.seize(row)
    assert taken is not None
    store.release([Change(taken.claim, Record(make_envelope("a")), 0.0)])
    assert store.depth() == Depth(1, 0)
    assert store.letters(10) == []


def test_a_server_whose_clock_was_put_forward_is_asked_again(connect: Open) -> None:
    """A put that seems late only by the server's new clock is stored after all."""
    store = connect()
    store.depth()
    store._connection._ahead -= HOUR  # as if the server's clock had said so before
    store.put(waiting("a"), 30.0)
    assert ids(store.claim(10)) == ["a"]


def test_a_lease_longer_than_ones_own_horizon_holds(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """Processes on one store need not have the same ``ML_STORE_LEASE``."""
    patient, hasty = connect(lease=60.0, horizon=60.0), connect(lease=1.0, horizon=2.0)
    message, letter = patient.put(
        [
            Entry(Record(make_envelope("a")), ahead=True),
            Entry(Record(make_envelope("b"), dead=True)),
        ],
        1.0,
    )
    assert hasty.claim(10) == []
    assert hasty.seize(Row(letter, Record(make_envelope("b"), dead=True))) is None
    redis_server.call("ZINCRBY", f"{prefix}{{store}}:due", HOUR * 1_000_000, str(message.key))
    assert ids(hasty.claim(10)) == ["a"]  # the server's clock was put back
    assert patient.renew([message, letter]) == [message]


def test_letters_behind_a_page_of_unreadable_ones_are_shown(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """A page without a letter would be taken for the end."""
    store = connect()
    letters = [Entry(Record(make_envelope(name), dead=True)) for name in "abcde"]
    claims = store.put(letters, 30.0)
    for claim, field in zip(claims[:4], ("body", "token", "body", "token"), strict=True):
        redis_server.call("HSET", f"{prefix}{{store}}:row:{claim.key}", field, "other")
    assert ids(store.letters(2)) == ["e"]
    assert store.letters(2, claims[4].key) == []


def test_two_prefixes_are_two_stores(redis_server: RedisServer) -> None:
    """What one prefix has, another does not see."""
    one = RedisStore(f"{redis_server.url}?prefix=one-{secrets.token_hex(4)}:")
    two = RedisStore(f"{redis_server.url}?prefix=two-{secrets.token_hex(4)}:")
    with closing(one), closing(two):
        one.put(waiting("a"), 30.0)
        assert two.depth() == Depth()
        assert two.claim(10) == []
        assert ids(one.claim(10)) == ["a"]


def test_large_messages_are_claimed_a_part_at_a_time(connect: Open) -> None:
    """A backlog of large messages does not come into memory all at once."""
    store = connect()
    body = bytes(6 * 1024 * 1024)
    store.put([Entry(Record(make_envelope(name, body=body)), 0.0) for name in "abcd"], 5.0)
    assert [ids(store.claim(10)), ids(store.claim(10)), ids(store.claim(10))] == [
        ["a", "b"],
        ["c", "d"],
        [],
    ]


# --- claims ------------------------------------------------------------------------------------


def test_a_renewed_claim_lasts(redis_server: RedisServer, prefix: str, connect: Open) -> None:
    """An owner that renews in time keeps a row for more than one lease, and so does its count."""
    store, other = connect(lease=HOUR), connect()
    claims = store.put([Entry(Record(make_envelope("a")), ahead=True)], 30.0)

    def let_pass(seconds: float) -> None:
        for name in ("due", "ahead"):  # which hold the end of the claim, by the server's clock
            key = f"{prefix}{{store}}:{name}"
            redis_server.call("ZINCRBY", key, -seconds * 1_000_000, str(claims[0].key))

    for _ in range(3):
        let_pass(0.9 * HOUR)
        assert other.claim(1) == []
        assert other.depth() == Depth(ahead=1)
        assert store.renew(claims) == []
    let_pass(HOUR)
    assert ids(other.claim(1)) == ["a"]


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_a_jump_of_the_servers_clock_holds_no_row_back(
    redis_server: RedisServer, prefix: str, connect: Open, ahead: float
) -> None:
    """A due time that no delay can explain counts as due."""
    store = connect(horizon=60.0)
    (claim,) = store.put([Entry(Record(make_envelope("a")), 30.0)], 30.0)
    assert store.claim(1) == []
    seconds, microseconds = map(int, redis_server.call("TIME"))
    due = (seconds + 30 + ahead) * 1_000_000 + microseconds
    redis_server.call("ZADD", f"{prefix}{{store}}:due", f"{due:.0f}", str(claim.key))
    assert ids(store.claim(1)) == ["a"]


def test_a_clock_that_was_put_back_takes_the_times_of_rows_along(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """A row waits no longer than its delay, and a claim holds for its lease."""
    store, other = connect(lease=30.0), connect()
    free, held = store.put(
        [Entry(Record(make_envelope("free")), 0.6), Entry(Record(make_envelope("held")))], 1.0
    )
    assert store.claim(1) == []
    back = 20_000_000  # as if all this had been done by a clock that was 20 s ahead
    redis_server.call("INCRBY", f"{prefix}{{store}}:clock", back)
    for claim in (free, held):
        redis_server.call("ZINCRBY", f"{prefix}{{store}}:due", back, str(claim.key))
    started = time.monotonic()
    while not (rows := other.claim(10)):
        assert time.monotonic() - started < 15.0
        threading.Event().wait(0.05)
    assert ids(rows) == ["free"]
    assert store.renew([held]) == []


def test_what_was_given_up_does_nothing_when_it_comes_late(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """A call that was undone before Redis had even read it is refused."""
    store = connect()
    store.put(waiting("a"), 30.0)
    redis_server.call("EVAL", scripts.UNDO, 1, f"{prefix}{{store}}:", "somebody", 7, "claim", 0)
    arguments = ("somebody", 7, 30_000_000, 60_000_000, 10, 1000)
    with pytest.raises(RedisError, match="given up"):
        redis_server.call("EVAL", scripts.CLAIM, 1, f"{prefix}{{store}}:", *arguments)
    assert ids(store.claim(1)) == ["a"]


def test_after_a_flush_an_old_claim_touches_no_new_row(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """FLUSHALL loses rows, but keys and tokens do not come again; the scripts are sent again."""
    store = connect()
    old = store.put([Entry(Record(make_envelope())) for _ in range(3)], 30.0)
    for name in redis_server.call("KEYS", f"{prefix}*"):
        redis_server.call("DEL", name)
    redis_server.call("SCRIPT", "FLUSH")
    new = store.put([Entry(Record(make_envelope())) for _ in range(3)], 30.0)
    assert store.renew(old) == old
    store.done(old)
    assert store.renew(new) == []
    assert min(each.key for each in new) > max(each.key for each in old)


# --- what is no row ----------------------------------------------------------------------------

SPOILS: dict[str, Callable[..., object]] = {
    "a missing field": lambda call, row: call("HDEL", row, "body"),
    "another checksum": lambda call, row: call("HSET", row, "body", "another"),
    "no JSON": lambda call, row: call("HSET", row, "state", "{"),
    "a wrong type in JSON": lambda call, row: call("HSET", row, "state", '{"attempts": "1"}'),
    "no number": lambda call, row: call("HSET", row, "token", "first"),
    "gone": lambda call, row: call("DEL", row),
    "no hash": lambda call, row: (call("DEL", row), call("LPUSH", row, "x")),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize("dead", [False, True])
def test_an_unreadable_row_is_put_aside_and_the_others_go_on(
    redis_server: RedisServer,
    prefix: str,
    connect: Open,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[..., object],
    dead: bool,
) -> None:
    """It is logged by key alone, counted no more, and kept to be looked at."""
    store = connect()
    entries = [Entry(Record(make_envelope(name), dead=dead), 0.0) for name in ("a", "b", "c")]
    _, bad, _ = store.put(entries, 30.0)
    spoil(redis_server.call, f"{prefix}{{store}}:row:{bad.key}")
    assert ids(store.letters(10) if dead else store.claim(10)) == ["a", "c"]
    assert [each.levelno for each in caplog.records] == [logging.ERROR]
    assert str(bad.key) in caplog.text
    quarantine = redis_server.call("SMEMBERS", f"{prefix}{{store}}:quarantine")
    assert quarantine == [str(bad.key).encode()]
    assert store.depth() == (Depth(0, 2) if dead else Depth(2, 0))


def test_a_name_that_no_row_has_is_put_aside(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """Whatever else is among the due rows holds up nothing."""
    store = connect()
    store.put(waiting("a"), 30.0)
    redis_server.call("ZADD", f"{prefix}{{store}}:due", 1, "nan")
    assert ids(store.claim(10)) == ["a"]
    assert redis_server.call("SMEMBERS", f"{prefix}{{store}}:quarantine") == [b"nan"]


@pytest.mark.parametrize("name", ["due", "ready", "dead", "ahead", "last", "quarantine"])
def test_a_foreign_key_is_a_store_error(
    redis_server: RedisServer, prefix: str, connect: Open, name: str
) -> None:
    """A key of another type under the prefix is said to be one, and left alone."""
    redis_server.call("LPUSH", f"{prefix}{{store}}:{name}", "foreign")
    with pytest.raises(StoreError, match=f"{redis_server.port} has keys of another type"):
        connect().put(waiting("a"), 30.0)
    assert redis_server.call("LRANGE", f"{prefix}{{store}}:{name}", 0, -1) == [b"foreign"]
    assert keys(redis_server, prefix) == {name}


def test_a_row_that_cannot_be_stored_is_in_no_frame(
    redis_server: RedisServer, prefix: str, connect: Open
) -> None:
    """An error's frames hold no body, of which error reporters would send a part."""
    first, second, key = connect(), connect(), f"{prefix}{{store}}:dead"
    letter = Record(make_envelope("a", body=b"canary"), dead=True)
    [claim] = first.put([Entry(Record(make_envelope("a")), None)], 1.0)
    assert second.depth().ahead == 0
    redis_server.call("LPUSH", key, "foreign")
    for refused in (
        lambda: first.release([Change(claim, letter, 0.0)]),
        lambda: second.put([Entry(letter, 0.0)], 1.0),
    ):
        with pytest.raises(StoreError) as caught:
            refused()
        tells_nothing(caught.value, "canary")
    redis_server.call("DEL", key)


# --- processes ---------------------------------------------------------------------------------

FORKING = """
import os, sys
from mlproducer.stores.redis import RedisStore
from mlproducer.stores.protocol import Entry, Record
from tests.helpers import make_envelope
from tests.pure.refusals import tells_nothing

store = RedisStore(sys.argv[1], prefix=sys.argv[2])
(claim,) = store.put([Entry(Record(make_envelope("parent")))], 30.0)
connection = store._connection._connection
child = os.fork()
if child == 0:
    store.put([Entry(Record(make_envelope("child")))], 30.0)
    assert store._connection._connection is not connection
    store.close()
    assert connection._sock.fileno() >= 0
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store.renew([claim]) == []
assert store._connection._connection is connection
rows = RedisStore(sys.argv[1], prefix=sys.argv[2]).claim(10)
assert [row.record.envelope.message_id for row in rows] == ["child"]
"""


def test_a_child_has_a_connection_and_claims_of_its_own(
    redis_server: RedisServer, prefix: str
) -> None:
    """After a fork neither touches what is the other's: connection, claims, or their end."""
    subprocess.run(
        [sys.executable, "-c", FORKING, redis_server.url, prefix], timeout=LIMIT, check=True
    )
