"""The connection to PostgreSQL; the only file of the store that knows psycopg.

Owns one connection: makes it, runs statements over it, each within a limit of its own, and says
what went wrong in words of its own. It must not know what the statements do.

Each statement is a transaction, and none is prepared or relies on the session: so pgbouncer may
give each another session. A server that says nothing is given up, and asked to cancel.

Runs on: the retry thread; the listener has a connection of its own.
"""

from __future__ import annotations

import math
import select
from collections.abc import Mapping
from typing import Any

from mlproducer import _clock as time
from mlproducer._store_url import PostgreSQLAddress
from mlproducer.errors import ConfigurationError, StoreError
from mlproducer.stores.postgres import sql

try:
    import psycopg
    from psycopg import errors as sqlstates
    from psycopg import generators, pq, waiting
    from psycopg.conninfo import make_conninfo
except ImportError:
    raise ConfigurationError(
        "store_url (ML_STORE_URL): postgresql:// needs the package psycopg: "
        "pip install 'mlproducer[postgres]'"
    ) from None

TIMEOUT = 1.0
"""Seconds for which a statement may take, and more for what is large."""

CONNECT_TIMEOUT = 2.0
CANCEL_TIMEOUT = 0.25
TRUST = 1.0
"""Seconds for which the server's clock is taken to go as this machine's monotonic one does: it may
be set, and no two clocks go alike for days."""
TRIES = 3
"""How often a statement is tried that conflicts with another transaction."""

_TROUBLES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (sqlstates.QueryCanceled, "has cancelled a statement (statement_timeout?)"),
    (sqlstates.LockNotAvailable, "did not get a lock in time (lock_timeout?)"),
    (sqlstates.ReadOnlySqlTransaction, "is read-only: a standby, or made so"),
    (sqlstates.InsufficientPrivilege, "does not permit this role what the store needs"),
    (
        (sqlstates.UndefinedTable, sqlstates.UndefinedColumn),
        "has lost the store's table, or has another of its name",
    ),
    (sqlstates.DiskFull, "has a full disk"),
    (sqlstates.OutOfMemory, "is out of memory"),
    (sqlstates.TooManyConnections, "has too many connections"),
    (
        (sqlstates.SerializationFailure, sqlstates.DeadlockDetected),
        "has conflicting transactions, again and again",
    ),
    (
        (sqlstates.AdminShutdown, sqlstates.CrashShutdown, sqlstates.IdleSessionTimeout),
        "has ended the session",
    ),
    (sqlstates.CannotConnectNow, "is starting up or shutting down"),
)

_SAID = (
    ("password authentication failed", "refuses the user or the password"),
    ("no password supplied", "refuses the user or the password"),
    ("pg_hba.conf", "refuses this user, host or database (pg_hba.conf)"),
    ("too many", "has too many connections"),
    ("remaining connection slots", "has too many connections"),
    ("no more connections", "has too many connections"),
    ("starting up", "is starting up or shutting down"),
    ("shutting down", "is starting up or shutting down"),
    ("not yet accepting", "is starting up or shutting down"),
    ("session is read-only", "is read-only: a standby, or made so"),
    ("certificate", "cannot be reached: its certificate, or ours, is not accepted"),
    ("SSL", "cannot be reached: TLS failed"),
    ("could not translate host name", "cannot be reached: its name is not known"),
    ("Connection refused", "cannot be reached: Connection refused"),
    ("No such file", "cannot be reached: there is no such socket"),
)
"""What servers and libpq say before there is a session; in other languages it is not told apart."""


class SilentError(Exception):
    """No answer within the limit."""


class _Connection(psycopg.Connection[Any]):
    """A connection whose waits end at a monotonic deadline."""

    deadline = math.inf

    def wait(self, gen: Any, *_arguments: Any, **_options: Any) -> Any:
        """Carry out one of psycopg's generators."""
        return _carry_out(gen, self.pgconn.socket, self.deadline)


