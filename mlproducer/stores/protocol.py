"""What a store is, for those that come with this library and for a user's own.

Runs on: the retry thread.
"""

from __future__ import annotations

from typing import Protocol

from attrs import field, frozen

from mlproducer.message import Envelope


@frozen
class Row:
    """A message in a store.

    :ivar key: the store's own name for it
    :ivar attempts: how often it has been written to the wire
    """

    key: int
    envelope: Envelope = field(repr=False)
    attempts: int


@frozen
class Depth:
    """How many rows a store has: messages that wait for a retry, and dead letters."""

    waiting: int
    dead: int


class Store(Protocol):
    """Keeps messages. A row is *due* at a time, or *claimed* by whoever sends it now.

    Times are monotonic seconds. Every method raises `StoreError` where the store cannot be used.
    """

    durable: bool
    """Whether its rows survive this process."""

    def put(self, envelope: Envelope, attempts: int, due: float | None) -> int:
        """Store a message, claimed where ``due`` is ``None``, and give its key.

        :raises BufferFullError: there is no room
        """

    def release(self, key: int, attempts: int, due: float | None) -> None:
        """Note a claimed row's attempts, and when it is due next."""

    def bury(self, key: int, envelope: Envelope, due: float | None) -> None:
        """Put its dead letter in the place of a claimed row's message; it counts as dead."""

    def claim(self, now: float, limit: int) -> list[Row]:
        """Claim what is due, the oldest first."""

    def done(self, key: int) -> None:
        """Delete a row."""

    def depth(self) -> Depth:
        """Count the rows."""
