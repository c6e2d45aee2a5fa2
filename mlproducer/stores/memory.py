"""A store in memory: bounded, and gone with the process.

Runs on: the retry thread, its only owner; anyone may read its depth.
"""

from __future__ import annotations

from attrs import define, field, frozen

from mlproducer.errors import BufferFullError
from mlproducer.message import Envelope
from mlproducer.stores.protocol import Depth

MAX_ROWS = 10_000
MAX_BYTES = 64 * 1024 * 1024


@frozen
class Row:
    """A claimed row; goes with the move to the protocol's."""

    key: int
    envelope: Envelope = field(repr=False)
    attempts: int


@define
class _Slot:
    envelope: Envelope
    attempts: int
    due: float | None
    dead: bool = False


class MemoryStore:
    """Rows in a dict, in the order in which they came."""

    durable = False

    def __init__(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._slots: dict[int, _Slot] = {}
        self._bytes = 0
        self._last_key = 0

    def put(self, envelope: Envelope, attempts: int, due: float | None) -> int:
        """Store a message and give its key.

        :raises BufferFullError: there is no room
        """
        if len(self._slots) >= self._max_rows or self._bytes + envelope.size > self._max_bytes:
            raise BufferFullError(
                f"the memory store is full ({len(self._slots)} messages, {self._bytes} bytes)",
                message_id=envelope.message_id,
                attempts=attempts,
            )
        self._last_key += 1
        self._slots[self._last_key] = _Slot(envelope, attempts, due)
        self._bytes += envelope.size
        return self._last_key

    def release(self, key: int, attempts: int, due: float | None) -> None:
        """Note a claimed row's attempts, and when it is due next."""
        slot = self._slots[key]
        slot.attempts, slot.due = attempts, due

    def bury(self, key: int, envelope: Envelope, due: float | None) -> None:
        """Put its dead letter in the place of a claimed row's message."""
        slot = self._slots[key]
        self._bytes += envelope.size - slot.envelope.size
        self._slots[key] = _Slot(envelope, slot.attempts, due, dead=True)

    def claim(self, now: float, limit: int) -> list[Row]:
        """Claim what is due, the oldest first."""
        rows: list[Row] = []
        for key, slot in self._slots.items():
            if len(rows) == limit:
                break
            if slot.due is not None and slot.due <= now:
                slot.due = None
                rows.append(Row(key, slot.envelope, slot.attempts))
        return rows

    def done(self, key: int) -> None:
        """Delete a row."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._bytes -= slot.envelope.size

    def depth(self) -> Depth:
        """Count the rows."""
        dead = sum(slot.dead for slot in self._slots.values())
        return Depth(len(self._slots) - dead, dead)
