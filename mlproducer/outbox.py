"""A transactional outbox: a task as a row in the application's own database and transaction.

If the process ends between COMMIT and `publish()`, a task is lost. `add` closes this gap: it writes
the task into the store's table together with the business rows, and COMMIT decides about both.
After COMMIT the row is a stored message like any other: a producer on that store, in this process
or another, or ``mlproducer relay``, sends it until it is confirmed or dead-lettered.

For development it works in SQLite too. There the store has a file of its own, and no transaction
spans two files. So the row waits in a table of the application's file, from which `Mover`, in
``mlproducer relay --outbox FILE``, moves it to the store: it is stored first, and then deleted.

Runs on: the application's threads.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._foreign_calls import write
from mlproducer._store_url import NAME, TABLE, check_table, read_postgresql
from mlproducer._wire.encode import Task
from mlproducer.errors import ConfigurationError, frameless
from mlproducer.message import Envelope, Fate, Receipt
from mlproducer.producer import MLProducer, Retry, made
from mlproducer.settings import RetryPolicy, Settings
from mlproducer.stores.postgres import rows, sql
from mlproducer.stores.protocol import Claim, Entry, Store, policy_text

__all__ = ["add", "schema"]

logger = logging.getLogger(__name__)

Execute = Callable[[str, Mapping[str, Any]], Any]
"""Runs a statement with parameters ``:name``, and returns its value, if it has one."""

POSTGRESQL, SQLITE = "postgresql", "sqlite"


@frameless
def add(
    connection: Any, task: Task, *, retry: Retry = True, producer: MLProducer | None = None
) -> Receipt:
    """Write a task into the store's table, in the current transaction of ``connection``.

    What `publish()` would refuse is refused here, before anything is written. After COMMIT the
    message is delivered or dead-lettered, even if this process ends at once; after ROLLBACK, also
    to a savepoint, nothing is sent.

    :param connection: a Django connection, a SQLAlchemy ``Session`` or ``Connection``, or a
        psycopg 3 ``Connection``, to the database that the store's URL names; or, for development,
        to SQLite through Django or SQLAlchemy
    :param retry: if false, the message is dead-lettered after the first attempt that fails
    :param producer: its settings and hooks apply, and it resolves the receipt; ``None`` is the
        producer of this process whose store is of that kind, or, without one, a producer with the
        settings of the environment
    :returns: a receipt, DEFERRED and durable, whose `result()` returns after COMMIT as long as that
        producer runs in this process
    :raises InvalidMessageError: the task cannot be sent
    :raises ConfigurationError: there is no transaction (autocommit), the connection is of an
        unknown kind, or no producer has a store in PostgreSQL
    """
    started = time.monotonic()
    kind, execute = _executor(connection)
    execute = _discreet(execute)
    chosen = producer or _chosen(kind)
    table = _table(chosen) if kind == POSTGRESQL else ""
    envelope, policy = chosen.prepare(task, retry=retry)
    token, values = _row(envelope, policy, followed=chosen.running)
    if table:
        key = execute(_insert(table), {**values, "token": token})
        claim = Claim(key, token)
    else:
        execute(_SQLITE_TABLE, {})
        execute(_SQLITE_INSERT, {each: values[each] for each in _KEPT})
        claim = None
    return _receipt(chosen, envelope, policy, claim, started)


def schema(table: str = TABLE) -> str:
    """Return the SQL that creates the table, for a migration; it may be run again.

    :raises ConfigurationError: the table's name would need quotes
    """
    return sql.schema(check_table(table))


# --- the producer --------------------------------------------------------------------------------


def _chosen(kind: str) -> MLProducer:
    """Return the producer of this process whose store is in that kind of database."""
    known = [each for each in list(made) if not each.closed]
    fitting = [each for each in known if each.settings.store_url.startswith(f"{kind}:")]
    places = {each.settings.store_url for each in fitting}
    if len(places) > 1:
        raise ConfigurationError(
            f"several producers have a {kind} store: name one, outbox.add(..., producer=...)"
        )
    running = [each for each in fitting if each.running]
    return (running or fitting or [_of_environment()])[0]


@lru_cache(1)
def _of_environment() -> MLProducer:
    return MLProducer(Settings.from_env())


def _table(producer: MLProducer) -> str:
    return _table_of(producer.settings.store_url)


@lru_cache
def _table_of(store_url: str) -> str:
    if not store_url.startswith(f"{POSTGRESQL}:"):
        raise ConfigurationError(f"{NAME} must be postgresql://..., the database of the outbox")
    return read_postgresql(store_url).table


# --- the row -------------------------------------------------------------------------------------

_VALUES = ("token", "origin", "accepted_at", "retry", *sql.COLUMNS)


@lru_cache
def _insert(table: str) -> str:
    """Return the statement that writes a row; the table's trigger sends a NOTIFY at COMMIT."""
    return (
        f"INSERT INTO {table} ({', '.join(_VALUES)})"  # noqa: S608 - checked names
        f" VALUES ({', '.join(f':{each}' for each in _VALUES)})"
        f" RETURNING {sql.key_for_the_next(table)}"
    )


