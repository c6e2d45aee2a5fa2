"""Which delivery belongs to which row of the store.

In a durable store a row may outlive its delivery, and may be another process's: then a delivery
is made of the record, and no one waits for it here. While a row waits there, its delivery is
remembered only as long as a program holds the receipt or future that it is to resolve, and without
its body; so a backlog takes no memory. In the memory store the delivery is all there is, and stays.

Runs on: the retry thread; `StoredRows.deliveries` and `StoredRows.has_row` on any.
"""

from __future__ import annotations

import json
import math
from collections.abc import MutableMapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from weakref import WeakKeyDictionary, WeakValueDictionary

from attrs import define, frozen

from mlproducer import errors
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_states import AnswerEvent
from mlproducer._engine.store_orders import Put
from mlproducer.errors import PublishError
from mlproducer.stores.protocol import LATEST, MOST_ATTEMPTS, Claim, Record, Row

_TEXT_MAX = 255
"""Characters of an error's text that a row keeps."""

SAFETY = 0.9
"""The part of a lease in which its holder relies on it."""


@frozen
class Reason:
    """Why a message failed last, as its row keeps it.

    :ivar error: the error's class
    :ivar route_was_there: the message waits for a route that it had before, beyond its retries
    """

    error: type[PublishError]
    text: str
    route_was_there: bool


@define(eq=False)
class LostRow:
    """A row whose claim was lost: it is gone, or another process's.

    :ivar put: what is to be stored should it be gone; ``None``: the message as it is then
    :ivar told: its connection has been told that another process has it
    """

    claim: Claim
    put: Put | None = None
    told: bool = False

    @property
    def decided_by_connection(self) -> bool:
        """Whether an order about it is still to come, or to be carried out."""
        return self.put is None or self.put.entry.delay is None


