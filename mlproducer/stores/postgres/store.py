"""The store in PostgreSQL: each call of the protocol is one statement, and so one transaction.

A call that stores, claims or releases rows carries its number, and a time after which the server
does nothing for it any more.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer._store_url import read_postgresql
from mlproducer.errors import StoreError, frameless
from mlproducer.stores.postgres import sql
from mlproducer.stores.postgres.listener import Listener
from mlproducer.stores.postgres.rows import UnreadableRowError, given, read_row
from mlproducer.stores.postgres.session import TIMEOUT, Session
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row, RowFate
from mlproducer.stores.server_store import DAY, MIN_PATIENCE, ROOM, Call, StoreOnServer

logger = logging.getLogger(__name__)

RATE = 5_000_000
"""Bytes per second that are sent at least; more time is allowed for large messages."""

FORGET = 10.0
"""Seconds between two deletions of expired fates."""

COUNTING = 0.02
"""The share of the time that may be spent on counting rows, once there are `MANY`."""

MANY = 2_000
"""Up to this number rows are counted at each call of `depth`."""

LEAST_ROOM = ROOM // 256
"""Bytes of messages that a claim reads at least, after others have failed."""

_STEP_BITS = 40

TRIES = 2
"""How often a call is made that comes too late by the server's clock."""


