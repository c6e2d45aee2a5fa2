"""A store in Redis, for the producers of many machines.

Each call of the protocol is one script, and one round trip. Every script that claims or releases
carries the number of its call. A call that got no answer is undone before anything else is done,
so that whoever was told of a `StoreError` can rely on it.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._guard import write
from mlproducer._store_url import check_prefix
from mlproducer.errors import StoreError, frameless
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate
from mlproducer.stores.redis import scripts
from mlproducer.stores.redis.address import parse
from mlproducer.stores.redis.connection import Connection
from mlproducer.stores.redis.lua import TAG
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

logger = logging.getLogger(__name__)

MIN_PATIENCE = 0.05
"""Seconds that Redis has in any case."""

RATE = 10_000_000
"""Bytes per second at least, for messages so large that it takes time to send them."""

ROOM = 16 * 1024 * 1024
"""Bytes of messages that one call reads, so that a backlog of large ones does not fill memory."""

DAY = 86_400.0

_inherited: list[object] = []
"""Connections of a parent process: never used here, and never closed either."""


@frozen
class _Call:
    """A call that claims or releases, and has got no answer yet."""

    kind: str
    number: int
    claims: Sequence[Claim] = ()


class RedisStore:
    """Rows in Redis 7.0 or later.

    **How long a row lives** is Redis's own affair: what ``appendonly`` and ``appendfsync`` promise
    of a restart, what replication, which is asynchronous, promises of a failover (Redis guides,
    *Persistence* and *Replication*). Redis's eviction policy must be ``noeviction``; any other may
    throw messages away.

    **Time** is the Redis server's, so it does not matter what the clocks of the machines say.

    **A `put` that fails leaves nothing behind**: Redis is told until when it may take effect, and
    what has taken effect without an answer is undone by the next call, whichever that is. Until
    then the row is claimed, so nobody sends it. One case remains: Redis took the row in time, its
    answer was lost, and this process then ended, or did not get through to Redis, for a whole
    lease; then whoever is next sends the row, although its `put` raised.

    All processes that share a prefix should have the same horizon.

    :param url: ``redis://[user:password@]host[:port][/db]``, ``rediss://`` for TLS,
        ``unix://[user:password@]/path`` for a socket of this machine, or
        ``redis+sentinel://[user:password@]host[:port],.../service[/db]`` for the master that
        Sentinels name; with the options ``write_ahead`` and ``prefix``, and those of redis-py
    :param lease: seconds for which a claim holds
    :param write_ahead: store every message before it is sent; the URL's option overrules it
    :param prefix: what the names of all keys begin with; likewise
    :param horizon: seconds; no row waits longer, also where the server's clock was put back
    :raises ConfigurationError: the URL or the prefix does not parse
    """

    durable = True

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
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._owner = f"{secrets.token_hex(8)}.{self._lease}"
        self._connection = Connection(self._address, self._prefix, (scripts.OPEN, [self._owner, 0]))
        self._number = 0
        self._unanswered: _Call | None = None
        self._unfreed: list[tuple[Claim, int]] = []

    def __repr__(self) -> str:
        return f"<RedisStore {self.name}>"

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages.

        Redis answers within half a second (``socket_timeout``) or is given up, a tenth of a
        second more for each megabyte that it is to store.

        :raises StoreError: they are not stored; there is no `BufferFullError`, since Redis is out
            of memory for everybody at once
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
        self._unfreed = [
            (claim, token + _whole(entry.delay))
            for entry, claim in zip(new, claims, strict=True)
            if entry.delay is not None
        ]
        try:
            self._settle()
        except StoreError as error:
            write(
                logger,
                logging.WARNING,
                "messages are stored, but wait until this has ended: %s",
                error,
            )
        return claims

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows."""
        if not changes:
            return []
        self._get_ready()
        fields = [each for change in changes for each in change_fields(change)]
        claims = [change.claim for change in changes]
        (lost,) = self._claim("release", scripts.RELEASE, self._lease, *fields, claims=claims)
        return [claims[place] for place in lost]

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Let leases begin anew."""
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
        """Say what became of rows."""
        if not claims:
            return []
        self._get_ready()
        (fates,) = self._run(scripts.TRACE, 0, *claim_fields(claims))
        return [RowFate(fate.decode()) for fate in fates]

    def claim(self, limit: int) -> list[Row]:
        """Claim what is due, at most 16 MiB of it; fewer rows do not mean that no more is due."""
        if limit <= 0:
            return []
        self._get_ready()
        bounds = (self._lease, self._horizon, limit, ROOM)
        rows, bad = self._claim("claim", scripts.CLAIM, *bounds)
        self._tell(bad)
        return self._read(rows, [])

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Show dead letters, at most 16 MiB of them; only an empty list is the end."""
        self._get_ready()
        place: Field = after
        while True:
            rows, bad, last = self._run(scripts.LETTERS, 0, place, limit, ROOM)
            found = self._read(rows, bad)
            if found or not last:
                return found
            place = last  # no row of these could be read; there may be others behind them

    def seize(self, row: Row) -> Row | None:
        """Claim a letter."""
        self._get_ready()
        bounds = (self._lease, self._horizon)
        rows, _ = self._claim("claim", scripts.SEIZE, *bounds, *claim_fields([row.claim]))
        return next(iter(self._read(rows, [])), None)

    def depth(self) -> Depth:
        """Count the rows."""
        self._get_ready()
        total, dead, ahead = self._run(scripts.DEPTH, 0)
        return Depth(max(0, total - dead - ahead), dead, ahead)

    def close(self) -> None:
        """Make this process's claims due, and end the connection."""
        self._leave_the_parent()
        try:
            if self._number:
                self._get_ready()
                self._run(scripts.CLOSE, 0)
        finally:
            self._connection.drop()

    # --- calls ---------------------------------------------------------------------------------

    def _get_ready(self) -> None:
        self._leave_the_parent()
        self._connection.get_ready()
        self._settle()

    def _leave_the_parent(self) -> None:
        """After a fork, begin anew as somebody else."""
        if self._pid != os.getpid():
            _inherited.append(self._connection)
            self._begin()

    def _settle(self) -> None:
        """Do what earlier calls have left undone."""
        call = self._unanswered
        if call is not None:
            claims = claim_fields(call.claims)
            self._run(scripts.UNDO, call.number, call.kind, self._lease, *claims)
            self._unanswered = None
        if self._unfreed:
            due = [(claim.key, claim.token, when) for claim, when in self._unfreed]
            self._run(scripts.FREE, 0, *(each for row in due for each in row))
            self._unfreed = []

    def _put(self, rows: Sequence[Field], size: int, deadline: float) -> list[Any]:
        """Store rows; nothing is given where the server's clock says that it is too late."""
        now = time.monotonic()
        limit = now + max(MIN_PATIENCE, min(deadline - now, self._connection.timeout + size / RATE))
        latest = self._connection.server_time(limit)
        return self._claim("put", scripts.PUT, self._lease, latest, *rows, deadline=limit)

    def _claim(
        self,
        kind: str,
        script: str,
        *arguments: Field,
        claims: Sequence[Claim] = (),
        deadline: float | None = None,
    ) -> list[Any]:
        """Run a script that is to be undone if there is no answer."""
        self._number += 1
        self._unanswered = _Call(kind, self._number, claims)
        answer = self._run(script, self._number, *arguments, deadline=deadline)
        self._unanswered = None
        return answer

    def _run(
        self, script: str, number: int, *arguments: Field, deadline: float | None = None
    ) -> list[Any]:
        return self._connection.run(script, (self._owner, number, *arguments), deadline)

    # --- rows that cannot be read --------------------------------------------------------------

    def _read(self, rows: Sequence[Sequence[bytes]], bad: Sequence[bytes]) -> list[Row]:
        """Give the rows that can be read, and put aside the others."""
        good = []
        unreadable: list[tuple[bytes, bytes]] = [(key, b"") for key in bad]
        for fields in rows:
            try:
                good.append(read_row(fields))
            except UnreadableRowError:
                unreadable.append(name_of(fields))
        if unreadable:
            self._put_aside(unreadable)
        return good

    def _put_aside(self, unreadable: Sequence[tuple[bytes, bytes]]) -> None:
        try:
            self._run(scripts.QUARANTINE, 0, *(each for row in unreadable for each in row))
        except StoreError as error:
            write(logger, logging.WARNING, "unreadable rows could not be put aside: %s", error)
        self._tell([key for key, _ in unreadable])

    def _tell(self, bad: Sequence[bytes]) -> None:
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
