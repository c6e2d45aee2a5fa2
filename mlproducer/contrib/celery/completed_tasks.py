"""The notes of which tasks have been completed: in Redis, or in an SQLite file of one machine.

Runs on: the threads that run tasks; each has a connection of its own.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mlproducer import _clock as time
from mlproducer import _store_url as store_url
from mlproducer._store_url import PostgreSQLAddress, RedisAddress
from mlproducer.errors import ConfigurationError

NAME = "deduplicate()'s url"

PATIENCE = 1.0
"""Seconds for which an SQLite file may be locked by another process."""

PREFIX = "mlproducer:completed:"

SWEEP = 1000
"""Notes after which a process deletes expired ones from an SQLite file."""


class CompletedTasks(Protocol):
    """A set of names, each of which is forgotten after a while.

    :ivar name: the host or path, for logs
    :ivar errors: what is raised if the notes cannot be reached
    """

    name: str
    errors: tuple[type[Exception], ...]

    def has(self, key: str) -> bool:
        """Whether it is noted."""

    def add(self, key: str, ttl: float) -> None:
        """Note it for so many seconds."""


def completed_tasks_at(url: str) -> CompletedTasks:
    """Return the notes at a URL; nothing is opened yet.

    :raises ConfigurationError: the URL is for no kind of notes; it is not quoted
    """
    store_url.check(url, NAME)
    scheme = url.partition("://")[0]
    if scheme == "sqlite":
        return SQLiteCompletedTasks(store_url.read_local(url).path)
    if scheme == "postgresql":
        return PostgreSQLCompletedTasks(store_url.read_postgresql(url))
    if scheme == "memory":
        raise ConfigurationError(f"{NAME} must be redis://, postgresql:// or sqlite:///")
    return RedisCompletedTasks(store_url.read_redis(url))


class _Own(threading.local):
    """A thread's connection, and the process that opened it."""

    pid = 0
    connection: Any = None


class _OnServer:
    """A connection of each thread to a server, which is made again where it has ended."""

    errors: tuple[type[Exception], ...]

    def __init__(self) -> None:
        self._own = _Own()

    def _ask(self, *command: Any) -> Any:
        own = self._own
        if own.pid != os.getpid():
            own.pid, own.connection = os.getpid(), None
        reused = own.connection is not None
        try:
            return self._exchange(own, command)
        except self.errors:
            if not reused:
                raise
        return self._exchange(own, command)  # the idle connection had been closed

    def _exchange(self, own: _Own, command: tuple[Any, ...]) -> Any:
        raise NotImplementedError


class RedisCompletedTasks(_OnServer):
    """Notes in Redis, one key each, which Redis forgets by itself."""

    def __init__(self, address: RedisAddress) -> None:
        from mlproducer.stores.redis import dial  # noqa: PLC0415 - it needs the package redis

        self._dial = dial
        self._address = address
        super().__init__()
        self._prefix = PREFIX if address.prefix is None else f"{address.prefix}:completed:"
        self.name = address.name
        self.errors: tuple[type[Exception], ...] = (dial.exceptions.RedisError, OSError)

    def has(self, key: str) -> bool:
        """Whether it is noted."""
        return bool(self._ask("EXISTS", self._prefix + key))

    def add(self, key: str, ttl: float) -> None:
        """Note it for so many seconds."""
        self._ask("SET", self._prefix + key, "1", "PX", str(max(1, round(ttl * 1000))))

    def _exchange(self, own: _Own, command: tuple[Any, ...]) -> Any:
        if own.connection is None:
            own.connection = self._dial.connect(self._address, None)
        try:
            own.connection.send_command(*command)
            return own.connection.read_response()
        except BaseException:
            connection, own.connection = own.connection, None
            with suppress(Exception):
                connection.disconnect()
            raise


class _Closing:
    """Closes a connection with the end of its thread; not in a forked child, where it is shared."""

    def __init__(self, it: Any) -> None:
        self.it = it
        # Not ``__del__``: where this is garbage in a cycle, the connection's may be called first,
        # and warns.
        weakref.finalize(self, _close, it, os.getpid())


def _close(connection: Any, pid: int) -> None:
    if pid == os.getpid():
        connection.close()