def _row(
    envelope: Envelope, policy: RetryPolicy | None, *, followed: bool
) -> tuple[int, dict[str, Any]]:
    message = dict(zip(sql.COLUMNS, rows.message_values(envelope), strict=True))
    accepted = rows.microseconds(max(0.0, datetime.now(timezone.utc).timestamp()))
    token = (1 << 51) + 2 * secrets.randbits(50)
    # A row with an origin leaves its fate behind, which costs a write: only if a producer asks.
    origin = 1 + secrets.randbits(62) if followed else 0
    known = {"origin": origin, "accepted_at": accepted}
    return token, {**message, **known, "retry": policy_text(policy)}


def _receipt(
    producer: MLProducer,
    envelope: Envelope,
    policy: RetryPolicy | None,
    claim: Claim | None,
    started: float,
) -> Receipt:
    """Return a receipt that the producer resolves, if it runs."""
    fate = Fate()
    unloaded = envelope.unloaded()  # what is left out is in the row
    delivery = Delivery.stored(unloaded, started=started, policy=policy, fate=fate)
    fate.set_running_or_notify_cancel()
    fate.delivery = delivery
    if claim is not None:
        producer.follow(delivery, claim)
    elapsed = time.monotonic() - started
    return Receipt(envelope.message_id, 0, elapsed, durable=True, fate=fate)


# --- SQLite, for development ---------------------------------------------------------------------

SQLITE_TABLE = "mlproducer_outbox"
_KEPT = ("accepted_at", "retry", *sql.COLUMNS)
_SQLITE_TABLE = (
    f"CREATE TABLE IF NOT EXISTS {SQLITE_TABLE} (key INTEGER PRIMARY KEY AUTOINCREMENT,"
    f" {', '.join(f'{each} NOT NULL' for each in _KEPT)})"
)
_SQLITE_INSERT = (
    f"INSERT INTO {SQLITE_TABLE} ({', '.join(_KEPT)})"  # noqa: S608 - constants
    f" VALUES ({', '.join(f':{each}' for each in _KEPT)})"
)
_SQLITE_SELECT = (
    f"SELECT key, 0, 1, 0, 0, '', retry, 0, accepted_at, {', '.join(sql.COLUMNS)}"  # noqa: S608
    f" FROM {SQLITE_TABLE} ORDER BY key LIMIT 100"
)
_SQLITE_DELETE = f"DELETE FROM {SQLITE_TABLE} WHERE key <= ?"  # noqa: S608
QUARANTINE = f"{SQLITE_TABLE}_quarantine"
_SQLITE_QUARANTINE = (
    f"CREATE TABLE IF NOT EXISTS {QUARANTINE} AS SELECT * FROM {SQLITE_TABLE} WHERE 0"  # noqa: S608
)
_SQLITE_ONE = f"SELECT * FROM {SQLITE_TABLE} WHERE key = ?"  # noqa: S608
BUSY = 5.0
"""Seconds to wait for other users of the application's file."""
PATIENCE = 1.0
"""Seconds to wait for the store, while the application cannot write."""


