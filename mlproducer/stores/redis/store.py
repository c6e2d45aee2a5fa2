"""The store in Redis: each call of the protocol is one script, and one round trip.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer._store_url import check_prefix
from mlproducer.errors import StoreError, frameless
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate
from mlproducer.stores.redis import scripts
from mlproducer.stores.redis.address import parse
from mlproducer.stores.redis.connection import Connection
from mlproducer.stores.redis.rows import (
    MICROSECONDS,
    Field,
    UnreadableRowError,
    change_fields,
    claim_fields,
    entry_fields,
    name_of,
    read_row,
)
from mlproducer.stores.redis.scripts import TAG
from mlproducer.stores.server_store import DAY, MIN_PATIENCE, ROOM, Call, StoreOnServer

logger = logging.getLogger(__name__)

RATE = 5_000_000
"""Bytes per second that are sent at least; more time is allowed for large messages."""


class RedisStore(StoreOnServer):
    """Rows in Redis 7.0 or later.

    **Durability** is Redis's: ``appendonly`` and ``appendfsync`` decide what survives a restart,
    and replication, which is asynchronous, what survives a failover (Redis guides, *Persistence*
    and *Replication*). The eviction policy must be ``noeviction``; with any other Redis may evict
    messages.

    **Time** is the Redis server's, so the clocks of the machines need not agree.

    **A `put` that fails leaves nothing behind**: the script does nothing after a deadline, and
    what took effect without an answer is undone by the next call, whichever that is. Until then
    the row is claimed, so that no process sends it. One case remains: Redis stored the row in time,
    its answer was lost, and this process then ended, or could not reach Redis, for a whole lease;
    then another process sends the row, although its `put` raised.

    All processes that share a prefix should have the same horizon.

    :param url: ``redis://[user:password@]host[:port][/db]``, ``rediss://`` for TLS,
        ``unix://[user:password@]/path`` for a socket of this machine, or
        ``redis+sentinel://[user:password@]host[:port],.../service[/db]`` for the master that
        Sentinels name; with the options ``write_ahead`` and ``prefix``, and those of redis-py
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent; the URL's option takes precedence
    :param prefix: with which the names of all keys begin; the URL's option takes precedence
    :param horizon: seconds; no row waits longer, even where the server's clock was set back
    :raises ConfigurationError: the URL or the prefix does not parse
    """

    durable = True
    _connection: Connection

    @frameless
    def __init__(
        self,
        url: str,
        *,
        lease: float = 30.0,
        write_ahead: bool = False,
        prefix: str = "mlproducer:",
        horizon: float = DAY,
    ) -> None:
        self._address = parse(url)
        self.name = self._address.name
        self.lease = lease
        chosen = self._address.write_ahead
        self.write_ahead = write_ahead if chosen is None else chosen
        self._prefix = (self._address.prefix or check_prefix(prefix)) + TAG
        self._lease = _whole(lease)
        self._horizon = _whole(max(lease, horizon))
        self._start()

    def _start(self) -> None:
        super()._start()
        self._owner = f"{secrets.token_hex(8)}.{self._lease}"
        self._connection = Connection(self._address, self._prefix, (scripts.OPEN, [self._owner, 0]))

    def __repr__(self) -> str:
        return f"<RedisStore {self.name}>"

    @frameless
    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages.

        Redis has half a second to answer (``socket_timeout``), and a fifth more for each megabyte.

        :raises StoreError: they are not stored; there is no `BufferFullError`, since Redis runs out
            of memory for all its clients at once
        """
        deadline = time.monotonic() + patience
        self._get_ready()
        new = list(entries)
        if not new:
            return []
        rows = [each for entry in new for each in entry_fields(entry)]
        size = sum(entry.record.envelope.size for entry in new)
        answer = self._put(rows, size, deadline) or self._put(rows, size, deadline)
        if not answer:
            raise StoreError(f"the store at {self.name} was reached too late")
        first, token = map(int, answer)
        claims = [Claim(first + place, token) for place in range(len(new))]
        self._free_stored(new, claims)
        return claims

    @frameless
    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows, and return the claims that no longer hold."""
        if not changes:
            return []
        self._get_ready()
        fields = [each for change in changes for each in change_fields(change)]
        claims = [change.claim for change in changes]
        size = sum(each.record.envelope.size for each in changes if each.record.dead)
        limit = time.monotonic() + self._connection.timeout + size / RATE
        (lost,) = self._call(
            "release", scripts.RELEASE, self._lease, *fields, claims=claims, deadline=limit
        )
        return [claims[place] for place in lost]

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Renew leases, and return the claims that no longer hold."""
        if not claims:
            return []
        self._get_ready()
        (lost,) = self._run(scripts.RENEW, 0, self._lease, *claim_fields(claims))
        return [claims[place] for place in lost]

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows."""
        if claims:
            self._get_ready()
            self._run(scripts.DONE, 0, *claim_fields(claims))

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Return what became of rows."""
        if not claims:
            return []
        self._get_ready()
        (fates,) = self._run(scripts.TRACE, 0, *claim_fields(claims))
        return [RowFate(fate.decode()) for fate in fates]

    def claim(self, limit: int) -> list[Row]:
        """Claim due rows, at most 16 MiB of them; fewer than ``limit`` may be only a part."""
        if limit <= 0:
            return []
        self._get_ready()
        bounds = (self._lease, self._horizon, limit, ROOM)
        rows, bad = self._call("claim", scripts.CLAIM, *bounds)
        self._log_quarantined(bad)
        return self._read(rows, [])

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Return dead letters, at most 16 MiB of them; only an empty list is the end."""
        self._get_ready()
        place: Field = after
        while True:
            rows, bad, last = self._run(scripts.LETTERS, 0, place, limit, ROOM)
            found = self._read(rows, bad)
            if found or not last:
                return found
            place = last  # none of these could be read, but later ones may be

    def seize(self, row: Row) -> Row | None:
        """Claim a dead letter."""
        self._get_ready()
        bounds = (self._lease, self._horizon)
        rows, _ = self._call("claim", scripts.SEIZE, *bounds, *claim_fields([row.claim]))
        return next(iter(self._read(rows, [])), None)

    def depth(self) -> Depth:
        """Count the rows."""
        self._get_ready()
        total, dead, ahead = self._run(scripts.DEPTH, 0)
        return Depth(max(0, total - dead - ahead), dead, ahead)

    def close(self) -> None:
        """Make this process's claims due, and close the connection."""
        self._leave_parent()
        try:
            if self._number:
                self._get_ready()
                self._run(scripts.CLOSE, 0)
        finally:
            self._connection.drop()

    # --- calls ---------------------------------------------------------------------------------

    def _undo(self, call: Call) -> None:
        claims = claim_fields(call.claims)
        self._run(scripts.UNDO, call.number, call.undo, self._lease, *claims)

    def _free(self, delayed: Sequence[tuple[Claim, float]]) -> None:
        # The token of a row that was stored is the server's time then.
        due = [(claim.key, claim.token, claim.token + _whole(delay)) for claim, delay in delayed]
        self._run(scripts.FREE, 0, *(each for row in due for each in row))

    def _put(self, rows: Sequence[Field], size: int, deadline: float) -> list[Any]:
        """Store rows; return nothing where the deadline has passed by the server's clock."""
        now = time.monotonic()
        limit = now + max(MIN_PATIENCE, min(deadline - now, self._connection.timeout + size / RATE))
        latest = self._connection.server_time(limit)
        return self._call("put", scripts.PUT, self._lease, latest, *rows, deadline=limit)

    def _call(
        self,
        undo: str,
        script: str,
        *arguments: Field,
        claims: Sequence[Claim] = (),
        deadline: float | None = None,
    ) -> list[Any]:
        """Run a script that is to be undone if there is no answer."""
        number = self._next_call(undo, claims)
        answer = self._run(script, number, *arguments, deadline=deadline)
        self._answered()
        return answer

    def _run(
        self, script: str, number: int, *arguments: Field, deadline: float | None = None
    ) -> list[Any]:
        return self._connection.run(script, (self._owner, number, *arguments), deadline)

    # --- rows that cannot be read --------------------------------------------------------------

    def _read(self, rows: Sequence[Sequence[bytes]], bad: Sequence[bytes]) -> list[Row]:
        """Return the rows that can be read, and quarantine the others."""
        good = []
        unreadable: list[tuple[bytes, bytes]] = [(key, b"") for key in bad]
        for fields in rows:
            try:
                good.append(read_row(fields))
            except UnreadableRowError:
                unreadable.append(name_of(fields))
        if unreadable:
            self._quarantine(unreadable)
        return good

    def _quarantine(self, unreadable: Sequence[tuple[bytes, bytes]]) -> None:
        try:
            self._run(scripts.QUARANTINE, 0, *(each for row in unreadable for each in row))
        except StoreError as error:
            write(logger, logging.WARNING, "unreadable rows could not be quarantined: %s", error)
        self._log_quarantined([key for key, _ in unreadable])

    def _log_quarantined(self, bad: Sequence[bytes]) -> None:
        for key in bad:
            write(
                logger,
                logging.ERROR,
                "row %s of the store at %s is unreadable; its key is now in %squarantine",
                ascii(key.decode(errors="replace")[:100]),
                self.name,
                self._prefix,
            )


def _whole(seconds: float) -> int:
    return int(seconds * MICROSECONDS)
