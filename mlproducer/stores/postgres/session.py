"""The connection to PostgreSQL: runs statements, and turns psycopg's errors into `StoreError`.

With `mlproducer.stores.postgres.listener` the only module that uses psycopg. Each statement has a
limit of its own, after which the server is asked to cancel it.

Each statement is a transaction, is not prepared, and does not rely on the session, so that
pgbouncer may run each in another one.

Runs on: the retry thread; the listener has a connection of its own.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import select
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import sleep
from typing import Any

from mlproducer import _clock as time
from mlproducer._core.backoff import Backoff
from mlproducer._foreign_calls import write
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

logger = logging.getLogger(__name__)

TIMEOUT = 1.0
"""Seconds that a statement may take; more for large messages."""

ARRIVAL = 4.0
"""Seconds more for an answer whose parts go on arriving: 16 MiB over a link of 40 Mbit/s."""

CONNECT_TIMEOUT = 2.0
CANCEL_TIMEOUT = 0.25
TRUST = 1.0
"""Seconds for which the server's clock is taken to run like this machine's monotonic one. It may be
set, and over days any two clocks drift apart."""
PAUSE = Backoff(0.001, 0.05)
"""Before a statement that conflicts with another transaction is tried again. A random part of it is
waited, so that two that conflict do not meet again."""

_TROUBLES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (sqlstates.QueryCanceled, "has cancelled a statement (statement_timeout?)"),
    (sqlstates.LockNotAvailable, "did not get a lock in time (lock_timeout?)"),
    (sqlstates.ReadOnlySqlTransaction, "is read-only: a standby, or made so"),
    (sqlstates.InsufficientPrivilege, "does not permit this role what the store needs"),
    (
        (sqlstates.UndefinedTable, sqlstates.UndefinedColumn),
        "has no table of the store, or another table of that name",
    ),
    (sqlstates.DiskFull, "has a full disk"),
    (sqlstates.OutOfMemory, "is out of memory"),
    (sqlstates.TooManyConnections, "has too many connections"),
    (
        (sqlstates.SerializationFailure, sqlstates.DeadlockDetected),
        "has transactions that conflict again and again",
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
    ("certificate", "cannot be reached: its certificate, or the client's, is not accepted"),
    ("SSL", "cannot be reached: TLS failed"),
    ("could not translate host name", "cannot be reached: its name cannot be resolved"),
    ("Connection refused", "cannot be reached: Connection refused"),
    ("No such file", "cannot be reached: the socket does not exist"),
)
"""English texts of libpq and of servers before there is a session, which carry no SQLSTATE."""


class SilentError(Exception):
    """There was no answer within the limit."""


class _Connection(psycopg.Connection[Any]):
    """A connection whose waits end at a monotonic deadline.

    psycopg implements its protocol as generators that yield what they wait for, and runs each in
    `Connection.wait`, which has no deadline. The generators and that method are not part of its
    public API.
    """

    deadline = math.inf
    only_sends = False
    """Have `wait` return once all is sent; `answer` waits for the rest."""
    _asked: tuple[Any, int] | None = None

    def wait(self, gen: Any, *_arguments: Any, **_options: Any) -> Any:
        """Run one of psycopg's generators."""
        if not self.only_sends:
            return _drive(gen, self.pgconn.socket, self.deadline, arrival=ARRIVAL)
        wanted = _drive(gen, self.pgconn.socket, self.deadline, until_sent=True)
        self._asked = None if wanted is None else (gen, wanted)
        return None

    def answer(self) -> None:
        """Run the rest of what was sent."""
        if self._asked is not None:
            (gen, wanted), self._asked = self._asked, None
            _drive(gen, self.pgconn.socket, self.deadline, wanted, arrival=ARRIVAL)


