"""The protocol of stores: of those that come with this library, and of a user's own.

A row is *due* after a delay, or *claimed* by the process that is sending its message. A claim is a
lease: it expires unless it is renewed, and then the row is due for any process. Its token is a
fence: each claim of a row has a larger one, and an older one can change nothing any more, so that a
process that was frozen past its lease does no harm when it continues. Neither keys nor tokens are
used again when a store is emptied, replaced, or put back to an earlier state: a claim from before
matches no row from after.

A row may change owners. When a process deletes a row that another one stored, it leaves the row's
fate behind for a while, from which the first learns what to answer (`Store.trace`).

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

    :ivar key: the store's number for the row; a later row has a larger one
    :ivar token: the fence
    """

    key: int
    token: int


class RowFate(enum.Enum):
    """What became of a row, as `Store.trace` tells the holder of a claim on it."""

    HELD = "held"
    """The claim holds, or the row was released under it and has not been claimed since."""

    TAKEN = "taken"
    """The row exists, under a newer claim."""

    CONFIRMED = "confirmed"
    """Another owner deleted it once its message was confirmed."""

    DEAD_LETTERED = "dead-lettered"
    """Another owner deleted it once it was dead-lettered."""

    MISSING = "missing"
    """Nothing is known: its first owner deleted it, it was deleted by hand, the store was emptied
    or replaced, or its fate has expired (`FATES_LAST`)."""


FATES_LAST = 3600.0
"""Seconds for which a store keeps the fates of rows that changed owners."""

MOST_FATES = 100_000
"""How many fates a store keeps; the oldest are deleted first."""

MOST_ATTEMPTS = 2**31 - 1
LATEST = 9_000_000_000.0
"""Seconds since the epoch, in the year 2255. A store takes a row with a later time, one before the
epoch, or more attempts, for damaged."""


@define
class Record:
    """A message, and what is known of it.

    :ivar attempts: how many times it was written to the wire
    :ivar doubtful: one of these attempts may have reached a queue
    :ivar dead: retries are used up, and ``envelope`` is the dead letter
    :ivar reason: the last failure, as JSON; a store keeps it as it is
    :ivar first_failed_at: when the first attempt failed, in seconds since the epoch; 0 if none has
    :ivar accepted_at: when the producer accepted the message, in seconds since the epoch; 0 where
        that is not known. It is set when the row is stored, and does not change
    :ivar retry: the message's own retry policy, if it has one
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
    """Return a policy in the form in which stores keep it; an empty text where there is none."""
    if policy is None:
        return ""
    return f"{policy.max_retries} {policy.base_delay!r} {policy.max_delay!r}"


def read_policy(text: str) -> RetryPolicy | None:
    """Return the policy that `policy_text` was given.

    :raises ValueError: it cannot be a result of `policy_text`
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
    """A record to be stored.

    :ivar delay: seconds until it is due; ``None``: it is claimed, since it is being sent
    :ivar ahead: it is stored before its first attempt, and does not count as waiting for a retry
    """

    record: Record
    delay: float | None = None
    ahead: bool = False


@frozen
class Row:
    """A claimed row. After a lease that expired, its record is doubtful."""

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
    """How many rows a store has, of all processes.

    :ivar waiting: messages that wait for a retry, claimed for one or not, including those whose
        process ended during their first attempt
    :ivar dead: dead letters that the broker has not confirmed yet
    :ivar ahead: messages stored ahead, whose first attempt is in progress in a live process
    """

    waiting: int = 0
    dead: int = 0
    ahead: int = 0

    @property
    def stored(self) -> int:
        """Rows that have to be sent, or sent again."""
        return self.waiting + self.dead

    @property
    def total(self) -> int:
        """All rows."""
        return self.waiting + self.dead + self.ahead


class Store(Protocol):
    """A store of messages.

    Every method raises `StoreError`, which names the path or the host, where the store cannot be
    used. Each is one transaction: it takes effect as a whole or not at all.
    """

    name: str
    """The path or host, for logs and errors; without a password."""

    durable: bool
    """Whether its rows survive this process."""

    write_ahead: bool
    """Whether every message is stored before it is sent."""

    lease: float
    """Seconds for which a claim holds."""

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, and return their claims, in order.

        ``entries`` is read once, when the store is ready to write, so that messages whose publisher
        has given up by then are left out.

        :param patience: seconds to wait for the store
        :raises BufferFullError: they do not all fit; none is stored
        """

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of claimed rows; in a dead one, the dead letter replaces the message.

        :returns: the claims that no longer hold, whose rows were left unchanged
        """

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Renew leases, and return the claims that no longer hold."""

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows that have not been claimed since, even released ones; leave all others.

        A row that another owner stored leaves its fate behind, for `trace`: DEAD_LETTERED if it was
        dead, CONFIRMED if not. A row that never changed owners leaves nothing.
        """

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Return what became of the rows of these claims, in order; nothing is changed."""

    def claim(self, limit: int) -> list[Row]:
        """Claim due rows, the oldest first; fewer than ``limit`` may be only a part of them."""

    def letters(self, limit: int, after: int = 0) -> list[Row]:
        """Return dead letters with a key above ``after``, by key, unclaimed; none at the end."""

    def seize(self, row: Row) -> Row | None:
        """Claim a dead letter from `letters`; return ``None`` if it is claimed, changed or gone."""

    def depth(self) -> Depth:
        """Count the rows."""

    def close(self) -> None:
        """Make all claims of this process due at once, and close files and connections."""