class PostgreSQLCompletedTasks(_OnServer):
    """Notes in a table, which is made with the first one."""

    def __init__(self, address: PostgreSQLAddress) -> None:
        from mlproducer.stores.postgres import session  # noqa: PLC0415 - it needs psycopg

        super().__init__()
        self._dial = session.dial
        self._address = address
        self._table = f"{address.table}_completed"
        self._since_sweep = 0
        self.name = address.name
        self.errors: tuple[type[Exception], ...] = session.FOREIGN

    def has(self, key: str) -> bool:
        """Whether it is noted."""
        text = f"SELECT 1 FROM {self._table} WHERE key = %s AND until > clock_timestamp()"  # noqa: S608 - its name was checked
        return bool(self._ask(text, (key,)))

    def add(self, key: str, ttl: float) -> None:
        """Note it for so many seconds."""
        text = (
            f"INSERT INTO {self._table} VALUES (%s, clock_timestamp() + %s * interval '1 second')"  # noqa: S608
            " ON CONFLICT (key) DO UPDATE SET until = EXCLUDED.until"
        )
        self._ask(text, (key, ttl))
        self._since_sweep += 1
        if self._since_sweep >= SWEEP:
            self._since_sweep = 0
            self._ask(f"DELETE FROM {self._table} WHERE until <= clock_timestamp()", ())  # noqa: S608

    def _exchange(self, own: _Own, command: tuple[Any, ...]) -> Any:
        try:
            if own.connection is None:
                own.connection = _Closing(self._dial(self._address, name="mlproducer"))
                self._make_table(own.connection.it)
            return self._execute(own.connection.it, *command)
        except BaseException:
            own.connection = None
            raise

    def _make_table(self, connection: Any) -> None:
        """Create the table if it is not there; a role that may not create one can use it."""
        if self._execute(connection, "SELECT to_regclass(%s)", (self._table,)) != [(None,)]:
            return
        lock = f"SELECT pg_advisory_xact_lock(hashtext('{self._table}'));"
        create = (
            f"CREATE TABLE IF NOT EXISTS {self._table}"
            " (key text PRIMARY KEY, until timestamptz NOT NULL)"
        )
        self._execute(connection, lock + create, None)  # without values, it is one transaction

    @staticmethod
    def _execute(connection: Any, text: str, values: tuple[Any, ...] | None) -> list[Any]:
        connection.deadline = time.monotonic() + PATIENCE
        with connection.cursor() as cursor:
            cursor.execute(text, values)
            return cursor.fetchall() if cursor.description else []


class _Connection(sqlite3.Connection):
    """Closes itself where it is dropped: from 3.13 on Python warns of one that was left open."""

    def __del__(self) -> None:
        with suppress(sqlite3.Error):  # it was never opened
            self.close()


class SQLiteCompletedTasks:
    """Notes in an SQLite file, which the workers of one machine share."""

    def __init__(self, path: str) -> None:
        self._path = str(Path(path).absolute())
        self._own = _Own()
        self._since_sweep = 0
        self.name = self._path
        self.errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def has(self, key: str) -> bool:
        """Whether it is noted."""
        found = self._connection().execute(
            "SELECT 1 FROM completed WHERE key = ? AND until > julianday('now')", (key,)
        )
        return found.fetchone() is not None

    def add(self, key: str, ttl: float) -> None:
        """Note it for so many seconds."""
        connection = self._connection()
        connection.execute(
            "INSERT OR REPLACE INTO completed VALUES (?, julianday('now') + ?)", (key, ttl / 86400)
        )
        self._since_sweep += 1
        if self._since_sweep >= SWEEP:
            self._since_sweep = 0
            connection.execute("DELETE FROM completed WHERE until <= julianday('now')")

    def _connection(self) -> sqlite3.Connection:
        own = self._own
        if own.pid != os.getpid():
            own.pid, own.connection = os.getpid(), self._open()
        opened: sqlite3.Connection = own.connection
        return opened

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=PATIENCE,
            isolation_level=None,
            check_same_thread=False,  # the thread that drops it closes it
            factory=_Connection,
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS completed (key TEXT PRIMARY KEY, until REAL NOT NULL)"
                " WITHOUT ROWID"
            )
        except BaseException:
            connection.close()
            raise
        return connection
