"""What a store is, for those that come with this library and for a user's own.

A row is *due* after a delay, or *claimed* by whoever sends its message now. A claim is a lease: it
ends by itself unless it is renewed, and then the row is due for anybody. Its token is a fence: each
claim of a row has a larger one, and with an older one nothing can be changed any more, so that a
process that was frozen past its lease does no harm when it wakes up.

Runs on: the retry thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from attrs import define, field, frozen

from mlproducer.message import Envelope


@frozen
class Claim:
    """The right to change one row.

    :ivar key: the store's own name for the row; a row that came later has a larger one
    :ivar token: the fence
    """

    key: int
    token: int


@define
class Record:
    """A message, and what is known of it.

    :ivar attempts: how often it was written to the wire
    :ivar doubtful: one of these attempts may have reached a queue
    :ivar dead: retries are used up, and ``envelope`` is the dead letter
    :ivar reason: the last failure: an error's name and text
    :ivar first_failed_at: when the first attempt failed, in seconds since the epoch; 0 if none has
    """

    envelope: Envelope = field(repr=False)
    attempts: int = 0
    doubtful: bool = False
    dead: bool = False
    reason: str = field(default="", repr=False)
    first_failed_at: float = 0.0


@define
class Entry:
    """What is to be stored.

    :ivar delay: seconds until it is due; ``None``: it is claimed, since it is being sent
    :ivar ahead: it is stored before its first attempt, and waits for no retry so far
    """

    record: Record
    delay: float | None = None
    ahead: bool = False


@frozen
class Row:
    """A claimed row. After a claim that ended by itself, its record is doubtful."""

    claim: Claim
    record: Record


@define
class Change:
    """What became of a claimed row.

    :ivar delay: seconds until it is due again; ``None``: it stays claimed
    """

    claim: Claim
    record: Record
    delay: float | None = None


@frozen
class Depth:
    """How many rows a store has, whoever wrote them.

    :ivar waiting: messages that wait for a retry; not those stored ahead, while they are claimed
    :ivar dead: dead letters that the broker has not taken yet
    """

    waiting: int = 0
    dead: int = 0

    @property
    def stored(self) -> int:
        """All together."""
        return self.waiting + self.dead


class Store(Protocol):
    """Keeps messages.

    Every method raises `StoreError`, which names the path or the host, where the store cannot be
    used. Each is one transaction: it happens as a whole or not at all.
    """

    name: str
    """The path or host, for people; no password."""

    durable: bool
    """Whether its rows survive this process."""

    write_ahead: bool
    """Whether every message is to be stored before it is sent."""

    lease: float
    """Seconds for which a claim holds."""

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, claimed, and give their claims in order.

        ``entries`` is read once, after the store has become ready to write, so that whoever has
        given up waiting by then is left out.

        :param patience: seconds to wait for the store
        :raises BufferFullError: there is no room for them all
        """

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows; a dead one gets its letter in its message's place.

        :returns: the claims among them that hold no longer, whose rows were left alone
        """

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Let leases begin anew, and give the claims that hold no longer."""

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows that nobody has claimed since, also released ones; leave all others alone."""

    def claim(self, limit: int) -> list[Row]:
        """Claim what is due, the oldest first; fewer than ``limit`` may be a part of it."""

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Show dead letters with a key above ``after``, by key, unclaimed; none at the end."""

    def seize(self, row: Row) -> Row | None:
        """Claim a letter that `letters` showed; ``None`` if it is claimed, changed or gone."""

    def depth(self) -> Depth:
        """Count the rows."""

    def close(self) -> None:
        """Make all claims of this store's own due at once, and let go of files and connections."""
