"""Where Redis is, and what it is allowed to do: Unix sockets, Sentinels, users, eviction.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Depth, Entry, Record
from mlproducer.stores.redis import RedisStore, dial, scripts
from mlproducer.testing.redis_server import SERVICE, RedisServer
from tests.helpers import make_envelope

LIMIT = 120.0
PASSWORD = "pass,word@:/;%"
WRITTEN = "pass%2Cword%40%3A%2F%3B%25"

never = threading.Event()


def entries(*names: str) -> list[Entry]:
    """Return messages that are due at once."""
    return [Entry(Record(make_envelope(each)), 0.0) for each in names]


def ids(store: RedisStore) -> list[str]:
    """Claim all, and return the ids."""
    return [row.record.envelope.message_id for row in store.claim(100)]


# --- where it is -------------------------------------------------------------------------------


def test_a_unix_socket(tmp_path: Path) -> None:
    """All is as over TCP, with user, password and database; a socket that is gone is named."""
    socket = tmp_path / "redis.sock"
    config = {"unixsocket": str(socket), "port": "0", "unixsocketperm": "700"}
    server = RedisServer(password="simple", config=config)
    server.launch()
    try:
        url = f"unix://:simple@{socket}?db=3&client_name=here"
        with closing(RedisStore(url)) as store:
            eventually(lambda: store.put(entries("a"), 1.0))
            assert ids(store) == ["a"]
        server.kill()
        with pytest.raises(StoreError, match=re.escape(str(socket))):
            store.depth()
    finally:
        server.close()


def eventually(call: object) -> None:
    """Call until it works."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            call()  # type: ignore[operator] # any function
        except StoreError:
            assert time.monotonic() < deadline
            never.wait(0.05)
        else:
            return


def test_a_failover_by_sentinel() -> None:
    """The master dies: the next calls fail, and then those go through to the one promoted."""
    master = RedisServer(password=PASSWORD, config={"repl-diskless-sync": "yes"})
    master.config["masterauth"] = f'"{PASSWORD}"'
    with master:
        config = {"replicaof": f"{master.host} {master.port}", "masterauth": f'"{PASSWORD}"'}
        with RedisServer(password=PASSWORD, config=config) as replica:
            wait_until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
            with RedisServer(watches=master) as sentinel:
                wait_until(lambda: b"slaves=1" in sentinel.call("INFO", "sentinel"))
                silent = RedisServer()
                nodes = f"127.0.0.1:{silent.port},127.0.0.1:{sentinel.port}"
                url = f"redis+sentinel://:{WRITTEN}@{nodes}/{SERVICE}/0?socket_timeout=0.5"
                with closing(RedisStore(url)) as store:
                    assert store.name == f"{nodes}/{SERVICE}"
                    store.put(entries("before"), 1.0)
                    wait_until(lambda: replica.call("DBSIZE") == master.call("DBSIZE"))
                    master.kill()
                    with pytest.raises(StoreError, match=re.escape(nodes)) as caught:
                        store.depth()
                    assert PASSWORD not in str(caught.value)
                    eventually(lambda: store.put(entries("after"), 1.0))
                    assert ids(store) == ["before", "after"]
                    assert b"role:master" in replica.call("INFO", "replication")


def test_a_sentinel_that_knows_no_such_service() -> None:
    """It is told by name, and nothing is guessed."""
    with RedisServer() as master, RedisServer(watches=master) as sentinel:
        store = RedisStore(f"redis+sentinel://127.0.0.1:{sentinel.port}/other")
        with pytest.raises(StoreError, match=f"127.0.0.1:{sentinel.port}/other cannot be reached"):
            store.depth()


def wait_until(condition: object) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():  # type: ignore[operator] # any function
        assert time.monotonic() < deadline
        never.wait(0.05)


# --- what it may do ----------------------------------------------------------------------------

_CALL = re.compile(r"(?:call|pcall)\('([A-Z]+)'|many\('([A-Z]+)'")
NEEDED = sorted(
    {
        name
        for script in vars(scripts).values()
        if isinstance(script, str)
        for pair in _CALL.findall(script)
        for name in pair
        if name
    }
    - {"TIME", "TYPE"}
)
"""All that the scripts do; the two that are left out are done at each opening."""


