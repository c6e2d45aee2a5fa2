"""What becomes of the messages of a producer that is closed, and what their publishers are told.

First a durable store takes what it may. What it has then is released to it, and what only this
process has fails to its publishers.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections.abc import Collection

from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_errors import failure
from mlproducer._core.delivery_states import ROW_KNOWN, RowState
from mlproducer._core.failures import FailureHandler
from mlproducer._core.send_queue import SendQueue
from mlproducer.errors import ProducerClosedError

CLOSED = "the producer was closed"


class Shutdown:
    """The end of one sender's work.

    :ivar begun: nothing is sent any more
    :ivar abandoned: what has failed, since only this process had it
    """

    def __init__(self, send_queue: SendQueue, failures: FailureHandler) -> None:
        self.begun = False
        self.abandoned: list[Delivery] = []
        self._send_queue = send_queue
        self._failures = failures
        self._durable = failures.retry_worker.durable
        self._heard = True  # the retry worker's answers still arrive

    def store_rest(self, now: float) -> None:
        """Have a durable store take all that it may."""
        self.begun = True
        for delivery in [*self._send_queue.confirms, *self._send_queue.clear()]:
            self.release(delivery, now)

    def end(self, stored: list[Delivery], rowless: Collection[Delivery], now: float) -> None:
        """Answer every publisher, also those whose message is in the store.

        :param rowless: those of ``stored`` that the store has lost, or never had
        """
        self.begun = True
        self._heard = False
        lost = self._send_queue.lose_channel()
        for delivery in lost:
            delivery.suspect(Doubt.POSSIBLE)
        pending = list(self._failures.pending)
        for delivery in dict.fromkeys([*lost, *self._send_queue.clear(), *stored, *pending]):
            if not (delivery.open and delivery.is_ours):
                self._failures.retire(delivery)
            elif delivery.row is RowState.HELD and self._durable and delivery not in rowless:
                delivery.release(now)
            else:
                self._fail(delivery, failure(ProducerClosedError, delivery, CLOSED))

    def release(self, delivery: Delivery, now: float) -> None:
        """Have a message stored, or fail it; what is in flight stays there."""
        error = failure(ProducerClosedError, delivery, CLOSED)
        if not (delivery.open and delivery.is_ours):
            self._failures.retire(delivery)
            return
        ours = delivery.retry or delivery.relied_on
        if ours and self._durable and (delivery.row in ROW_KNOWN or self._heard):
            delivery.reason = delivery.reason or error
            self._failures.defer(delivery, now)
        elif not delivery.in_flight:
            self._fail(delivery, error)

    def _fail(self, delivery: Delivery, error: ProducerClosedError) -> None:
        self.abandoned.append(delivery)
        self._failures.fail_at_the_end(delivery, error)
