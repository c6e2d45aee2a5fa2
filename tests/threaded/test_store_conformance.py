"""The stores in memory, in SQLite, in PostgreSQL and in Redis do the same.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import pytest

from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Store
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.testing.postgresql_server import PostgreSQLServer
from mlproducer.testing.redis_server import RedisServer
from mlproducer.testing.store_conformance import StoreConformance
from tests.helpers import LIMIT


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class WithClock(StoreConformance):
    """Stores that take a clock: no test waits."""

    lease = 30.0

    @pytest.fixture(autouse=True)
    def _begin(self, tmp_path: Path) -> None:
        self.clock = Clock()
        self.path = tmp_path / "store.db"

    def advance(self, seconds: float) -> None:
        """Set the clock."""
        self.clock.now += seconds


class TestMemory(WithClock):
    """The store in memory, whose claims end with it."""

    leases = False
    shared = False

    def make_store(self, lease: float) -> Store:
        """Make a store with room for all that a test puts there."""
        return MemoryStore(clock=self.clock)

    def make_bounded_store(self, rows: int) -> Store:
        """Make a small one."""
        return MemoryStore(max_rows=rows, clock=self.clock)


class TestSQLite(WithClock):
    """The store in a file."""

    def make_store(self, lease: float) -> Store:
        """Open the test's file once more."""
        return SQLiteStore(self.path, lease=lease, clock=self.clock)

    def empty_place(self) -> None:
        """Remove the file, and all that lies beside it."""
        for each in self.path.parent.glob("store.db*"):
            each.unlink()

    def keep_place(self) -> None:
        """Copy the file; it is whole when it is closed."""
        shutil.copy(self.path, self.path.with_suffix(".copy"))

    def restore_place(self) -> None:
        """Put the copy in the place of file and log."""
        for suffix in ("-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink()
        copy = self.path.with_suffix(".copy")
        copy.chmod(0o600)
        copy.replace(self.path)


def give_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it answer when it can: a second is short for thousands of rows on a busy machine."""
    from mlproducer.stores.postgres import session, store  # an extra

    for module, owner in ((session, session.Session), (store, store.PostgreSQLStore)):
        for each in vars(owner).values():
            defaults = getattr(each, "__defaults__", None) or ()
            if session.TIMEOUT in defaults:
                given = tuple(LIMIT if one == session.TIMEOUT else one for one in defaults)
                monkeypatch.setattr(each, "__defaults__", given)
        monkeypatch.setattr(module, "TIMEOUT", LIMIT)


AGE = """
for _, name in ipairs({'due', 'ahead'}) do
  local times = redis.call('ZRANGE', KEYS[1] .. name, 0, -1, 'WITHSCORES')
  for i = 1, #times, 2 do
    redis.call('ZINCRBY', KEYS[1] .. name, -ARGV[1], times[i])
  end
end
"""
"""Puts all times of a Redis store's rows back by some microseconds."""


class TestRedis(StoreConformance):
    """The store in Redis, whose clock is its own: rows grow old where it would go on."""

    lease = 30.0

    @pytest.fixture(autouse=True)
    def _begin(self, redis_server: RedisServer) -> None:
        # Half a second, as is usual, is short for thousands of rows on a machine with other work.
        self.server, self.url = redis_server, f"{redis_server.url}?socket_timeout={LIMIT:.0f}"
        self.prefix = f"test-{secrets.token_hex(4)}:"

    def make_store(self, lease: float) -> Store:
        """Connect to the test's rows once more."""
        from mlproducer.stores.redis import RedisStore  # an extra

        return RedisStore(self.url, lease=lease, prefix=self.prefix)

    def advance(self, seconds: float) -> None:
        """Put the times of all rows back."""
        self.server.call("EVAL", AGE, 1, f"{self.prefix}{{store}}:", f"{seconds * 1_000_000:.0f}")

    def empty_place(self) -> None:
        """Do to our keys what FLUSHALL does to all."""
        for key in self.server.call("KEYS", f"{self.prefix}*"):
            self.server.call("DEL", key)


class TestPostgreSQL(StoreConformance):
    """The store in PostgreSQL, whose clock is its own: rows grow old where it would go on."""

    lease = 30.0

    @pytest.fixture(autouse=True)
    def _begin(self, postgresql_server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch) -> None:
        give_time(monkeypatch)
        self.server = postgresql_server
        self.table = f"test_{secrets.token_hex(4)}"
        self.url = f"{postgresql_server.url}?table={self.table}"

    def make_store(self, lease: float) -> Store:
        """Connect to the test's rows once more."""
        from mlproducer.stores.postgres import PostgreSQLStore  # an extra

        return PostgreSQLStore(self.url, lease=lease)

    def advance(self, seconds: float) -> None:
        """Put the times of all rows back."""
        self.server.call(f"UPDATE {self.table} SET due = due - interval '{seconds} seconds'")

    def empty_place(self) -> None:
        """Drop the tables."""
        self.server.call(f"DROP TABLE {self.table}, {self.table}_fates")

    def keep_place(self) -> None:
        """Copy the rows, and note how far the keys have come."""
        self.server.call(f"CREATE TABLE {self.table}_copy AS SELECT * FROM {self.table}")
        self.kept = self.server.call(f"SELECT last_value FROM {self.table}_key_seq")[0][0]

    def restore_place(self) -> None:
        """Put the copy back; as after any restore, all sessions are new ones."""
        self.server.end_sessions()
        self.server.call(f"DELETE FROM {self.table}")
        self.server.call(f"INSERT INTO {self.table} SELECT * FROM {self.table}_copy")
        self.server.call(f"SELECT setval('{self.table}_key_seq', {self.kept})")
