"""The store in an SQLite file.

Each statement handles many rows (`mlproducer.stores.sqlite.rows` says why). Messages are on disk
when `SQLiteStore.put` returns, with one fsync for all that are stored together. A deletion may be
undone by a power failure, which costs a duplicate.

Runs on: the retry thread; `letters` and `depth` on a command's thread too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate
from mlproducer.stores.sqlite import rows as rows_of
from mlproducer.stores.sqlite.database import Connection, Database
from mlproducer.stores.sqlite.rows import Found

logger = logging.getLogger(__name__)

ROOM = 4 * 1024 * 1024
"""Bytes of messages after which a call reads no more, so that a backlog does not fill memory."""

HORIZON = 60.0

FORGET = 10.0
"""Seconds between two deletions of expired fates."""


class SQLiteStore:
    """Rows in a file, with SQLite's write-ahead log beside it; only their owner may read them.

    The file is opened at the first use, and created if it does not exist, in a directory that must
    exist. A file that is damaged, or was not written by this library, is a `StoreError` and is left
    unchanged; single damaged rows are logged and moved to the table ``quarantine``.

    **Time** is the machine's monotonic clock, which all its processes share, so a jump of the wall
    clock changes nothing. After a reboot every row is due.

    **A full disk**: stored messages are still delivered and deleted; a file beside the store's
    reserves the space for that.

    :param path: a file on a local disk, relative to the current directory
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent
    :param horizon: seconds; no row waits longer. The longest of all processes applies
    :param clock: returns monotonic seconds
    """

    durable = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease: float = 30.0,
        write_ahead: bool = False,
        horizon: float = HORIZON,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        directory, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - may be bytes-like
        self.name = os.path.join(os.path.realpath(directory), name)  # noqa: PTH118
        self.lease = lease
        self.write_ahead = write_ahead
        self._horizon = max(lease, horizon)
        self._database = Database(self.name, self._horizon + 1.0, clock)
        self._forget_at = 0.0

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.name}>"

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, with one fsync for all of them.

        :raises StoreError: they are not stored; there is no `BufferFullError`, since a disk is full
            for all processes at once
        """
        new: list[Entry] = []
        coming = iter(entries)

        def work(connection: Connection) -> list[Claim]:
            new.extend(coming)
            self._database.take_space(entry.record.envelope.size for entry in new)
            owner = self._database.owner.number
            rows = [rows_of.entry_row(entry, self._due(entry.delay), owner) for entry in new]
            return _insert(connection, rows, self._database.fence.first, owner) if rows else []

        return self._database.store(work, patience)

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows, and return the claims that no longer hold."""

        def work(connection: Connection) -> set[Claim]:
            held = _held(connection, [change.claim for change in changes])
            owner = self._database.owner.number
            rows = [
                rows_of.change_row(change, self._due(change.delay), owner)
                for change in changes
                if change.claim in held
            ]
            for size, values in rows_of.in_pieces(rows):
                connection.execute(rows_of.change(size), values)
            return held

        held = self._database.change(work, safe=True) if changes else set()
        return [change.claim for change in changes if change.claim not in held]

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Renew leases, and return the claims that no longer hold."""

        def work(connection: Connection) -> set[Claim]:
            held = _held(connection, claims)
            keys = json.dumps([claim.key for claim in held])
            connection.execute(rows_of.RENEW, (self._due(None), keys))
            return held

        held = self._database.change(work) if claims else set()
        return [claim for claim in claims if claim not in held]

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows."""
        tokens: dict[int, list[int]] = {}
        for claim in claims:
            tokens.setdefault(claim.token, []).append(claim.key)
        orders = [(token, json.dumps(keys)) for token, keys in tokens.items()]
        others = [order for order in orders if order[0] % 2]

        def work(connection: Connection) -> None:
            if others:
                self._leave_fates(connection, others)
            for order in orders:
                connection.execute(rows_of.DONE, order)

        if len(orders) == 1 and not others:
            self._database.run(work)  # a transaction in one statement
        elif orders:
            self._database.change(work)

    def _leave_fates(self, connection: Connection, orders: Sequence[tuple[int, str]]) -> None:
        """Leave the fates of rows that other owners stored, and delete expired ones."""
        now = self._database.now()
        for order in orders:
            connection.execute(rows_of.LEAVE_FATES, (now, *order))
        if time.monotonic() >= self._forget_at:
            connection.execute(rows_of.FORGET_FATES, {"now": now})
            self._forget_at = time.monotonic() + FORGET

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Return what became of rows."""

        def work(connection: Connection) -> list[RowFate]:
            keys = {"keys": json.dumps([claim.key for claim in claims])}
            return rows_of.fates(claims, *connection.execute(rows_of.TRACE, keys).fetchone())

        return self._database.run(work) if claims else []

    def claim(self, limit: int) -> list[Row]:
        """Claim due rows, about 4 MiB of them at most; fewer than ``limit`` may be only a part."""

        def work(connection: Connection) -> Found:
            self._database.take_over(connection)
            most = min(limit, self._database.most_rows)
            bounds = {"now": self._database.now(), "limit": most, "room": ROOM}
            (keys,) = connection.execute(rows_of.DUE, bounds).fetchone()
            return self._claim(connection, keys)

        return self._claimed(self._database.own(work)) if limit > 0 else []

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Return dead letters, about 4 MiB of them at most; only an empty list is the end."""

        def work(connection: Connection) -> Found:
            bounds = {"after": after, "limit": limit, "room": ROOM}
            (keys,) = connection.execute(rows_of.LETTERS, bounds).fetchone()
            return _read(connection, keys)

        found = self._database.run(work)
        if not found.damaged:
            return found.rows
        self._log_damaged(self._database.change(lambda each: _recheck(each, found.damaged)))
        return self.letters(limit, after)

    def seize(self, row: Row) -> Row | None:
        """Claim a dead letter."""
        key, token = row.claim.key, row.claim.token

        def work(connection: Connection) -> Found:
            self._database.take_over(connection)
            bounds = {"key": key, "token": token, "now": self._database.now()}
            (there,) = connection.execute(rows_of.LETTER, bounds).fetchone()
            return self._claim(connection, json.dumps([key] if there else []))

        return next(iter(self._claimed(self._database.own(work))), None)

    def depth(self) -> Depth:
        """Count the rows."""

        def work(connection: Connection) -> tuple[int, int, int]:
            gone = json.dumps(self._database.dead(connection))
            values = {"now": self._database.now(), "gone": gone}
            counts = connection.execute(rows_of.DEPTH, values).fetchone()
            return counts[0], counts[1], counts[2]

        total, dead, ahead = self._database.run(work)
        return Depth(total - dead - ahead, dead, ahead)

    def close(self) -> None:
        """Make this process's claims due, and close the file."""
        self._database.close()

    def _due(self, delay: float | None) -> float:
        """Return when a delay ends, or, without one, a lease."""
        seconds = self.lease if delay is None else min(delay, self._horizon)
        return self._database.now() + seconds

    # --- rows, within a transaction and after it -----------------------------------------------

    def _claim(self, connection: Connection, keys: str) -> Found:
        database = self._database
        values = {"step": database.fence.step, "me": database.owner.number, "due": self._due(None)}
        connection.execute(rows_of.CLAIM, {**values, "keys": keys})
        found = _read(connection, keys)
        _quarantine(connection, found.damaged)
        return found

    def _claimed(self, found: Found) -> list[Row]:
        self._log_damaged(found)
        return found.rows

    def _log_damaged(self, found: Found) -> None:
        for key in found.damaged:
            write(
                logger,
                logging.ERROR,
                "row %d of the store %s is damaged; it is now in the table quarantine",
                key,
                self.name,
            )


