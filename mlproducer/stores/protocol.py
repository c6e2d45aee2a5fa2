"""What a store is, for those that come with this library and for a user's own.

A row is *due* after a delay, or *claimed* by whoever sends its message now. A claim is a lease: it
ends by itself unless it is renewed, and then the row is due for anybody. Its token is a fence: each
claim of a row has a larger one, and with an older one nothing can be changed any more, so that a
process that was frozen past its lease does no harm when it wakes up. Neither keys nor tokens come
again when the place is emptied, replaced, or put back to an earlier state: a claim from before
matches no row that came after.

A row may change hands. When a process deletes a row that another one stored, it leaves the row's
fate behind for a while, so that the first can tell its publisher (`Store.trace`).

Runs on: the retry thread.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Protocol

from attrs import define, field, frozen

from mlproducer.errors import ConfigurationError
from mlproducer.message import Envelope
from mlproducer.settings import RetryPolicy


@frozen
class Claim:
    """The right to change one row.

    :ivar key: the store's own name for the row; a row that came later has a larger one
    :ivar token: the fence
    """

    key: int
    token: int


class RowFate(enum.Enum):
    """What became of a row, as the holder of a claim on it can learn from `Store.trace`."""

    HELD = "held"
    """The claim holds, or the row was released under it and nobody has claimed it since."""

    TAKEN = "taken"
    """The row is there, under a newer claim."""

    CONFIRMED = "confirmed"
    """Another owner had its message confirmed, and deleted it."""

    DEAD_LETTERED = "dead-lettered"
    """Another owner delivered it as a dead letter, and deleted it."""

    MISSING = "missing"
    """There is no trace of it: its first owner deleted it, it was removed by hand, the store was
    emptied or replaced, or its fate was left longer ago than `FATES_LAST`."""


FATES_LAST = 3600.0
"""Seconds for which a store keeps the fates of rows that changed hands."""

MOST_FATES = 100_000
"""How many fates a store keeps; the oldest give way."""


@define
class Record:
    """A message, and what is known of it.

    :ivar attempts: how often it was written to the wire
    :ivar doubtful: one of these attempts may have reached a queue
    :ivar dead: retries are used up, and ``envelope`` is the dead letter
    :ivar reason: the last failure: an error's name and text
    :ivar first_failed_at: when the first attempt failed, in seconds since the epoch; 0 if none has
    :ivar accepted_at: when the producer accepted the message, in seconds since the epoch; 0 where
        that is not known. It is noted when the row is put, and does not change
    :ivar retry: how often and how soon it is tried again, if that is its own; `policy_text`
        is its form in a store
    """

    envelope: Envelope = field(repr=False)
    attempts: int = 0
    doubtful: bool = False
    dead: bool = False
    reason: str = field(default="", repr=False)
    first_failed_at: float = 0.0
    accepted_at: float = 0.0
    retry: RetryPolicy | None = None


def policy_text(policy: RetryPolicy | None) -> str:
    """Give the form that a policy has in a store; nothing where there is none."""
    if policy is None:
        return ""
    return f"{policy.max_retries} {policy.base_delay!r} {policy.max_delay!r}"


def read_policy(text: str) -> RetryPolicy | None:
    """Read what `policy_text` gave.

    :raises ValueError: it is something else
    """
    if not text:
        return None
    retries, base, longest = text.split(" ")
    try:
        return RetryPolicy(int(retries), float(base), float(longest))
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


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

    :ivar waiting: messages that wait for a retry, claimed for one or not; those of a process that
        died in their first attempt too
    :ivar dead: dead letters that the broker has not taken yet
    :ivar ahead: messages stored ahead, whose first attempt is under way in a living process
    """

    waiting: int = 0
    dead: int = 0
    ahead: int = 0

    @property
    def stored(self) -> int:
        """Those that a sender has to come back for."""
        return self.waiting + self.dead

    @property
    def total(self) -> int:
        """All rows."""
        return self.waiting + self.dead + self.ahead


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
        """Delete rows that nobody has claimed since, also released ones; leave all others alone.

        A row that another owner put leaves its fate behind, for `trace`: DEAD_LETTERED if it was
        dead, CONFIRMED if not. A row that never changed hands leaves nothing.
        """

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Say what became of the rows of these claims, in order; nothing is changed."""

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