def test_every_command_of_the_scripts_is_known() -> None:
    """The list is not empty, or the next test would say nothing."""
    assert {"UNLINK", "HSET", "ZADD", "ZREMRANGEBYRANK"} <= set(NEEDED)


@pytest.mark.parametrize("command", NEEDED)
def test_a_command_that_a_user_may_not_use_is_found_at_opening(
    redis_server: RedisServer, command: str
) -> None:
    """Nothing is stored that could not be deleted; the error names the command."""
    name, prefix = f"u{secrets.token_hex(4)}", f"test-{secrets.token_hex(4)}:"
    rights = ["+@all", f"-{command.lower()}", f"~{prefix}*"]
    redis_server.call("ACL", "SETUSER", name, "on", ">pw", *rights)
    url = f"redis://{name}:pw@{redis_server.host}:{redis_server.port}"
    with closing(RedisStore(url, prefix=prefix)) as store:
        with pytest.raises(StoreError, match=f"what the store needs: {command}"):
            store.put(entries("a"), 1.0)
        assert redis_server.call("KEYS", f"{prefix}*") == []
        redis_server.call("ACL", "SETUSER", name, f"+{command.lower()}")
        store.put(entries("a"), 1.0)
        assert ids(store) == ["a"]


def test_a_user_of_other_keys_is_refused_at_opening(redis_server: RedisServer) -> None:
    """The prefix is not this user's."""
    name = f"u{secrets.token_hex(4)}"
    redis_server.call("ACL", "SETUSER", name, "on", ">pw", "+@all", "~other:*")
    url = f"redis://{name}:pw@{redis_server.host}:{redis_server.port}"
    with pytest.raises(StoreError, match="does not permit this user what the store needs"):
        RedisStore(url).depth()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_an_evicting_policy_is_told_once(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    """Redis would throw rows away; that is said at the first connection."""
    with RedisServer(config={"maxmemory-policy": policy}) as server:
        for _ in range(2):
            with closing(RedisStore(server.url)) as store:
                store.put(entries("a"), 1.0)
        (told,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
        assert f"127.0.0.1:{server.port} has maxmemory-policy {policy}" in told
        dial._warned.discard(f"127.0.0.1:{server.port}")


def test_who_may_not_ask_for_the_policy_is_not_refused(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is a help, and no condition."""
    name, prefix = f"u{secrets.token_hex(4)}", f"test-{secrets.token_hex(4)}:"
    redis_server.call("ACL", "SETUSER", name, "on", ">pw", "+@all", "-info", "~*")
    url = f"redis://{name}:pw@{redis_server.host}:{redis_server.port}"
    dial._warned.discard(f"{redis_server.host}:{redis_server.port}")
    with closing(RedisStore(url, prefix=prefix)) as store:
        store.put(entries("a"), 1.0)
        assert store.depth() == Depth(waiting=1)
    assert caplog.records == []


# --- what lies in it ---------------------------------------------------------------------------

STATE = b'{"attempts": %b, "dead": false, "reason": "", "first_failed_at": %b}'


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state", STATE % (b"-1", b"0.0")),
        ("state", STATE % (b"2147483648", b"0.0")),
        ("state", STATE % (b"1", b"-5.0")),
        ("state", STATE % (b"1", b"1e300")),
        ("accepted", b"-1"),
        ("accepted", b"9" * 30),
        ("accepted", b"soon"),
        ("token", b"9" * 30),
        ("doubtful", b"maybe"),
    ],
)
def test_a_number_out_of_range_is_put_aside(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, field: str, value: bytes
) -> None:
    """The row is in quarantine, and the others go on."""
    prefix = f"test-{secrets.token_hex(4)}:"
    with closing(RedisStore(redis_server.url, prefix=prefix)) as store:
        bad, _ = store.put(entries("bad", "good"), 1.0)
        redis_server.call("HSET", f"{prefix}{{store}}:row:{bad.key}", field, value)
        assert ids(store) == ["good"]
        assert store.depth() == Depth(waiting=1)
        kept = redis_server.call("SMEMBERS", f"{prefix}{{store}}:quarantine")
        assert kept == [str(bad.key).encode()]
    assert "unreadable" in caplog.text
