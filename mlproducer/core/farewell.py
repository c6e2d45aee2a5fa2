"""How a producer parts with its messages when it is closed, and tells everybody how it stands.

First a durable store takes what it may; then whatever it has is entrusted to it, and what lives in
this process alone goes back to its publishers.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections.abc import Collection

from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.failure import failure
from mlproducer.core.judge import Judge
from mlproducer.core.lanes import Lanes
from mlproducer.errors import ProducerClosedError

CLOSED = "the producer was closed"


class Farewell:
    """The end of one courier's work.

    :ivar begun: nothing is sent any more
    """

    def __init__(self, lanes: Lanes, judge: Judge) -> None:
        self.begun = False
        self._lanes = lanes
        self._judge = judge
        self._durable = judge.keeper.durable
        self._heard = True  # the keeper's answers still arrive

    def shelve(self, now: float) -> None:
        """Have a durable store take all that it may."""
        self.begun = True
        for delivery in [*self._lanes.confirms, *self._lanes.clear()]:
            self.see_off(delivery, now)

    def abandon(self, stored: list[Delivery], rowless: Collection[Delivery], now: float) -> None:
        """Tell everybody, also those whose message is in the store.

        :param rowless: those of ``stored`` that the store has lost, or never had
        """
        self.begun = True
        self._heard = False
        lost = self._lanes.lose_channel()
        for delivery in lost:
            delivery.doubtful = True
        owed = self._judge.owed
        unsafe = owed.keys() | rowless
        for delivery in dict.fromkeys([*lost, *self._lanes.clear(), *stored, *owed]):
            if not (delivery.open and delivery.is_ours):
                self._judge.leave(delivery, Place.RETIRED)
            elif delivery.kept and self._durable and delivery not in unsafe:
                delivery.entrust(now)
            else:
                self._judge.part(delivery, failure(ProducerClosedError, delivery, CLOSED))

    def see_off(self, delivery: Delivery, now: float) -> None:
        """Part with a message: have it stored, or give it back; what is in flight stays there."""
        error = failure(ProducerClosedError, delivery, CLOSED)
        if not (delivery.open and delivery.is_ours):
            self._judge.leave(delivery, Place.RETIRED)
            return
        ours = delivery.retry or delivery.promised
        if ours and self._durable and (delivery.stored or self._heard):
            delivery.reason = delivery.reason or error
            self._judge.keep(delivery, now)
        elif delivery.place is not Place.IN_FLIGHT:
            self._judge.part(delivery, error)
