"""Where failures are judged: kept for a retry, given back, or buried. Each comes through here.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from attrs import frozen

from mlproducer.core.breaker import Breaker
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Door, Events, Keeper, Undertaker
from mlproducer.core.recovery import Verdict, decide
from mlproducer.errors import PublishError


@frozen
class Judge:
    """Carries out what `decide` says, so that nothing is lost and nobody is told twice.

    :ivar max_retries: attempts after the first
    """

    max_retries: int
    breaker: Breaker
    keeper: Keeper
    undertaker: Undertaker
    door: Door
    events: Events

    def fail(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Judge an attempt that failed, or a wait that was in vain."""
        self._count(delivery, error, now)
        if not delivery.open:
            self.leave(delivery, Place.RETIRED)
            return
        if delivery.dead:
            self._keep(delivery, now)
            return
        delivery.reason = error
        delivery.first_failed = delivery.first_failed or now
        self.events.failed(delivery, error)
        verdict = decide(
            error,
            retry=delivery.retry,
            owned=delivery.kept,
            exhausted=self._used_up(delivery),
            durable=self.keeper.durable,
        )
        if verdict is Verdict.GIVE_BACK:
            self.give_back(delivery, error)
            return
        if verdict is Verdict.BURY:
            delivery.dead = True
            delivery.envelope = self.undertaker.dead_letter(delivery, error, now)
        self._keep(delivery, now)

    def give_back(self, delivery: Delivery, error: PublishError) -> None:
        """Let the publisher have it; what has its tag open stays there, and is not sent again."""
        if delivery.kept:
            self.keeper.settle(delivery)
        self.leave(delivery, Place.RETIRED)
        self.events.given_back(delivery, error)
        delivery.give_back(error)

    def leave(self, delivery: Delivery, place: Place) -> None:
        """Let go of a delivery, unless its tag is open: then only its publisher's wait is over."""
        if delivery.place is Place.IN_FLIGHT:
            return
        if delivery.place is not Place.STORED:  # what is stored has left its slot before
            self.door.leave((delivery,))
        delivery.place = place

    def _keep(self, delivery: Delivery, now: float) -> None:
        delivery.kept = True
        self.leave(delivery, Place.STORED)
        self.keeper.keep(delivery, now)

    def _count(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Tell the breaker, once for an attempt."""
        if not error.counts_for_breaker:
            self.breaker.released(delivery)
        elif not delivery.counted:
            delivery.counted = True
            self.breaker.failed(delivery, now)

    def _used_up(self, delivery: Delivery) -> bool:
        """Whether the last retry is over; not while its tag is open."""
        over = delivery.attempts > self.max_retries
        return over and delivery.place is not Place.IN_FLIGHT