class StoredRows:
    """Deliveries whose message is in the store.

    :param lease: seconds for which a claim holds
    :ivar claims: the claim of each row that is this process's now
    :ivar ahead: those stored ahead of their first attempt, which is under way
    :ivar lost_rows: those whose claim was lost, until their fate is known
    :ivar rowless: those that are ours and have no row, though they should
    :ivar renew_at: monotonic time at which leases have to be renewed
    """

    def __init__(self, lease: float, *, durable: bool) -> None:
        self._lease = lease
        self._durable = durable
        self.renew_at = math.inf
        self._parked: MutableMapping[int, Delivery] = WeakValueDictionary() if durable else {}
        self._last: WeakKeyDictionary[Delivery, Claim] = WeakKeyDictionary()
        self._expected: WeakKeyDictionary[Delivery, Claim] = WeakKeyDictionary()
        self.claims: dict[Delivery, Claim] = {}
        self.ahead: set[Delivery] = set()
        self.lost_rows: dict[Delivery, LostRow] = {}
        self.rowless: dict[Delivery, Put] = {}

    @property
    def waits(self) -> bool:
        """Whether a receipt or future of this process waits for an unclaimed row."""
        return bool(self._last)

    def has_row(self, delivery: Delivery) -> bool:
        """Whether its row is there, and this process's."""
        return delivery in self.claims

    def deliveries(self) -> list[Delivery]:
        """Return all that are remembered."""
        # Each `*` copies a dict in one step, whatever the retry thread does to it meanwhile. The
        # values of a WeakValueDictionary are made one by one, so its references are copied instead.
        if not isinstance(self._parked, WeakValueDictionary):
            kept = [*self.claims, *self.lost_rows, *self.rowless, *self._parked.values()]
            return list(dict.fromkeys(kept))
        alive = [reference() for reference in self._parked.valuerefs()]
        waiting = (delivery for delivery in alive if delivery is not None)
        return list(dict.fromkeys([*self.claims, *self.lost_rows, *self.rowless, *waiting]))

    def lost_and_waiting(self) -> list[tuple[Delivery, Claim]]:
        """Return the last claims of rows that another process may have, or have ended."""
        lost = [(delivery, row.claim) for delivery, row in self.lost_rows.items()]
        if not self._durable:
            return lost
        waiting = [(each, claim) for each, claim in self._last.items() if each.open]
        expected = [(each, claim) for each, claim in self._expected.items() if each.open]
        return lost + waiting + expected

    def expect(self, delivery: Delivery, claim: Claim) -> None:
        """Remember a row of a transaction that is not over: it comes with the COMMIT, or never."""
        self._parked[claim.key] = delivery
        self._expected[delivery] = claim

    def expects(self, delivery: Delivery) -> bool:
        """Whether its row may still come, and it is no news that it is not there."""
        return delivery in self._expected

    def first_seen_taken(self, delivery: Delivery) -> bool:
        """Note that another process has a row; false where that is no news, or does no harm."""
        row = self.lost_rows.get(delivery)
        if row is None or row.told:
            return False
        row.told = True
        return True

    def hold(self, delivery: Delivery, claim: Claim, now: float) -> None:
        """Remember a claim, whose lease began at ``now`` or later."""
        self.claims[delivery] = claim
        self._begin_lease(delivery, now)

    def renewed(self, lost: Sequence[Claim], now: float) -> None:
        """Renew all leases, but for those that have been lost."""
        self.renew_at = math.inf
        gone = set(lost)
        for delivery, claim in list(self.claims.items()):
            if claim in gone:
                self.lose(delivery)
            else:
                self._begin_lease(delivery, now)

    def lose(self, delivery: Delivery) -> None:
        """Note that a claim does not hold any more; what is the matter is seen by
        `StoreWriter.trace`.

        Should the row come back to this process, its delivery is found by the row's key.
        """
        claim = self.claims.pop(delivery, None)
        if claim is not None:
            delivery.lease(-math.inf)
            self.ahead.discard(delivery)
            self.lost_rows[delivery] = LostRow(claim)
            self._parked[claim.key] = delivery

    def _begin_lease(self, delivery: Delivery, now: float) -> None:
        self.renew_at = min(self.renew_at, now + self._lease / 3)
        delivery.lease(now + self._lease * SAFETY)

    def park(self, delivery: Delivery, claim: Claim) -> None:
        """Remember a delivery whose row waits, claimed by no process."""
        self._parked[claim.key] = delivery
        self._last[delivery] = claim
        if self._durable:
            delivery.unload()
        self.claims.pop(delivery, None)  # last, should this be cut

    def claim_of(self, delivery: Delivery) -> Claim | None:
        """Return the last claim of its row, which holds if no process has claimed it since."""
        lost_row = self.lost_rows.get(delivery)
        claim = self.claims.get(delivery) or self._last.get(delivery)
        claim = claim or self._expected.get(delivery)
        return claim or (None if lost_row is None else lost_row.claim)

    def regain(self, row: Row, now: float) -> bool:
        """Hold a row again whose delivery has been with its connection all the time.

        The delivery is queued there, in flight, or has just failed, so that it must not be handed
        out: what comes of it is noted under the new claim.

        :returns: false for any other row, which is to be taken
        """
        delivery = self._parked.get(row.claim.key)
        if delivery is None or not delivery.open:
            return False
        lost_row = self.lost_rows.get(delivery)
        if lost_row is None or not lost_row.decided_by_connection:
            return False
        del self.lost_rows[delivery]
        self._parked.pop(row.claim.key)
        if row.record.doubtful:
            delivery.suspect(Doubt.POSSIBLE)
        self.hold(delivery, row.claim, now)
        return True

    def take(self, row: Row, now: float, epoch: float) -> Delivery:
        """Return the delivery of a row that was claimed; it is not open where it has failed.

        :param epoch: what `wall_clock` says at ``now``
        """
        delivery = self._parked.get(row.claim.key)
        if delivery is None:
            delivery = _revived(row.record, now, epoch)
            if not self._durable:  # memory forgets only what has found its end
                delivery.step_answer(AnswerEvent.RELEASED)
            self.hold(delivery, row.claim, now)
        else:
            self.hold(delivery, row.claim, now)  # first, should this be cut: see `holder_of`
            self._parked.pop(row.claim.key, None)
            self._last.pop(delivery, None)
            self._expected.pop(delivery, None)
            self.lost_rows.pop(delivery, None)
            record = row.record
            delivery.reload(
                record.envelope,
                record.attempts,
                dead=record.dead,
                doubtful=record.doubtful,
                waits=read_reason(record.reason).route_was_there,
            )
        return delivery

    def holder_of(self, claim: Claim) -> Delivery | None:
        """Return the delivery that holds a claim; it is looked for among all."""
        return next((each for each, held in list(self.claims.items()) if held == claim), None)

    def known_keys(self) -> set[int]:
        """Return the keys of all rows that a delivery is remembered for."""
        return {claim.key for claim in list(self.claims.values())} | set(self._parked)

    def drop(self, delivery: Delivery) -> Claim | None:
        """Forget a delivery that has found its end, and give the last claim of its row."""
        claim = self.claim_of(delivery)
        self.claims.pop(delivery, None)
        self.ahead.discard(delivery)
        waited = self._last.pop(delivery, None) or self.lost_rows.pop(delivery, None)
        waited = self._expected.pop(delivery, None) or waited
        if waited is not None and claim is not None:
            self._parked.pop(claim.key, None)
        return claim


