"""A store in an SQLite file, for all the processes of one machine.

Statements are few and do much at once (`mlproducer.stores.sqlite.rows` says why). What is stored
is on the disk when `SQLiteStore.put` returns, and messages stored together share one fsync; a
deletion may be undone by a power failure, which costs a duplicate.

Runs on: the retry thread; `letters` and `depth` on a command's thread too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._guard import write
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate
from mlproducer.stores.sqlite import rows as rows_of
from mlproducer.stores.sqlite.database import Connection, Database
from mlproducer.stores.sqlite.rows import Found

logger = logging.getLogger(__name__)

ROOM = 4 * 1024 * 1024
"""Bytes of messages that one call reads, and one message more: a backlog does not fill memory."""

HORIZON = 60.0

FORGET = 10.0
"""Seconds between two looks for fates that are old."""


class SQLiteStore:
    """Rows in a file, with SQLite's write-ahead log beside it; both are their owner's alone.

    It is opened at the first use, and made if it is not there; its directory has to be. A file that
    is damaged, or not this library's, is a `StoreError` and stays as it is; single rows that are
    damaged are logged, and put aside in the table ``quarantine``.

    **Time** is the machine's monotonic clock, which all its processes share, so a jump of the wall
    clock changes nothing; after the machine has booted, everything is due.

    **A full disk**: what is there is delivered and deleted nevertheless, with the help of a file
    that is kept beside the store's for this.

    :param path: names a file on a local disk; a relative one is of the current directory
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent
    :param horizon: seconds; no row waits longer. The longest of all processes holds for all
    :param clock: gives monotonic seconds
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
            for everybody at once
        """
        new: list[Entry] = []

        coming = iter(entries)

        def work(connection: Connection) -> list[Claim]:
            new.extend(coming)
            self._database.take_room(entry.record.envelope.size for entry in new)
            owner = self._database.owner.number
            rows = [rows_of.entry_row(entry, self._due(entry.delay), owner) for entry in new]
            return _insert(connection, rows, self._database.fence.first, owner) if rows else []

        return self._database.store(work, patience)

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows."""

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
        """Let leases begin anew."""

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
        """Leave the fates of rows that other owners put, and forget those that are old."""
        now = self._database.now()
        for order in orders:
            connection.execute(rows_of.LEAVE_FATES, (now, *order))
        if time.monotonic() >= self._forget_at:
            connection.execute(rows_of.FORGET_FATES, {"now": now})
            self._forget_at = time.monotonic() + FORGET

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Say what became of rows."""

        def work(connection: Connection) -> list[RowFate]:
            keys = {"keys": json.dumps([claim.key for claim in claims])}
            return rows_of.fates(claims, *connection.execute(rows_of.TRACE, keys).fetchone())

        return self._database.run(work) if claims else []

    def claim(self, limit: int) -> list[Row]:
        """Claim what is due, about 4 MiB of it at most; fewer rows do not mean that it was all."""

        def work(connection: Connection) -> Found:
            self._database.take_over(connection)
            most = min(limit, self._database.most_rows)
            bounds = {"now": self._database.now(), "limit": most, "room": ROOM}
            (keys,) = connection.execute(rows_of.DUE, bounds).fetchone()
            return self._claim(connection, keys)

        return self._claimed(self._database.own(work)) if limit > 0 else []

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Show dead letters, about 4 MiB of them at most; only an empty list is the end."""

        def work(connection: Connection) -> Found:
            bounds = {"after": after, "limit": limit, "room": ROOM}
            (keys,) = connection.execute(rows_of.LETTERS, bounds).fetchone()
            return _read(connection, keys)

        found = self._database.run(work)
        if not found.damaged:
            return found.rows
        self._tell(self._database.change(lambda each: _set_aside(each, found.damaged)))
        return self.letters(limit, after)

    def seize(self, row: Row) -> Row | None:
        """Claim a letter."""
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
        """Give the end of a lease, or of a delay."""
        seconds = self.lease if delay is None else min(delay, self._horizon)
        return self._database.now() + seconds

    # --- rows, within a transaction and after it -----------------------------------------------

    def _claim(self, connection: Connection, keys: str) -> Found:
        database = self._database
        values = {"step": database.fence.step, "me": database.owner.number, "due": self._due(None)}
        connection.execute(rows_of.CLAIM, {**values, "keys": keys})
        found = _read(connection, keys)
        _put_aside(connection, found.damaged)
        return found

    def _claimed(self, found: Found) -> list[Row]:
        self._tell(found)
        return found.rows

    def _tell(self, found: Found) -> None:
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
    """Give those of these claims that hold."""
    by_key = {claim.key: claim for claim in sorted(claims, key=lambda claim: claim.token)}
    (keys,) = connection.execute(rows_of.HELD, (rows_of.pairs(by_key.values()),)).fetchone()
    return {by_key[key] for key in json.loads(keys)}


def _read(connection: Connection, keys: str) -> Found:
    numbers, content = connection.execute(rows_of.READ, (keys,)).fetchone()
    return rows_of.found(numbers, content)


def _set_aside(connection: Connection, keys: Sequence[int]) -> Found:
    """Put those of these rows aside that are damaged, and not only seemed so."""
    found = _read(connection, json.dumps(keys))
    _put_aside(connection, found.damaged)
    return found


def _put_aside(connection: Connection, damaged: Sequence[int]) -> None:
    if damaged:
        keys = json.dumps(damaged)
        for statement in rows_of.QUARANTINE:
            connection.execute(statement, (keys,))
