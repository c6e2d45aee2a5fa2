"""Where failures are judged: kept for a retry, given back, or buried. Each comes through here.

What is said to a publisher waits until the store has done its part: a message is ours once it is
stored, and the publisher's once its row is gone. What is *owed* to a publisher is said instead
where the store has no answer in time.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from attrs import field, frozen

from mlproducer._core.breaker import Breaker
from mlproducer._core.decision import Decision, decide
from mlproducer._core.delivery import Delivery, Place
from mlproducer._core.delivery_errors import exhausted, failure, silent_store
from mlproducer._core.interfaces import DeadLetterMaker, Door, Events, RetryWorker
from mlproducer.errors import NotConnectedError, PublishError, StoreError, UnroutableError


@frozen
class FailureHandler:
    """Carries out what `decide` says, so that nothing is lost and nobody is told twice.

    :ivar max_retries: attempts after the first, for messages without a policy of their own
    :ivar owed: what publishers are told if the store stays silent
    :ivar routes: exchanges and routing keys that the broker has confirmed messages for
    """

    max_retries: int
    breaker: Breaker
    retry_worker: RetryWorker
    dead_letter_maker: DeadLetterMaker
    door: Door
    events: Events
    owed: dict[Delivery, PublishError] = field(factory=dict, init=False)
    routes: set[tuple[str, str]] = field(factory=set, init=False)

    # --- failures ------------------------------------------------------------------------------

    def fail(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Judge an attempt that failed, or a wait that was in vain."""
        if not delivery.is_ours:
            self.leave(delivery, Place.RETIRED)  # its publisher has withdrawn it
            return
        self._count(delivery, error, now)
        if not delivery.open:
            self.leave(delivery, Place.RETIRED)
            return
        if delivery.dead:
            self.keep(delivery, now)
            return
        delivery.reason = error
        delivery.first_failed = delivery.first_failed or now
        self.events.failed(delivery, error)
        waits = isinstance(error, UnroutableError) and self._route_comes_back(delivery)
        verdict = decide(
            error,
            retry=delivery.retry or delivery.promised,
            owned=delivery.kept or delivery.promised,
            exhausted=not waits and self._used_up(delivery),
            durable=self.retry_worker.durable,
        )
        if verdict is Decision.GIVE_BACK:
            self.give_back(delivery, error, now)
            return
        if verdict is Decision.BURY:
            self._bury(delivery, error, now)
        self.keep(delivery, now)

    def _bury(self, delivery: Delivery, error: PublishError, now: float) -> None:
        delivery.dead = True
        delivery.envelope = self.dead_letter_maker.dead_letter(delivery, error, now)

    def keep(self, delivery: Delivery, now: float) -> None:
        """Have it stored, or have its row say what came of the last attempt."""
        known, was_ours = delivery.stored, delivery.kept
        sure = known and delivery.leased_until >= now
        delivery.stored = True
        if known:
            self.leave(delivery, Place.STORED)
        elif delivery.place is not Place.IN_FLIGHT:
            delivery.place = Place.STORED  # its slot is free once it is stored
        self.retry_worker.keep(delivery, now, known=known)
        delivery.kept = True
        if not (sure or (known and was_ours)):
            self.owed[delivery] = silent_store(delivery, self.retry_worker.name)
        elif not was_ours:
            self.promise(delivery, now)  # it was stored before it was sent

    def give_back(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Let the publisher have it; what has its tag open stays there, and is not sent again."""
        if not delivery.may_fail():  # its publisher has left a moment ago, and relies on us
            delivery.kept = True
            if not delivery.dead and (error.permanent or self._used_up(delivery)):
                self._bury(delivery, error, now)
            self.keep(delivery, now)
            return
        self.leave(delivery, Place.RETIRED)
        if delivery.stored and self.retry_worker.durable:
            self.owed[delivery] = error
            self.retry_worker.withdraw(delivery)
            return
        if delivery.stored:
            self.retry_worker.settle(delivery)
        self._tell(delivery, error)

    def part(self, delivery: Delivery, error: PublishError) -> None:
        """Give a message back at the very end, when no answer of the store is heard any more."""
        self.owed.pop(delivery, None)
        self.leave(delivery, Place.RETIRED)
        if delivery.stored:
            self.retry_worker.settle(delivery)
        self._tell(delivery, error)

    def learn(self, delivery: Delivery, now: float, *, dead: bool) -> None:
        """Tell how a message ended in another process."""
        self.owed.pop(delivery, None)
        self.leave(delivery, Place.RETIRED)
        if not delivery.open:
            return
        if dead:
            delivery.give_back(exhausted(delivery))
        else:
            delivery.confirm(now)

    def lose(self, delivery: Delivery, error: PublishError) -> None:
        """Tell that the store has lost a message."""
        self.owed.pop(delivery, None)
        self.leave(delivery, Place.RETIRED)
        if delivery.open:
            self._tell(delivery, error)

    def drop(self, delivery: Delivery) -> None:
        """Let go of what nobody waits for: it is the store's, or was withdrawn on its way there."""
        self.leave(delivery, Place.RETIRED)
        if delivery.stored and not delivery.kept:
            self.retry_worker.settle(delivery)

    def leave(self, delivery: Delivery, place: Place) -> None:
        """Let go of a delivery, unless its tag is open: then only its publisher's wait is over."""
        if delivery.place is not Place.IN_FLIGHT:
            self.door.leave((delivery,))
            delivery.place = place

    # --- answers of the retry worker -------------------------------------------------------------

    def promise(self, delivery: Delivery, now: float) -> None:
        """Tell that it is ours: it is stored."""
        if self.goes_back(delivery):
            return  # it was given back meanwhile, and that is told once its row is gone
        self.owed.pop(delivery, None)
        if not delivery.open:
            self.retry_worker.settle(delivery)  # its publisher has got it back meanwhile
        elif delivery.retry or delivery.promised:
            self.events.deferred(delivery)
            delivery.defer(now, durable=self.retry_worker.durable)
        else:
            reason = delivery.reason or failure(PublishError, delivery, "taken back")
            self.give_back(delivery, reason, now)  # its publisher was interrupted meanwhile

    def refused(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Give back what the store cannot take, or not in time; what is in flight stays there."""
        self.owed.pop(delivery, None)
        delivery.stored = delivery.kept = False
        if delivery.open and delivery.is_ours:
            error.possibly_sent = delivery.doubtful or delivery.place is Place.IN_FLIGHT
            error.attempts = delivery.attempts
            self.give_back(delivery, error, now)

    def owes(self, delivery: Delivery) -> bool:
        """Whether its publisher's answer waits for the store."""
        return delivery in self.owed

    def goes_back(self, delivery: Delivery) -> bool:
        """Whether its publisher gets it back, and is told so once its row is gone."""
        return not isinstance(self.owed.get(delivery), StoreError | None)

    def may_pay(self, delivery: Delivery) -> bool:
        """Whether its publisher is to be told what is owed, which nothing else can be then.

        It is not where the publisher has left meanwhile, and relies on the order to store its
        message: that is still under way, and a second one would make a second row.
        """
        error = self.owed.get(delivery)
        if not isinstance(error, StoreError) or not delivery.open:
            return error is not None
        return delivery.may_fail()

    def pay(self, delivery: Delivery, now: float, *, gone: bool) -> None:
        """Tell what is owed, since the store has had its time; `may_pay` has said so.

        :param gone: its row is gone. Else that row, if there is one, may become another process's,
            or is, and is sent: it has not been deleted, or its lease is over
        """
        error = self.owed.pop(delivery, None)
        if error is None or not delivery.open:
            return
        left = not isinstance(error, StoreError) or delivery.leased_until < now
        if left and not gone:
            delivery.doubtful, delivery.suspected = True, False
        if isinstance(error, StoreError):
            ordered = delivery.stored
            self.refused(delivery, error, now)
            if ordered and not delivery.open:
                self.retry_worker.settle(
                    delivery
                )  # behind the order to store it, which may succeed yet
        else:
            error.possibly_sent = error.possibly_sent or delivery.doubtful
            self._tell(delivery, error)

    def _tell(self, delivery: Delivery, error: PublishError) -> None:
        self.events.given_back(delivery, error)
        delivery.give_back(error)

    # --- what is known of an attempt -----------------------------------------------------------

    def _count(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Tell the breaker, once for an attempt; the sender tells it without a connection."""
        if not error.counts_for_breaker or isinstance(error, NotConnectedError):
            self.breaker.released(delivery)
        elif not delivery.counted:
            delivery.counted = True
            self.breaker.failed(delivery, now)

    def _used_up(self, delivery: Delivery) -> bool:
        """Whether the last retry is over; not while its tag is open."""
        over = self._retries_over(delivery)
        return over >= 0 and delivery.place is not Place.IN_FLIGHT

    def _retries_over(self, delivery: Delivery) -> int:
        """Say how many attempts it has had beyond those that it may; 0: it was the last.

        Those that failed by another message's fault, or for want of a route that comes back, do not
        count.
        """
        policy = delivery.policy
        retries = self.max_retries if policy is None else policy.max_retries
        return delivery.attempts - delivery.innocent - delivery.unrouted - 1 - retries

    def _route_comes_back(self, delivery: Delivery) -> bool:
        """Whether a returned message waits for its route, which has been there before.

        A classic queue whose node is down is answered like one that never was. What comes out of
        the store with more attempts than it may have waited for its route in its former process.
        """
        route = (delivery.envelope.exchange, delivery.envelope.routing_key)
        if self._retries_over(delivery) > 0:
            self.routes.add(route)
        if route not in self.routes:
            return False
        delivery.unrouted += 1
        return True
