"""A store in memory: bounded, and lost with the process. Its claims do not expire.

Runs on: the retry thread, its only owner; any thread may read its depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence

from attrs import define, evolve

from mlproducer import _clock as time
from mlproducer.errors import BufferFullError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Row, RowFate

MAX_ROWS = 10_000
MAX_BYTES = 64 * 1024 * 1024


@define
class _Slot:
    """A row; it is claimed while it has no due time.

    :ivar ahead: it was stored before its first attempt, which is in progress
    """

    record: Record
    token: int
    due: float | None
    ahead: bool


class MemoryStore:
    """Rows in a dict, in the order in which they were stored.

    :param clock: returns monotonic seconds
    """

    name = "memory"
    durable = False
    write_ahead = False
    lease = math.inf

    def __init__(
        self,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._clock = clock
        self._slots: dict[int, _Slot] = {}
        self._bytes = 0
        self._dead = 0
        self._ahead = 0
        self._last_key = 0

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, if there is room for all of them.

        :raises BufferFullError: they do not all fit
        """
        new, size = list(entries), 0
        for entry in new:
            size += entry.record.envelope.size
        if size > self._max_bytes and len(new) == 1:
            raise BufferFullError(
                f"a message of {size} bytes is larger than the memory store, which holds "
                f"{self._max_bytes}"
            )
        if len(self._slots) + len(new) > self._max_rows or self._bytes + size > self._max_bytes:
            raise BufferFullError(
                f"the memory store is full ({len(self._slots)} messages, {self._bytes} bytes)"
            )
        return list(map(self._add, new))

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows, and return the claims that no longer hold."""
        lost = []
        for change in changes:
            slot = self._slots.get(change.claim.key)
            if slot is None or slot.token != change.claim.token or slot.due is not None:
                lost.append(change.claim)
                continue
            self._count(slot, -1)
            slot.record, slot.ahead = change.record, False
            self._count(slot, 1)
            slot.due = self._due(change.delay)
        return lost

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Return the claims that no longer hold; the others do not expire."""
        return [claim for claim in claims if not self._holds(claim)]

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows."""
        for claim in claims:
            slot = self._slots.get(claim.key)
            if slot is not None and slot.token == claim.token:
                self._count(self._slots.pop(claim.key), -1)

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Return what became of rows; all are of this process, so a deleted one left no fate."""
        return [self._fate(claim) for claim in claims]

    def claim(self, limit: int) -> list[Row]:
        """Claim due rows, the oldest first."""
        now = self._clock()
        rows: list[Row] = []
        for key, slot in self._slots.items():
            if len(rows) == limit:
                break
            if slot.due is not None and slot.due <= now:
                rows.append(self._claimed(key, slot))
        return rows

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Return dead letters, by key."""
        dead = [
            Row(Claim(key, slot.token), slot.record)
            for key, slot in self._slots.items()
            if key > after and slot.record.dead
        ]
        return dead[:limit]

    def seize(self, row: Row) -> Row | None:
        """Claim a dead letter."""
        slot = self._slots.get(row.claim.key)
        if slot is None or slot.token != row.claim.token or slot.due is None:
            return None
        return self._claimed(row.claim.key, slot)

    def reclaim(self, held: Container[Claim], known: Container[int]) -> None:
        """Make due what is claimed and not held, and delete what is not known.

        The calls that claimed or stored it were cut before they returned.

        :param known: the keys of rows that are remembered
        """
        for key, slot in list(self._slots.items()):
            if key not in known:
                self._count(self._slots.pop(key), -1)
            elif slot.due is None and Claim(key, slot.token) not in held:
                slot.due = self._clock()

    def depth(self) -> Depth:
        """Count the rows."""
        return Depth(len(self._slots) - self._dead - self._ahead, self._dead, self._ahead)

    def close(self) -> None:
        """Make claimed rows due."""
        now = self._clock()
        for slot in self._slots.values():
            if slot.due is None:
                self._count(slot, -1)
                slot.due, slot.record, slot.ahead = now, evolve(slot.record, doubtful=True), False
                self._count(slot, 1)

    def _add(self, entry: Entry) -> Claim:
        self._last_key += 1
        due = None if entry.delay is None else self._clock() + entry.delay
        slot = _Slot(entry.record, 1, due, entry.ahead)
        self._slots[self._last_key] = slot
        self._count(slot, 1)
        return Claim(self._last_key, 1)

    def _claimed(self, key: int, slot: _Slot) -> Row:
        slot.due = None
        slot.token += 1
        return Row(Claim(key, slot.token), slot.record)

    def _holds(self, claim: Claim) -> bool:
        slot = self._slots.get(claim.key)
        return slot is not None and slot.token == claim.token and slot.due is None

    def _fate(self, claim: Claim) -> RowFate:
        slot = self._slots.get(claim.key)
        if slot is None:
            return RowFate.MISSING
        return RowFate.HELD if slot.token == claim.token else RowFate.TAKEN

    def _due(self, delay: float | None) -> float | None:
        return None if delay is None else self._clock() + delay

    def _count(self, slot: _Slot, sign: int) -> None:
        self._bytes += sign * slot.record.envelope.size
        self._dead += sign * slot.record.dead
        self._ahead += sign * slot.ahead