def record_of(delivery: Delivery, now: float) -> Record:
    """Write down what is known of a delivery.

    Of its attempts those by another message's fault are left out, so that another process does not
    take them for retries. A wall clock that was set while the message waited may put its times
    where no store takes them.
    """
    reason, failed = delivery.reason, delivery.first_failed
    attempts = delivery.attempts if delivery.dead else delivery.attempts - delivery.innocent
    epoch = datetime.now(timezone.utc).timestamp()
    waits = delivery.unrouted > 0 and not delivery.dead
    return Record(
        delivery.envelope,
        attempts=min(attempts, MOST_ATTEMPTS),
        doubtful=delivery.doubt is not Doubt.NONE or delivery.in_flight,
        dead=delivery.dead,
        reason="" if reason is None else _reason_text(type(reason).__name__, str(reason), waits),
        first_failed_at=min(max(0.0, epoch - (now - failed)), LATEST) if failed else 0.0,
        retry=delivery.policy,
        accepted_at=min(max(0.0, epoch - (now - delivery.started)), LATEST),
    )


@lru_cache(maxsize=256)  # most rows have one of a few reasons
def _reason_text(error: str, text: str, route_was_there: bool) -> str:
    """Return a reason in the form in which rows keep it: JSON, which stores do not look into."""
    reason: dict[str, object] = {"error": error, "text": text[:_TEXT_MAX]}
    if route_was_there:
        reason["route_was_there"] = True
    return json.dumps(reason)


_OLD_MARK = " (its route was there before)"


@lru_cache(maxsize=256)
def read_reason(stored: str) -> Reason:
    """Return the reason that a row keeps.

    Rows of earlier versions have "ErrorName: text", with a mark at the end if the route was there.
    What a user's own program has written is read so, too.
    """
    try:
        found = json.loads(stored)
        name, text, mark = found["error"], found["text"], found.get("route_was_there") is True
    except (ValueError, TypeError, KeyError, RecursionError):
        name, _, text = stored.removesuffix(_OLD_MARK).partition(": ")
        mark = stored.endswith(_OLD_MARK)
    error = getattr(errors, str(name), None)
    if not isinstance(error, type) or not issubclass(error, PublishError):
        error = PublishError
    return Reason(error, str(text), mark)


def _revived(record: Record, now: float, epoch: float) -> Delivery:
    """Make the delivery of a message that another process, or another life of this one, stored."""
    accepted, failed = record.accepted_at, record.first_failed_at
    reason, error = read_reason(record.reason), None
    if record.reason:
        message_id = record.envelope.message_id
        error = reason.error(reason.text, message_id=message_id, attempts=record.attempts)
    return Delivery.stored(
        record.envelope,
        started=now - max(0.0, epoch - accepted) if accepted else now,
        policy=record.retry,
        attempts=record.attempts,
        dead=record.dead,
        doubtful=record.doubtful,
        reason=error,
        first_failed=now - max(0.0, epoch - failed) if failed else 0.0,
        unrouted=record.attempts if reason.route_was_there else 0,
    )


def wall_clock() -> float:
    """Return the seconds since the epoch."""
    return datetime.now(timezone.utc).timestamp()