def _carry_out(gen: Any, descriptor: int, deadline: float) -> Any:
    """Send a generator what its descriptor is ready for, until it returns."""
    try:
        wanted = next(gen)
        while True:
            if isinstance(wanted, tuple):  # while connecting, the descriptor may change
                descriptor, wanted = wanted
            poll = select.poll()
            poll.register(
                descriptor,
                (select.POLLIN if wanted & waiting.WAIT_R else 0)
                | (select.POLLOUT if wanted & waiting.WAIT_W else 0),
            )
            limit = max(0.0, min(deadline - time.monotonic(), 3600.0))
            ready = poll.poll(math.ceil(limit * 1000))
            if not ready:
                raise SilentError
            events = ready[0][1]
            readable = events & ~select.POLLOUT
            wanted = gen.send(
                (waiting.READY_R if readable else 0)
                | (waiting.READY_W if events & ~select.POLLIN else 0)
            )
    except StopIteration as ended:
        return ended.value


FOREIGN = (psycopg.Error, OSError, SilentError)


def dial(address: PostgreSQLAddress, *, name: str) -> _Connection:
    """Give a connection to the first of the hosts that can be reached, and takes writes.

    :param name: what the server's statistics call it
    """
    nodes: list[tuple[str, int] | None] = list(address.nodes) or [None]
    options: dict[str, str] = {
        "application_name": name,
        "client_encoding": "utf8",
        **address.options,
    }
    if len(nodes) > 1:
        options.setdefault("target_session_attrs", "read-write")
    problem: Exception = SilentError()
    for node in nodes:
        place = {} if node is None else {"host": node[0], "port": str(node[1])}
        try:
            return _dial(make_conninfo("", **{**options, **place}), address)
        except FOREIGN as error:
            problem = error
    raise problem


def _dial(conninfo: str, address: PostgreSQLAddress) -> _Connection:
    deadline = time.monotonic() + (address.connect_timeout or CONNECT_TIMEOUT)
    gen = generators.connect(conninfo)
    connection = _Connection(_carry_out(gen, -1, deadline))
    connection.autocommit = True
    connection.prepare_threshold = None
    return connection


def describe(error: Exception) -> str:
    """Say what is wrong in words of our own: the server's may quote what it was sent."""
    if isinstance(error, SilentError):
        return "did not answer in time"
    if isinstance(error, _TableError):
        return str(error)
    for kind, words in _TROUBLES:
        if isinstance(error, kind):
            return words
    said = str(error)
    if isinstance(error, psycopg.OperationalError):
        if 'database "' in said and "does not exist" in said:
            return "has no database of this name"
        found = (words for part, words in _SAID if part in said)
        return next(found, "cannot be reached, or has ended the connection")
    state = getattr(error, "sqlstate", None)
    return f"answered with an error ({state or type(error).__name__})"


