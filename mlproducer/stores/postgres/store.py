"""A store in PostgreSQL, for the producers of many machines, and for outboxes.

Each call of the protocol is one statement, and so one transaction. A call that puts, claims or
releases carries its number, and a time after which the server does nothing for it any more. A call
that got no answer is undone before anything else is done, so that those who were told of a
`StoreError` can rely on it.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._guard import write
from mlproducer._store_url import read_postgresql
from mlproducer.errors import StoreError, frameless
from mlproducer.stores.postgres import sql
from mlproducer.stores.postgres.listener import Listener
from mlproducer.stores.postgres.rows import UnreadableRowError, given, read_row
from mlproducer.stores.postgres.session import TIMEOUT, Session
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row, RowFate

logger = logging.getLogger(__name__)

MIN_PATIENCE = 0.05
"""Seconds that PostgreSQL has in any case."""

RATE = 5_000_000
"""Bytes per second at least, for messages so large that it takes time to send them."""

ROOM = 16 * 1024 * 1024
"""Bytes of messages that one call reads, so that a backlog of large ones does not fill memory."""

DAY = 86_400.0

FORGET = 10.0
"""Seconds between two looks for fates that are old."""

COUNTING = 0.02
"""The part of the time in which rows may be counted: many rows are not counted at each sweep."""

MANY = 10_000
"""Rows below which they are counted whenever one asks."""

_STEP_BITS = 40

TRIES = 2
"""How often a call is made that the server takes to be late."""

_inherited: list[object] = []
"""Connections of a parent process: never used here, and never closed either."""


@frozen
class _Call:
    """A call that changes claims, and has got no answer yet."""

    undo: str
    number: int
    claims: Sequence[Claim] = ()


class PostgreSQLStore:
    """Rows in a table of PostgreSQL 13 or later.

    **How long a row lives** is what ``synchronous_commit`` and replication promise; with
    PostgreSQL's own defaults a row is on the disk when `put` returns.

    **Time** is the server's, so it does not matter what the clocks of the machines say. No row
    waits longer than ``horizon`` where that clock was put back.

    **The table** is made at the first use, if it is not there and the role may make it.

    **A `put` that fails leaves nothing behind**: PostgreSQL is told until when it may take effect,
    and what has taken effect without an answer is undone by the next call. Until then the row is
    claimed, so no process sends it. One case remains: PostgreSQL took the row in time, its answer
    was lost, and this process ended, or did not get through again, for a whole lease; then another
    process sends the row, although its `put` raised.

    All processes that share a table should have the same horizon.

    :ivar backlog: how many rows may be claimed, and the age of the oldest in seconds, when they
        were last counted
    :param url: ``postgresql://[user[:password]@]host[:port][,host[:port]...]/database``, with the
        options ``write_ahead``, ``table`` and ``connect_timeout`` (seconds), and libpq's
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent; the URL's option overrules it
    :param horizon: seconds; no row waits longer
    :raises ConfigurationError: the URL does not parse
    """

    durable = True

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
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._session = Session(self.address)
        self._me = _new_owner(self.lease)
        self._call = 0
        self._unanswered: _Call | None = None
        self._unfreed: list[tuple[Claim, float]] = []
        self._forget_at = 0.0
        self._count_at = 0.0
        self._counted = Depth()
        self.backlog = (0, 0.0)

    def __repr__(self) -> str:
        return f"<PostgreSQLStore {self.name}>"

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, all with one statement.

        PostgreSQL answers within a second, and a fifth more for each megabyte, or is given up.

        :raises StoreError: they are not stored; there is no `BufferFullError`, since a disk is full
            for all at once
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
        self._unfreed = [
            (claim, entry.delay)
            for entry, claim in zip(new, claims, strict=True)
            if entry.delay is not None
        ]
        try:
            self._settle()
        except StoreError as error:
            text = "messages are stored, but wait until this has ended: %s"
            write(logger, logging.WARNING, text, error)
        return claims

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows."""
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
        """Let leases begin again."""
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
        """Say what became of rows."""
        if not claims:
            return []
        self._get_ready()
        found = self._run(self._sql.trace, {"keys": [claim.key for claim in claims]})
        return [_fate(claim, *each) for claim, each in zip(claims, found, strict=True)]

    def claim(self, limit: int) -> list[Row]:
        """Claim what is due, at most 16 MiB of it; fewer rows do not mean that no more is due."""
        if limit <= 0:
            return []
        self._get_ready()
        self._run(self._sql.ripen, {})
        values = {"limit": limit, "room": ROOM, "step": _step()}
        return self._read(self._change(self._sql.claim, self._sql.undo_claim, values))

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Show dead letters, at most 16 MiB of them; only an empty list is the end."""
        self._get_ready()
        values = {"after": after, "limit": limit, "room": ROOM}
        found = self._run(self._sql.letters, values)
        rows = self._read(found)
        return rows if rows or not found else self.letters(limit, max(row[0] for row in found))

    def seize(self, row: Row) -> Row | None:
        """Claim a letter."""
        self._get_ready()
        values = {"key": row.claim.key, "was": row.claim.token, "step": _step()}
        found = self._change(self._sql.seize, self._sql.undo_claim, values)
        return next(iter(self._read(found)), None)

    def depth(self) -> Depth:
        """Count the rows; where they are many, what was counted a moment ago."""
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
        """Make this process's claims due, and end the connection."""
        self._leave_the_parent()
        try:
            if self._call:
                self._get_ready()
                self._run(self._sql.close, {})
                self._me, self._call = _new_owner(self.lease), 0
        finally:
            self._session.drop()

    def create(self) -> None:
        """Make the table now, unless it is there.

        :raises StoreError: it cannot be made
        """
        self._leave_the_parent()
        self._session.get_ready()

    def listener(self, wake: Callable[[], None]) -> Listener:
        """Make what calls ``wake`` when a COMMIT has brought rows of an outbox."""
        return Listener(self.address, wake)

    # --- calls ---------------------------------------------------------------------------------

    def _get_ready(self) -> None:
        self._leave_the_parent()
        self._session.get_ready()
        self._settle()

    def _leave_the_parent(self) -> None:
        """After a fork, begin afresh as another process."""
        if self._pid != os.getpid():
            _inherited.append(self._session)
            self._begin()

    def _settle(self) -> None:
        """Do what earlier calls have left undone."""
        call = self._unanswered
        if call is not None:
            self._run(self._sql.barrier, {})  # behind what the server may still be at
            claims = _arrays(call.claims) if call.claims else {}
            self._run(call.undo, {**claims, "call": call.number})
            self._unanswered = None
        if self._unfreed:
            claims = _arrays([claim for claim, _ in self._unfreed])
            self._run(self._sql.free, {**claims, "delays": [delay for _, delay in self._unfreed]})
            self._unfreed = []

    def _change(
        self,
        statement: str,
        undo: str,
        values: dict[str, Any],
        limit: float = TIMEOUT,
        claims: Sequence[Claim] = (),
    ) -> list[tuple[Any, ...]]:
        """Run a statement that is to be undone if there is no answer.

        :raises StoreError: it came too late, and changed nothing, or there is no answer
        """
        deadline = time.monotonic() + limit
        for _ in range(TRIES):
            left = max(MIN_PATIENCE, deadline - time.monotonic())
            self._call += 1
            self._unanswered = _Call(undo, self._call, claims)
            latest = self._session.server_time(time.monotonic() + left)
            done = self._run(statement, {**values, "call": self._call, "latest": latest}, left)
            self._unanswered = None
            if done or not self._session.is_past(latest):
                return done
            # It did nothing, though by our clock it came in time: the server's was put forward.
        raise StoreError(f"the store at {self.name} was reached too late")

    def _run(
        self, statement: str, values: dict[str, Any], limit: float = TIMEOUT
    ) -> list[tuple[Any, ...]]:
        common = {"me": self._me, "lease": float(self.lease), "horizon": float(self._horizon)}
        return self._session.run(statement, {**common, **values}, limit)

    def _read(self, rows: Iterable[Sequence[Any]]) -> list[Row]:
        """Give the rows that can be read, by key, and put aside the others."""
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
    """Give a number that ends with the length of the owner's leases."""
    random = 1 + secrets.randbits(62 - sql.LEASE_BITS)
    seconds: int = min(math.ceil(lease), sql.LONGEST_LEASE)
    return (random << sql.LEASE_BITS) | seconds


def _first_token() -> int:
    """Give the even token of rows that are put."""
    return (1 << 51) + 2 * secrets.randbits(50)


def _step() -> int:
    """Give what a token grows by when its row is claimed, odd; so no earlier state has the same."""
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
