"""Which delivery belongs to which row of the store.

In a durable store a row may outlive its delivery, and may be another process's: then a delivery
is made of the record, and nobody waits for it. While a row waits there, its delivery is remembered
only as long as somebody holds the receipt or future that it is to resolve, and without its body; so
a backlog takes no memory. In the memory store the delivery is all there is, and stays.

Runs on: the retry thread; `Shelf.deliveries` and `Shelf.has_row` on any.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from datetime import datetime, timezone
from weakref import WeakKeyDictionary, WeakValueDictionary

from attrs import evolve

from mlproducer import errors
from mlproducer.core.delivery import Delivery, Nobody, Place
from mlproducer.errors import PublishError
from mlproducer.stores.protocol import Claim, Record, Row

_REASON_MAX = 255


SAFETY = 0.9
"""The part of a lease in which its holder relies on it."""


class Shelf:
    """Deliveries whose message is in the store.

    :param lease: seconds for which a claim holds
    :ivar claims: the claim of each row that is this process's now
    :ivar renew_at: monotonic time at which leases have to begin anew
    """

    def __init__(self, lease: float, *, durable: bool) -> None:
        self._lease = lease
        self._durable = durable
        self.renew_at = math.inf
        self._parked: MutableMapping[int, Delivery] = WeakValueDictionary() if durable else {}
        self._last: WeakKeyDictionary[Delivery, Claim] = WeakKeyDictionary()
        self.claims: dict[Delivery, Claim] = {}

    def has_row(self, delivery: Delivery) -> bool:
        """Whether its row is there, and this process's."""
        return delivery in self.claims

    def deliveries(self) -> list[Delivery]:
        """Give all that are remembered."""
        if not isinstance(self._parked, WeakValueDictionary):
            return [*self.claims, *self._parked.values()]
        alive = [reference() for reference in self._parked.valuerefs()]
        return [*self.claims, *(delivery for delivery in alive if delivery is not None)]

    def hold(self, delivery: Delivery, claim: Claim, now: float) -> None:
        """Remember a claim, whose lease began at ``now`` or later."""
        self._begin_lease(delivery, now)
        self.claims[delivery] = claim

    def renewed(self, lost: Sequence[Claim], now: float) -> None:
        """Let all leases begin anew, but for those that have been lost."""
        self.renew_at = math.inf
        gone = set(lost)
        for delivery, claim in list(self.claims.items()):
            if claim in gone:
                self.lose(delivery)
            else:
                self._begin_lease(delivery, now)

    def lose(self, delivery: Delivery) -> None:
        """Leave a message to whoever has taken it over; its own publisher may never hear of it."""
        delivery.leased_until = -math.inf
        claim = self.drop(delivery)
        if claim is not None and delivery.place is Place.STORED:
            self.park(delivery, claim)

    def _begin_lease(self, delivery: Delivery, now: float) -> None:
        self.renew_at = min(self.renew_at, now + self._lease / 3)
        delivery.leased_until = now + self._lease * SAFETY

    def park(self, delivery: Delivery, claim: Claim) -> None:
        """Remember a delivery whose row waits, and is nobody's."""
        self.claims.pop(delivery, None)
        if self._durable:
            delivery.envelope = evolve(delivery.envelope, properties=b"", body=b"")
        self._parked[claim.key] = delivery
        self._last[delivery] = claim

    def claim_of(self, delivery: Delivery) -> Claim | None:
        """Give the last claim of its row, which still holds if nobody has claimed it since."""
        return self.claims.get(delivery) or self._last.get(delivery)

    def take(self, row: Row, now: float) -> Delivery | None:
        """Give the delivery of a row that was claimed; ``None`` where it was given back."""
        delivery = self._parked.pop(row.claim.key, None)
        if delivery is None and not self._durable:
            return None
        if delivery is None:
            delivery = _revived(row.record, now)
        self._last.pop(delivery, None)
        delivery.envelope = row.record.envelope
        delivery.doubtful = delivery.doubtful or row.record.doubtful
        self.hold(delivery, row.claim, now)
        return delivery

    def drop(self, delivery: Delivery) -> Claim | None:
        """Forget a delivery that has found its end, and give the last claim of its row."""
        claim = self.claim_of(delivery)
        self.claims.pop(delivery, None)
        if self._last.pop(delivery, None) is not None and claim is not None:
            self._parked.pop(claim.key, None)
        return claim


def record_of(delivery: Delivery, now: float) -> Record:
    """Write down what is known of a delivery."""
    reason = delivery.reason
    return Record(
        delivery.envelope,
        attempts=delivery.attempts,
        doubtful=delivery.doubtful or delivery.place is Place.IN_FLIGHT,
        dead=delivery.dead,
        reason="" if reason is None else f"{type(reason).__name__}: {reason}"[:_REASON_MAX],
        first_failed_at=_epoch() - (now - delivery.first_failed) if delivery.first_failed else 0.0,
        retry=delivery.policy,
    )


def _revived(record: Record, now: float) -> Delivery:
    """Make the delivery of a message that another process, or another life of this one, stored."""
    delivery = Delivery(record.envelope, Nobody(), started=now, deadline=now, answer_deferral=False)
    delivery.policy = record.retry
    delivery.place = Place.STORED
    delivery.stored = delivery.kept = True
    delivery.dead = delivery.buried = record.dead
    delivery.attempts = record.attempts
    delivery.doubtful = record.doubtful
    if record.reason:
        delivery.reason = _error(record)
    if record.first_failed_at:
        delivery.first_failed = now - max(0.0, _epoch() - record.first_failed_at)
    return delivery


def _error(record: Record) -> PublishError:
    name, _, text = record.reason.partition(": ")
    kind = getattr(errors, name, PublishError)
    known = isinstance(kind, type) and issubclass(kind, PublishError)
    make = kind if known else PublishError
    return make(text, message_id=record.envelope.message_id, attempts=record.attempts)


def _epoch() -> float:
    return datetime.now(timezone.utc).timestamp()