class Mover:
    """Moves committed rows from an application's SQLite file to a store.

    A row is deleted once it is stored. If the process ends in between, the row is stored again, and
    the message is sent twice, with the same id. Of several processes one moves rows at a time. A
    row that cannot be read is logged, and moved to the table ``mlproducer_outbox_quarantine``.

    :param path: the application's file
    :param store: a durable store
    """

    def __init__(self, path: str, store: Store) -> None:
        self._path = path
        self._store = store
        self._stored: frozenset[Any] = frozenset()

    def move(self) -> int:
        """Move the oldest of what is committed, in its order, and give how many rows that were.

        :returns: 0 where there are none, or another process is moving them
        :raises StoreError: the store takes nothing, or the file cannot be read
        """
        from mlproducer.stores.sqlite.outbox import alone, opened  # noqa: PLC0415 - for development

        with opened(self._path, BUSY) as connection, alone(self._path) as undisturbed:
            known = "SELECT count(*) FROM sqlite_master WHERE name = ?"
            if not undisturbed or not connection.execute(known, (SQLITE_TABLE,)).fetchone()[0]:
                return 0
            if not connection.execute(_SQLITE_SELECT).fetchall():
                return 0
            # What may keep rows from being deleted comes before they are stored, such as a long
            # transaction of the application, a full disk, or a file that may only be read: else
            # they would be stored again by each call. Where COMMIT fails, they are remembered.
            connection.execute("BEGIN EXCLUSIVE")
            found = connection.execute(_SQLITE_SELECT).fetchall()
            entries, damaged = self._read(found)
            self._put_aside(connection, damaged)
            connection.execute(_SQLITE_DELETE, (found[-1][0] if found else 0,))
            if entries:
                self._store.put(entries, PATIENCE)
            self._stored = frozenset(each for each in found if each[0] not in damaged)
            connection.execute("COMMIT")
            self._stored = frozenset()
        for key in damaged:
            text = "row %d of the outbox in %s is damaged; it is now in the table %s"
            write(logger, logging.ERROR, text, key, self._path, QUARANTINE)
        return len(found)

    def _read(self, found: Sequence[Sequence[Any]]) -> tuple[list[Entry], list[int]]:
        """Return what is to be stored, and the keys of the rows that cannot be read."""
        entries, damaged = [], []
        for each in found:
            if each in self._stored:
                continue
            try:
                entries.append(Entry(rows.read_row(each).record, 0.0))
            except rows.UnreadableRowError as error:
                damaged.append(error.claim.key)
        return entries, damaged

    def _put_aside(self, connection: Any, keys: Sequence[int]) -> None:
        if keys:
            connection.execute(_SQLITE_QUARANTINE)
        for key in keys:
            connection.execute(f"INSERT INTO {QUARANTINE} {_SQLITE_ONE}", (key,))


# --- connections ---------------------------------------------------------------------------------


def _executor(connection: Any) -> tuple[str, Execute]:
    """Return the kind of database, and a function that runs statements in the transaction.

    :raises ConfigurationError: there is no transaction, or the connection is of an unknown kind
    """
    if _is_a(connection, "psycopg", "Connection"):
        return POSTGRESQL, _psycopg(connection)
    if _is_a(connection, "sqlalchemy.orm", "Session", "scoped_session"):
        connection = connection.connection()
    if _is_a(connection, "sqlalchemy.engine", "Connection"):
        return _known(connection.dialect.name), _sqlalchemy(connection)
    if hasattr(connection, "in_atomic_block") and hasattr(connection, "vendor"):
        return _known(connection.vendor), _django(connection)
    raise ConfigurationError(
        f"connection is {type(connection).__name__}; accepted are a Django connection, a "
        "SQLAlchemy Session or Connection (of an AsyncSession: await "
        "session.run_sync(outbox.add, task)), and a psycopg 3 Connection"
    )