class PostgreSQLStore(StoreOnServer):
    """Rows in a table of PostgreSQL 13 or later.

    **Durability** is PostgreSQL's: ``synchronous_commit`` and replication decide; with the default
    settings a row is on disk when `put` returns.

    **Time** is the server's, so the clocks of the machines need not agree. No row waits longer
    than ``horizon``, even where the server's clock was set back.

    **The table** is created at the first use, if it does not exist and the role may create it.

    **A `put` that fails leaves nothing behind**: the statement does nothing after a deadline, and
    what took effect without an answer is undone by the next call. Until then the row is claimed,
    so that no process sends it. One case remains: PostgreSQL stored the row in time, its answer was
    lost, and this process then ended, or could not reach the server, for a whole lease; then
    another process sends the row, although its `put` raised.

    All processes that share a table should have the same horizon.

    :ivar backlog: how many rows may be claimed, and the age of the oldest in seconds, when they
        were last counted
    :param url: ``postgresql://[user[:password]@]host[:port][,host[:port]...]/database``, with the
        options ``write_ahead``, ``table`` and ``connect_timeout`` (seconds), and libpq's
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent; the URL's option takes precedence
    :param horizon: seconds; no row waits longer
    :raises ConfigurationError: the URL does not parse
    """

    durable = True
    _connection: Session

    @frameless
    def __init__(
        self,
        url: str,
        *,
        lease: float = 30.0,
        write_ahead: bool = False,
        horizon: float = DAY,
    ) -> None:
        self.address = read_postgresql(url)
        self.name = self.address.name
        self.table = self.address.table
        self.lease = lease
        chosen = self.address.write_ahead
        self.write_ahead = write_ahead if chosen is None else chosen
        self._horizon = max(lease, horizon)
        self._sql = sql.statements(self.table)
        self._start()

    def _start(self) -> None:
        super()._start()
        self._connection = Session(self.address)
        self._me = _new_owner(self.lease)
        self._forget_at = 0.0
        self._count_at = 0.0
        self._counted = Depth()
        self._claiming = False
        self._claimed: list[Row] = []
        self._room = ROOM
        self.backlog = (0, 0.0)

    def __repr__(self) -> str:
        return f"<PostgreSQLStore {self.name}>"

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, all with one statement.

        PostgreSQL has a second to answer, and a fifth more for each megabyte.

        :raises StoreError: they are not stored; there is no `BufferFullError`, since a disk is full
            for all clients at once
        """
        deadline = time.monotonic() + patience
        self._get_ready()
        new = list(entries)
        if not new:
            return []
        records = [entry.record for entry in new]
        ahead = [sql.AHEAD if entry.ahead and entry.delay is None else None for entry in new]
        rows = given(records, [entry.delay for entry in new], ahead)
        token = _first_token()
        limit = min(deadline - time.monotonic(), TIMEOUT) + _time_for(records)
        keys = self._change(
            self._sql.put, self._sql.undo_put, {**rows, "token": token}, max(MIN_PATIENCE, limit)
        )
        claims = [Claim(key, token) for key in sorted(key for (key,) in keys)]
        self._free_stored(new, claims)
        return claims

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows, and return the claims that no longer hold."""
        if not changes:
            return []
        self._get_ready()
        records = [change.record for change in changes]
        claims = [change.claim for change in changes]
        rows = given(records, [change.delay for change in changes], [None] * len(changes))
        limit = TIMEOUT + _time_for([each for each in records if each.dead])
        values = {**rows, **_arrays(claims)}
        held = self._change(self._sql.release, self._sql.undo_release, values, limit, claims)
        return _lost(claims, held)

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Renew leases, and return the claims that no longer hold."""
        if not claims:
            return []
        self._get_ready()
        return _lost(claims, self._run(self._sql.renew, _arrays(claims)))

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows."""
        if not claims:
            return
        self._get_ready()
        self._run(self._sql.done, _arrays(claims))
        if any(claim.token % 2 for claim in claims) and time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + FORGET
            self._run(self._sql.forget, {})

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Return what became of rows."""
        if not claims:
            return []
        self._get_ready()
        found = self._run(self._sql.trace, {"keys": [claim.key for claim in claims]})
        return [_fate(claim, *each) for claim, each in zip(claims, found, strict=True)]

    def claim(self, limit: int) -> list[Row]:
        """Claim due rows, at most 16 MiB of them; fewer than ``limit`` may be only a part.

        Fewer bytes after a call that failed, since the link may be too slow for so many.

        What `claim_ahead` has claimed is returned first, and alone.
        """
        if limit <= 0:
            return []
        self._get_ready()
        if self._claimed:
            claimed, self._claimed = self._claimed[:limit], self._claimed[limit:]
            return claimed
        self._run(self._sql.ripen, {})
        with self._fitting():
            found = self._change(self._sql.claim, self._sql.undo_claim, self._claim_values(limit))
        if not found:
            self._count_at = 0.0  # what was counted a moment ago is gone
        return self._read(found)

    def claim_ahead(self, limit: int) -> bool:
        """Begin to claim rows that `claim` returns next; PostgreSQL works on it meanwhile.

        Their leases begin after this was called. `give_back` releases what is not wanted.

        :returns: false if `claim` has not returned yet all that was claimed ahead before
        """
        self._get_ready()
        if self._claimed:
            return False
        number = self._next_call(self._sql.undo_claim)
        latest = self._connection.server_time(time.monotonic() + TIMEOUT)
        claim = self._claim_values(limit)
        values = {**self._common(), **claim, "call": number, "latest": latest}
        self._connection.begin(self._sql.claim, values)
        self._claiming = True
        return True

    def give_back(self) -> None:
        """Make rows due again that were claimed ahead and that `claim` has not returned."""
        self._get_ready()
        if self._claimed:
            self._free([(row.claim, 0.0) for row in self._claimed])
            self._claimed = []

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Return dead letters, at most 4 MiB of them; only an empty list is the end."""
        self._get_ready()
        values = {"after": after, "limit": limit, "room": ROOM // 4}
        found = self._run(self._sql.letters, values)
        rows = self._read(found)
        return rows if rows or not found else self.letters(limit, max(row[0] for row in found))

    def seize(self, row: Row) -> Row | None:
        """Claim a dead letter."""
        self._get_ready()
        values = {"key": row.claim.key, "was": row.claim.token, "step": _step()}
        found = self._change(self._sql.seize, self._sql.undo_claim, values)
        return next(iter(self._read(found)), None)

    def depth(self) -> Depth:
        """Count the rows; where there are many, return what was counted a moment ago.

        Beyond `sql.COUNTED` of a kind, PostgreSQL's own statistics are asked, so that it takes no
        longer the more there are.
        """
        self._get_ready()
        started = time.monotonic()
        if self._counted.total >= MANY and started < self._count_at:
            return self._counted
        ((total, dead, ahead, ready, oldest),) = self._run(self._sql.depth, {})
        self.backlog = (ready, max(0.0, oldest or 0.0))
        self._counted = Depth(max(0, total - dead - ahead), dead, ahead)
        now = time.monotonic()
        self._count_at = now + (now - started) / COUNTING
        return self._counted

    def close(self) -> None:
        """Make this process's claims due, and close the connection."""
        self._leave_parent()
        try:
            if self._number:
                self.give_back()
                self._run(self._sql.close, {})
                self._me, self._number = _new_owner(self.lease), 0
                self._undone.clear()
        finally:
            self._connection.drop()

    def create(self) -> None:
        """Create the table now, or what a table of an earlier version lacks.

        :raises StoreError: it cannot be created
        """
        self._leave_parent()
        self._connection.create()

    def listener(self, wake: Callable[[], None]) -> Listener:
        """Return a listener that calls ``wake`` when a COMMIT has brought rows of an outbox."""
        return Listener(self.address, wake)

    # --- calls ---------------------------------------------------------------------------------

    def _get_ready(self) -> None:
        self._leave_parent()
        if self._claiming:
            # Once only: a claim without an answer is undone, as any other call is.
            self._claiming = False
            with self._fitting():
                found = self._connection.finish()
            self._answered()
            self._claimed = self._read(found)
        super()._get_ready()

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Have the next claim read less where this one fails, and else more again."""
        try:
            yield
        except StoreError:
            self._room = max(LEAST_ROOM, self._room // 4)
            raise
        self._room = min(ROOM, self._room * 2)

    def _claim_values(self, limit: int) -> dict[str, int]:
        return {"limit": limit, "room": self._room, "step": _step()}

    def _undo(self, call: Call) -> None:
        # The server may still be running the call. It holds a shared lock until it has ended.
        self._run(self._sql.barrier, {})
        claims = _arrays(call.claims) if call.claims else {}
        self._run(call.undo, {**claims, "call": call.number})

    def _free(self, delayed: Sequence[tuple[Claim, float]]) -> None:
        claims = _arrays([claim for claim, _ in delayed])
        self._run(self._sql.free, {**claims, "delays": [delay for _, delay in delayed]})

    def _change(
        self,
        statement: str,
        undo: str,
        values: dict[str, Any],
        limit: float = TIMEOUT,
        claims: Sequence[Claim] = (),
    ) -> list[tuple[Any, ...]]:
        """Run a statement that is to be undone if there is no answer.

        :raises StoreError: it came too late, and changed nothing, or there was no answer
        """
        deadline = time.monotonic() + limit
        for _ in range(TRIES):
            left = max(MIN_PATIENCE, deadline - time.monotonic())
            number = self._next_call(undo, claims)
            latest = self._connection.server_time(time.monotonic() + left)
            rows = self._run(statement, {**values, "call": number, "latest": latest}, left)
            self._answered()
            if rows or not self._connection.is_past(latest):
                return rows
            # It came in time by this machine's clock: the server's has been set forward.
        raise StoreError(f"the store at {self.name} was reached too late")

    def _run(
        self, statement: str, values: dict[str, Any], limit: float = TIMEOUT
    ) -> list[tuple[Any, ...]]:
        return self._connection.run(statement, {**self._common(), **values}, limit)

    def _common(self) -> dict[str, Any]:
        return {"me": self._me, "lease": float(self.lease), "horizon": float(self._horizon)}

    def _read(self, rows: Iterable[Sequence[Any]]) -> list[Row]:
        """Return the rows that can be read, by key, and put the others aside."""
        good: list[Row] = []
        unreadable: list[Claim] = []
        for fields in rows:
            try:
                good.append(read_row(fields))
            except UnreadableRowError as error:
                unreadable.append(error.claim)
        if unreadable:
            self._run(self._sql.put_aside, _arrays(unreadable))
            for claim in unreadable:
                text = "row %d of the store at %s is damaged; it stays in %s, with state 3"
                write(logger, logging.ERROR, text, claim.key, self.name, self.table)
        return sorted(good, key=lambda row: row.claim.key)


def _new_owner(lease: float) -> int:
    """Return a number that ends with the length of the owner's leases."""
    random = 1 + secrets.randbits(62 - sql.LEASE_BITS)
    seconds: int = min(math.ceil(lease), sql.LONGEST_LEASE)
    return (random << sql.LEASE_BITS) | seconds


def _first_token() -> int:
    """Return an even token, for rows that are stored."""
    return (1 << 51) + 2 * secrets.randbits(50)


def _step() -> int:
    """Return an odd, random number by which a token grows when its row is claimed.

    Random, so that a table that was put back to an earlier state never has the same tokens again.
    """
    return 1 + 2 * secrets.randbits(_STEP_BITS)


def _time_for(records: Iterable[Record]) -> float:
    return sum(record.envelope.size for record in records) / RATE


def _arrays(claims: Sequence[Claim]) -> dict[str, list[int]]:
    return {
        "keys": [claim.key for claim in claims],
        "tokens": [claim.token for claim in claims],
    }


def _lost(claims: Sequence[Claim], held: Iterable[Sequence[Any]]) -> list[Claim]:
    keys = {key for (key,) in held}
    return [claim for claim in claims if claim.key not in keys]


def _fate(claim: Claim, token: int | None, dead: bool | None) -> RowFate:
    if token is not None:
        return RowFate.HELD if token == claim.token else RowFate.TAKEN
    if dead is None:
        return RowFate.MISSING
    return RowFate.DEAD_LETTERED if dead else RowFate.CONFIRMED