class Session:
    """One connection, made when it is needed, and made again after whatever went wrong."""

    def __init__(self, address: PostgreSQLAddress) -> None:
        self._address = address
        self._connection: _Connection | None = None
        self._ahead = 0.0
        self._trusted_until = 0.0

    def server_time(self, moment: float) -> float:
        """Give the server's time, in seconds since the epoch, at a monotonic moment."""
        return moment + self._ahead

    def get_ready(self) -> None:
        """Have a connection that works, a table, and the server's time.

        :raises StoreError: there is none
        """
        connection = self._connection
        if connection is not None and _is_over(connection):
            self.drop()
        if self._connection is None:
            try:
                self._open()
            except FOREIGN as error:
                failure = self.failure(error)
            else:
                return
            self.drop()
            raise failure  # with nothing of psycopg's in it, whose frames know the password
        if time.monotonic() >= self._trusted_until:
            self._note_time(*self.run(sql.TIME, {})[0])

    def is_past(self, latest: float) -> bool:
        """Ask the server whether a time of its own, in seconds since the epoch, is over.

        :raises StoreError: there is no answer
        """
        ((now,),) = self.run(sql.TIME, {})
        self._note_time(now)
        return bool(now > latest)

    def run(
        self, statement: str, values: Mapping[str, Any], limit: float = TIMEOUT
    ) -> list[tuple[Any, ...]]:
        """Carry out a statement, as one transaction.

        :param limit: seconds
        :raises StoreError: it failed, or there is no answer
        """
        deadline = time.monotonic() + limit
        for left in reversed(range(TRIES)):
            try:
                return self._execute(statement, values, deadline)
            except (sqlstates.SerializationFailure, sqlstates.DeadlockDetected) as error:
                failure = self.failure(error)
                if not left or time.monotonic() > deadline:
                    break
            except FOREIGN as error:
                if isinstance(error, SilentError):
                    self._cancel()
                failure = self.failure(error)
                self.drop()
                break
        raise failure

    def drop(self) -> None:
        """End the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def failure(self, error: Exception) -> StoreError:
        """Give the error that the store raises."""
        return StoreError(f"the store at {self._address.name} {describe(error)}")

    def _execute(
        self,
        statement: str,
        values: Mapping[str, Any] | None,
        deadline: float,
        *,
        binary: bool = True,
    ) -> list[tuple[Any, ...]]:
        connection = self._connection
        if connection is None:
            raise psycopg.OperationalError("no connection")
        connection.deadline = deadline
        with connection.cursor(binary=binary) as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def _open(self) -> None:
        self._connection = dial(self._address, name="mlproducer")
        deadline = time.monotonic() + CONNECT_TIMEOUT
        table = self._address.table
        for made in (False, True):
            answer = self._execute(sql.OPEN, {"table": table}, deadline)
            now, standby, read_only, there, mark = answer[0]
            self._note_time(now)
            if standby or read_only:
                raise sqlstates.ReadOnlySqlTransaction
            if there is not None or made:
                break
            self._make_table(deadline)
        self._check(there, mark)
        self._execute(sql.statements(table).anchor, None, deadline)

    def _note_time(self, now: float) -> None:
        """Note the server's time when it was asked: it must not be taken to be later than it is."""
        heard = time.monotonic()
        self._ahead, self._trusted_until = now - heard, heard + TRUST

    def _make_table(self, deadline: float) -> None:
        table = self._address.table
        lock = f"SELECT pg_advisory_xact_lock(hashtext('{table}'));"
        try:  # without parameters, several statements are one transaction
            self._execute(lock + sql.schema(table), None, deadline, binary=False)
        except (sqlstates.InsufficientPrivilege, sqlstates.InvalidSchemaName):
            raise _TableError(
                f"has no table {table}, which this role may not make: let its owner run "
                "'mlproducer relay --create-table', or what --print-sql shows"
            ) from None

    def _check(self, there: int | None, mark: str | None) -> None:
        table = self._address.table
        version = (mark or "").removeprefix(sql.MARK)
        if there is None or version == (mark or "") or not version.isdecimal():
            raise _TableError(f"has a table {table} that is not this library's")
        if int(version) > sql.VERSION:
            raise _TableError(
                f"has a table {table} of version {version}, made by a later mlproducer; this one "
                f"knows version {sql.VERSION}"
            )

    def _cancel(self) -> None:
        """Ask the server to cancel what it is at, so that it does not go on, or wait, in vain."""
        connection = self._connection
        if connection is not None:
            connection.deadline = time.monotonic() + CANCEL_TIMEOUT
            try:
                connection.cancel_safe(timeout=CANCEL_TIMEOUT)
            except FOREIGN:
                return


class _TableError(psycopg.Error):
    """The table is not there, or not ours; the text says so in the words of the store."""


def _is_over(connection: _Connection) -> bool:
    """Whether the server has ended it meanwhile; nothing is sent to find out."""
    if connection.closed or connection.pgconn.transaction_status != pq.TransactionStatus.IDLE:
        return True
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        connection.pgconn.consume_input()
    except FOREIGN:
        return True
    return connection.pgconn.status != pq.ConnStatus.OK or bool(poll.poll(0))