def _insert(
    connection: Connection, rows: Sequence[tuple[Any, ...]], token: int, origin: int
) -> list[Claim]:
    for size, values in rows_of.in_pieces(rows):
        done = connection.execute(rows_of.insert(size), [token, origin, *values])
        last = done.lastrowid or 0
    return [Claim(key, token) for key in range(last - len(rows) + 1, last + 1)]


def _held(connection: Connection, claims: Iterable[Claim]) -> set[Claim]:
    """Return those of these claims that still hold."""
    by_key = {claim.key: claim for claim in sorted(claims, key=lambda claim: claim.token)}
    (keys,) = connection.execute(rows_of.HELD, (rows_of.pairs(by_key.values()),)).fetchone()
    return {by_key[key] for key in json.loads(keys)}


def _read(connection: Connection, keys: str) -> Found:
    numbers, content = connection.execute(rows_of.READ, (keys,)).fetchone()
    return rows_of.read(numbers, content)


def _recheck(connection: Connection, keys: Sequence[int]) -> Found:
    """Read rows again, within the transaction, and quarantine those that are damaged."""
    found = _read(connection, json.dumps(keys))
    _quarantine(connection, found.damaged)
    return found


def _quarantine(connection: Connection, damaged: Sequence[int]) -> None:
    if damaged:
        keys = json.dumps(damaged)
        for statement in rows_of.QUARANTINE:
            connection.execute(statement, (keys,))
