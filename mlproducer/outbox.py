"""An outbox: a task as a row of the application's own database, in the application's transaction.

Between COMMIT and `publish()` a task is lost when the process ends. `add` leaves no such moment: it
writes the task into the store's table with the business rows, and COMMIT decides about both. From
COMMIT on the row is a stored message like any other: a producer on that store, in this process or
another, or ``mlproducer relay``, sends it until it is confirmed or dead-lettered.

Runs on: the application's threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from attrs import evolve

from mlproducer import clock as time
from mlproducer.core.delivery import NOBODY, Delivery, Place
from mlproducer.errors import ConfigurationError, frameless
from mlproducer.fate import Fate
from mlproducer.message import Envelope, Receipt
from mlproducer.producer import MLProducer, Retry, made
from mlproducer.settings import RetryPolicy, Settings
from mlproducer.store_url import NAME, TABLE, check_table, read_postgresql
from mlproducer.stores import postgres_rows as rows
from mlproducer.stores import postgres_sql as sql
from mlproducer.stores.protocol import Claim, policy_text
from mlproducer.wire.encode import Task

__all__ = ["add", "schema"]

Execute = Callable[[str, Mapping[str, Any]], int]
"""Carries out a statement with named parameters, ``:name``, and gives the key that it returns."""


@frameless
def add(
    connection: Any, task: Task, *, retry: Retry = True, producer: MLProducer | None = None
) -> Receipt:
    """Write a task into the store's table, in the transaction that ``connection`` is in.

    What `publish()` would refuse is refused here, before anything is written. After COMMIT the
    message is delivered or dead-lettered, also where this process ends at once; after ROLLBACK, of
    a savepoint too, it never was.

    :param connection: a Django connection, a SQLAlchemy ``Session`` or ``Connection``, or a
        psycopg 3 ``Connection``, to the database that the store's URL names
    :param retry: false: it is dead-lettered after the first attempt that fails
    :param producer: whose settings and hooks apply, and which learns the message's fate; ``None``
        is the one producer of this process whose store is in PostgreSQL, or, where there is none,
        what the environment says
    :returns: a receipt, DEFERRED and durable, whose `result()` gives the fate after COMMIT as long
        as that producer runs in this process
    :raises InvalidMessageError: it cannot be sent
    :raises ConfigurationError: there is no transaction (autocommit), the connection is of no kind
        that is known, or no producer has a store in PostgreSQL
    """
    started = time.monotonic()
    execute = _executor(connection)
    chosen = producer or _chosen()
    table = _table(chosen)
    envelope, policy = chosen.prepare(task, retry=retry)
    token, values = _row(envelope, policy, followed=chosen.running)
    key = execute(_insert(table), {**values, "token": token, "channel": sql.channel(table)})
    return _receipt(chosen, envelope, policy, Claim(key, token), started)


def schema(table: str = TABLE) -> str:
    """Give the SQL that makes the table, for a migration; it may be run again.

    :raises ConfigurationError: the table's name would need quotes
    """
    return sql.schema(check_table(table))


# --- whose settings ------------------------------------------------------------------------------


def _chosen() -> MLProducer:
    """Give the producer of this process that has its store in PostgreSQL."""
    fitting = [each for each in list(made) if _fits(each) and not each.closed]
    places = {each.settings.store_url for each in fitting}
    if len(places) > 1:
        raise ConfigurationError(
            "several producers have a store in PostgreSQL: outbox.add(..., producer=...) names one"
        )
    running = [each for each in fitting if each.running]
    return (running or fitting or [_of_environment()])[0]


def _fits(producer: MLProducer) -> bool:
    return producer.settings.store_url.startswith("postgresql:")


@lru_cache(1)
def _of_environment() -> MLProducer:
    return MLProducer(Settings.from_env())


def _table(producer: MLProducer) -> str:
    if not _fits(producer):
        raise ConfigurationError(
            f"{NAME} must be postgresql://..., the database in which the outbox is"
        )
    return read_postgresql(producer.settings.store_url).table


# --- the row -------------------------------------------------------------------------------------

_VALUES = ("token", "origin", "accepted_at", "retry", *sql.COLUMNS)


@lru_cache
def _insert(table: str) -> str:
    """Give the statement that writes a row, and has it told at COMMIT."""
    return (
        f"WITH added AS (INSERT INTO {table} ({', '.join(_VALUES)})"  # noqa: S608 - checked names
        f" VALUES ({', '.join(f':{each}' for each in _VALUES)}) RETURNING key)"
        " SELECT key, pg_notify(:channel, '') FROM added"
    )


def _row(
    envelope: Envelope, policy: RetryPolicy | None, *, followed: bool
) -> tuple[int, dict[str, Any]]:
    message = dict(zip(sql.COLUMNS, rows.message_values(envelope), strict=True))
    accepted = rows.microseconds(datetime.now(timezone.utc).timestamp())
    token = (1 << 51) + 2 * secrets.randbits(50)
    # A row with an origin leaves its fate behind, which costs a write: only where one asks for it.
    origin = 1 + secrets.randbits(62) if followed else 0
    known = {"origin": origin, "accepted_at": accepted}
    return token, {**message, **known, "retry": policy_text(policy)}


def _receipt(
    producer: MLProducer,
    envelope: Envelope,
    policy: RetryPolicy | None,
    claim: Claim,
    started: float,
) -> Receipt:
    """Give a receipt whose fate the producer learns, if it runs."""
    left = evolve(envelope, properties=b"", body=b"")  # the row has them
    delivery = Delivery(left, NOBODY, started=started, deadline=started, answer_deferral=False)
    delivery.place, delivery.policy = Place.STORED, policy
    delivery.stored = delivery.kept = True
    delivery.fate = fate = Fate()
    fate.set_running_or_notify_cancel()
    fate.delivery = delivery
    producer.follow(delivery, claim)
    elapsed = time.monotonic() - started
    return Receipt(envelope.message_id, 0, elapsed, durable=True, fate=fate)


# --- connections ---------------------------------------------------------------------------------


def _executor(connection: Any) -> Execute:
    """Give what carries out a statement in the connection's transaction.

    :raises ConfigurationError: it is in none, or of no kind that is known
    """
    kinds = {f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in _kinds(connection)}
    if "psycopg.Connection" in kinds:
        return _psycopg(connection)
    if kinds & {"sqlalchemy.Session", "sqlalchemy.scoped_session"}:
        return _sqlalchemy(connection.connection())
    if "sqlalchemy.Connection" in kinds:
        return _sqlalchemy(connection)
    if hasattr(connection, "in_atomic_block") and hasattr(connection, "vendor"):
        return _django(connection)
    raise ConfigurationError(
        f"connection is {type(connection).__name__}; accepted are a Django connection, a "
        "SQLAlchemy Session or Connection (of an AsyncSession: await "
        "session.run_sync(outbox.add, task)), and a psycopg 3 Connection"
    )


def _kinds(connection: Any) -> tuple[type, ...]:
    return type(connection).__mro__


_AUTOCOMMIT = (
    "outbox.add needs a transaction, and this connection commits each statement by itself "
    "(autocommit): begin one first, since a row must be written with the rows that it belongs to"
)


def _refuse_autocommit(driver: Any) -> None:
    """Refuse a psycopg connection that commits by itself, and is in no transaction."""
    status = getattr(getattr(driver, "info", None), "transaction_status", None)
    if getattr(driver, "autocommit", False) is True and not status:
        raise ConfigurationError(_AUTOCOMMIT)


def _psycopg(connection: Any) -> Execute:
    _refuse_autocommit(connection)

    def execute(statement: str, values: Mapping[str, Any]) -> int:
        with connection.cursor() as cursor:
            cursor.row_factory = _tuples()
            return int(cursor.execute(_pyformat(statement), values).fetchone()[0])

    return execute


def _tuples() -> Any:
    from psycopg.rows import tuple_row  # noqa: PLC0415 - an extra

    return tuple_row


def _sqlalchemy(connection: Any) -> Execute:
    from sqlalchemy import text  # noqa: PLC0415 - the application's

    if connection.dialect.name != "postgresql":
        raise ConfigurationError(_NO_POSTGRESQL)

    def execute(statement: str, values: Mapping[str, Any]) -> int:
        _refuse_autocommit(connection.connection.dbapi_connection)
        try:
            return int(connection.execute(text(statement), values).scalar_one())
        except Exception as error:
            if hasattr(error, "hide_parameters"):
                error.hide_parameters = True  # its text shows what the message says otherwise
            raise

    return execute


def _django(connection: Any) -> Execute:
    if connection.vendor != "postgresql":
        raise ConfigurationError(_NO_POSTGRESQL)
    if not connection.in_atomic_block and connection.get_autocommit():
        raise ConfigurationError(_AUTOCOMMIT)

    def execute(statement: str, values: Mapping[str, Any]) -> int:
        with connection.cursor() as cursor:
            cursor.execute(_pyformat(statement), values)
            return int(cursor.fetchone()[0])

    return execute


_NO_POSTGRESQL = "an outbox is in PostgreSQL: this connection is to another kind of database"


@lru_cache
def _pyformat(statement: str) -> str:
    """Write parameters as psycopg reads them."""
    for each in (*_VALUES, "channel"):
        statement = statement.replace(f":{each},", f"%({each})s,").replace(
            f":{each})", f"%({each})s)"
        )
    return statement