def _drive(
    gen: Any,
    descriptor: int,
    deadline: float,
    wanted: Any = None,
    *,
    until_sent: bool = False,
    arrival: float = 0.0,
) -> Any:
    """Poll for what a generator waits for, and tell it, until it returns.

    :param wanted: what it waits for already; ``None``: it has not begun
    :param until_sent: or until it waits only for an answer; then this returns what it waits for
    :param arrival: seconds more while parts of the answer arrive, one at least in each `TIMEOUT`
    """
    longest = deadline + arrival
    try:
        if wanted is None:
            wanted = next(gen)
        while True:
            if until_sent and wanted == waiting.WAIT_R:
                return wanted
            if isinstance(wanted, tuple):  # connect() tries several addresses, a socket for each
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
            if readable:
                deadline = max(deadline, min(time.monotonic() + TIMEOUT, longest))
            wanted = gen.send(
                (waiting.READY_R if readable else 0)
                | (waiting.READY_W if events & ~select.POLLIN else 0)
            )
    except StopIteration as ended:
        return ended.value


FOREIGN = (psycopg.Error, OSError, SilentError)


def dial(address: PostgreSQLAddress, *, name: str) -> _Connection:
    """Connect to the first host that can be reached and accepts writes.

    :param name: the ``application_name``, which the server's statistics show
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
    connection = _Connection(_drive(gen, -1, deadline))
    connection.autocommit = True
    connection.prepare_threshold = None
    return connection


def describe(error: Exception) -> str:
    """Describe an error; the server's own text is not passed on, since it may quote statements."""
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
    """One connection, made when it is needed, and made again after any failure."""

    def __init__(self, address: PostgreSQLAddress) -> None:
        self._address = address
        self._connection: _Connection | None = None
        self._begun: psycopg.Cursor[Any] | None = None
        self._told_of_version = False
        self._ahead = 0.0
        self._trusted_until = 0.0

    def server_time(self, moment: float) -> float:
        """Return the server's time, in seconds since the epoch, at a monotonic moment."""
        return moment + self._ahead

    def get_ready(self) -> bool:
        """Connect, create the table and ask for the server's time, where that is needed.

        :returns: whether the connection is a new one
        :raises StoreError: the server cannot be reached, or the table cannot be used
        """
        connection = self._connection
        if connection is not None and _is_over(connection):
            self.drop()
        if self._connection is None:
            self._translated(self._open)
            return True
        if time.monotonic() >= self._trusted_until:
            self._note_time(*self.run(sql.TIME, {})[0])
        return False

    def create(self) -> None:
        """Create the table, or what a table of an earlier version lacks.

        :raises StoreError: it cannot be done
        """
        self._told_of_version = True
        self.get_ready()
        ((complete,),) = self.run(sql.statements(self._address.table).complete, {})
        if not complete:
            self._translated(lambda: self._make_table(time.monotonic() + CONNECT_TIMEOUT))

    def _translated(self, step: Callable[[], None]) -> None:
        """Take a step; where it fails, drop the connection and raise a `StoreError`."""
        try:
            step()
        except FOREIGN as error:
            failure = self.failure(error)
        else:
            return
        self.drop()
        # Raised outside of the handler: nothing of psycopg, whose frames hold the password, is
        # chained to it.
        raise failure

    def is_past(self, latest: float) -> bool:
        """Ask the server whether a time, in seconds since the epoch by its clock, is over.

        :raises StoreError: there was no answer
        """
        ((now,),) = self.run(sql.TIME, {})
        self._note_time(now)
        return bool(now > latest)

    def run(
        self, statement: str, values: Mapping[str, Any], limit: float = TIMEOUT
    ) -> list[tuple[Any, ...]]:
        """Run a statement as one transaction, and return its rows.

        :param limit: seconds
        :raises StoreError: the statement failed, or there was no answer in time
        """
        deadline = time.monotonic() + limit
        for conflicts in itertools.count():
            try:
                return self._execute(statement, values, deadline)
            except (sqlstates.SerializationFailure, sqlstates.DeadlockDetected) as error:
                failure = self.failure(error)
                # The half of the limit is left to the last try, which waits for its answer.
                if time.monotonic() > deadline - limit / 2:
                    break
                sleep(random.uniform(0.0, PAUSE.delay(conflicts)))
            except FOREIGN as error:
                failure = self.failure(error)
                self.drop()
                break
        raise failure

    def begin(self, statement: str, values: Mapping[str, Any], limit: float = TIMEOUT) -> None:
        """Send a statement without waiting for its rows, which `finish` returns.

        No other statement can be run before that.

        :raises StoreError: it cannot be sent
        """
        connection = self._connection
        try:
            if connection is None:
                raise psycopg.OperationalError("no connection")
            connection.deadline = time.monotonic() + limit
            self._begun = connection.cursor(binary=True)
            connection.only_sends = True
            self._begun.execute(statement, values)
            connection.only_sends = False
        except FOREIGN as error:
            failure = self.failure(error)
        else:
            return
        self.drop()
        raise failure

    def finish(self, limit: float = TIMEOUT) -> list[tuple[Any, ...]]:
        """Return the rows of what was begun; none where it conflicts with another transaction.

        :param limit: seconds from now
        :raises StoreError: the statement failed, or there was no answer in time
        """
        connection, cursor, self._begun = self._connection, self._begun, None
        try:
            if connection is None or cursor is None:
                raise psycopg.OperationalError("no connection")
            connection.deadline = time.monotonic() + limit
            with cursor:
                connection.answer()
                return cursor.fetchall()
        except (sqlstates.SerializationFailure, sqlstates.DeadlockDetected):
            return []
        except FOREIGN as error:
            failure = self.failure(error)
        self.drop()
        raise failure

    def drop(self) -> None:
        """Close the connection, and have the server cancel a statement that it still runs.

        It would notice only at the statement's end that no one waits for it any more: what waits
        there for a lock, or a standby, would keep one of its connections for each call.
        """
        self._begun = None
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            connection.deadline = time.monotonic() + CANCEL_TIMEOUT
            with suppress(*FOREIGN):
                connection.cancel_safe(timeout=CANCEL_TIMEOUT)
        connection.close()

    def failure(self, error: Exception) -> StoreError:
        """Return the error that the store raises."""
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
            now, standby, read_only, there, mark, ordered = answer[0]
            self._note_time(now)
            if standby or read_only:
                raise sqlstates.ReadOnlySqlTransaction
            if there is not None or made:
                break
            self._make_table(deadline)
        self._check(there, mark)
        if not (ordered or self._told_of_version):
            self._told_of_version = True
            text = (
                "the table %s at %s is an earlier version's: until 'mlproducer relay "
                "--create-table' is run, several relays may send a transaction's rows out of order"
            )
            write(logger, logging.WARNING, text, table, self._address.name)
        self._execute(sql.statements(table).anchor, None, deadline)

    def _note_time(self, now: float) -> None:
        # Taken after the answer: the server's time is never estimated to be later than it is.
        heard = time.monotonic()
        self._ahead, self._trusted_until = now - heard, heard + TRUST

    def _make_table(self, deadline: float) -> None:
        table = self._address.table
        lock = f"SELECT pg_advisory_xact_lock(hashtext('{table}'));"
        try:  # sent without parameters, several statements are one transaction
            self._execute(lock + sql.schema(table), None, deadline, binary=False)
        except (sqlstates.InsufficientPrivilege, sqlstates.InvalidSchemaName):
            raise _TableError(
                f"has no table {table}, or an earlier version's, and this role may not create it: "
                "have the owner run "
                "'mlproducer relay --create-table', or the SQL that --print-sql prints"
            ) from None

    def _check(self, there: int | None, mark: str | None) -> None:
        table = self._address.table
        version = (mark or "").removeprefix(sql.MARK)
        if there is None or version == (mark or "") or not version.isdecimal():
            raise _TableError(f"has a table {table} that is not a store of mlproducer")
        if int(version) > sql.VERSION:
            raise _TableError(
                f"has a table {table} of version {version}, made by a later mlproducer; this one "
                f"reads version {sql.VERSION}"
            )


class _TableError(psycopg.Error):
    """The table does not exist, or is not a store's; the text is fit for a `StoreError`."""


def _is_over(connection: _Connection) -> bool:
    """Test whether the server has ended the connection, without sending anything."""
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