def _is_a(connection: Any, module: str, *names: str) -> bool:
    """Whether it is an object of a library's classes, for which that has been imported already."""
    library = sys.modules.get(module)
    return isinstance(connection, tuple(getattr(library, name) for name in names if library))


_AUTOCOMMIT = (
    "outbox.add needs a transaction, and this connection is in autocommit mode: begin a "
    "transaction first, so that the row is written together with the rows that it belongs to"
)


def _refuse_autocommit(driver: Any) -> None:
    """Refuse a driver's connection that is in autocommit mode and not in a transaction."""
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    alone = getattr(driver, "autocommit", False) is True
    if hasattr(driver, "in_transaction"):  # the standard library's sqlite3
        alone, status = alone or driver.isolation_level is None, driver.in_transaction
    if alone and not status:
        raise ConfigurationError(_AUTOCOMMIT)


_ACTIVE = 1
"""libpq's status of a connection with a statement under way."""


def _psycopg(connection: Any) -> Execute:
    from psycopg import Cursor  # noqa: PLC0415 - an extra
    from psycopg.rows import tuple_row  # noqa: PLC0415 - an extra

    if connection.autocommit and connection.info.transaction_status == _ACTIVE:
        # In a pipeline it is known only after an answer whether there is a transaction.
        Cursor(connection).execute("SELECT 1").fetchone()
    _refuse_autocommit(connection)

    def execute(statement: str, values: Mapping[str, Any]) -> Any:
        # Not the connection's own kind of cursor, which may give other rows, or name no parameters.
        with Cursor(connection, row_factory=tuple_row) as cursor:
            (value,) = cursor.execute(_pyformat(statement), values).fetchone() or ()
        return value

    return execute


def _sqlalchemy(connection: Any) -> Execute:
    from sqlalchemy import text  # noqa: PLC0415 - the application's

    def execute(statement: str, values: Mapping[str, Any]) -> Any:
        _refuse_autocommit(connection.connection.dbapi_connection)
        result = connection.execute(text(statement), values)
        return result.scalar_one() if result.returns_rows else None

    return execute


def _django(connection: Any) -> Execute:
    if not connection.in_atomic_block and connection.get_autocommit():
        raise ConfigurationError(_AUTOCOMMIT)

    def execute(statement: str, values: Mapping[str, Any]) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(_pyformat(statement), values or None)
            return cursor.fetchone()[0] if cursor.description else None

    return execute


def _discreet(execute: Execute) -> Execute:
    """Have errors of the database not show what the message says.

    PostgreSQL quotes the row that a constraint refuses, and SQLAlchemy the parameters.
    """

    def run(statement: str, values: Mapping[str, Any]) -> Any:
        try:
            return execute(statement, values)
        except Exception as error:
            if hasattr(error, "hide_parameters"):
                error.hide_parameters = True
            causes = [each for each in (error, error.__cause__) if each is not None]
            details = [getattr(each, "diag", None) for each in causes]
            for detail in filter(None, (getattr(each, "message_detail", None) for each in details)):
                for each in causes:
                    each.args = tuple(
                        part.replace(detail, "(not shown)") if isinstance(part, str) else part
                        for part in each.args
                    )
            raise

    return run


def _known(kind: str) -> str:
    if kind not in (POSTGRESQL, SQLITE):
        raise ConfigurationError(
            "an outbox needs PostgreSQL, or for development SQLite; this connection is to another "
            "kind of database"
        )
    return kind


@lru_cache
def _pyformat(statement: str) -> str:
    """Return a statement with its parameters in psycopg's format."""
    for each in _VALUES:
        statement = statement.replace(f":{each},", f"%({each})s,").replace(
            f":{each})", f"%({each})s)"
        )
    return statement
