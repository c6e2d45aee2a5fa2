"""The life of deliveries: accepted, sent, then confirmed, kept for a retry, or given back.

The courier is the only judge. It owns every delivery from the moment it is accepted until it
retires, and holds to one rule above all: a message is on the wire at most once per live channel.
A confirm that is late therefore only ends the publisher's wait; the tag stays open until the broker
settles it or its channel is gone.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from mlproducer.core.confirms import Confirms
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Carrier, Door, Events, Keeper, Loss
from mlproducer.core.recovery import Verdict, accuses, decide
from mlproducer.core.states import FLOW_MOVES, FlowEvent, FlowState, Machine
from mlproducer.core.trial import Trial
from mlproducer.errors import (
    BrokerBlockedError,
    BrokerRejectedError,
    ConfirmTimeoutError,
    ConnectionLostError,
    MessageTooLargeError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    PublishError,
    UnroutableError,
)
from mlproducer.message import Envelope

E = TypeVar("E", bound=PublishError)


class Courier:
    """Carries deliveries over the link and answers their publishers."""

    def __init__(self, keeper: Keeper, door: Door, events: Events) -> None:
        self._keeper = keeper
        self._door = door
        self._events = events
        self._carrier: Carrier | None = None
        self._flow = Machine(FLOW_MOVES, FlowState.FLOWING)
        self._refusal: PublishError | None = None
        self._backlog: deque[Delivery] = deque()
        self._trial = Trial()
        self._confirms = Confirms()

    # --- what others may see -------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Messages written and neither confirmed nor lost."""
        return len(self._confirms)

    @property
    def waiting(self) -> int:
        """Messages accepted and not written."""
        return len(self._backlog) + len(self._trial)

    @property
    def blocked(self) -> bool:
        """Whether the broker has blocked publishers."""
        return self._flow.state is FlowState.BLOCKED

    @property
    def able(self) -> bool:
        """Whether a message handed over now would be written."""
        return self._carrier is not None and not self.blocked

    def overdue(self, now: float, limit: float) -> bool:
        """Whether some message has been in flight, unconfirmed, for ``limit`` seconds."""
        oldest = self._confirms.oldest()
        return oldest is not None and now - oldest.sent_at >= limit

    # --- publishers ----------------------------------------------------------------------------

    def accept(self, delivery: Delivery, now: float) -> None:
        """Take a message from its publisher, unless it was withdrawn meanwhile."""
        if delivery.claim():
            self.readmit(delivery, now)
        else:
            delivery.place = Place.RETIRED
            self._door.leave((delivery,))

    def readmit(self, delivery: Delivery, now: float) -> None:
        """Take a message that is to be sent; from the store, where it waited for a retry."""
        delivery.place = Place.WAITING
        if self._refusal is None:
            self._backlog.append(delivery)
        else:
            self._fail(delivery, self._fresh(self._refusal, delivery), now)

    def turn_away(self, delivery: Delivery, now: float) -> None:
        """Judge a message for which the in-flight window had no room in time."""
        if delivery.claim():
            self._fail(delivery, self._unsent(delivery), now)

    def expire(self, delivery: Delivery, now: float) -> None:
        """End the wait of a publisher whose time is up; its message may live on."""
        if not (delivery.open and delivery.answer_deferral):
            return
        if delivery.place is Place.WAITING:
            self._withdraw(delivery)
            self._fail(delivery, self._unsent(delivery), now)
        elif delivery.place is Place.IN_FLIGHT:
            self._fail(delivery, self._error(ConfirmTimeoutError, delivery, "no confirm"), now)

    def pump(self, now: float) -> None:
        """Write what waits, as far as the link has room."""
        if self._carrier is None or self.blocked:
            return
        if self._trial:
            batch = [] if self._confirms else self._load(self._trial.suspects, 1, now)
        else:
            batch = self._load(self._backlog, self._carrier.room(), now)
        if batch:
            self._carrier.carry(batch)

    def _load(self, queue: deque[Delivery], room: int, now: float) -> list[tuple[Envelope, int]]:
        batch: list[tuple[Envelope, int]] = []
        while queue and room > 0:
            delivery = queue.popleft()
            envelope = delivery.envelope
            if not self._fits(envelope):
                error = self._error(MessageTooLargeError, delivery, "headers exceed the frame size")
                self._fail(delivery, error, now)
                continue
            delivery.place = Place.IN_FLIGHT
            if delivery.doubtful:
                self._events.possible_duplicate(delivery)
            delivery.attempts += 1
            delivery.sent_at = now
            delivery.returned = None
            batch.append((envelope, self._confirms.register(delivery)))
            room -= envelope.size
        return batch

    def _fits(self, envelope: Envelope) -> bool:
        return self._carrier is not None and self._carrier.fits(envelope)

    # --- the broker ----------------------------------------------------------------------------

    def acked(self, tag: int, now: float, *, multiple: bool) -> None:
        """Settle what the broker has taken; what it returned before is unroutable."""
        confirmed = []
        for delivery in self._settle(tag, multiple=multiple):
            if delivery.returned is None:
                self._confirmed(delivery, now)
                confirmed.append(delivery)
            else:
                self._fail(delivery, self._unroutable(delivery), now)
        self._door.leave(confirmed)

    def nacked(self, tag: int, now: float, *, multiple: bool) -> None:
        """Settle what the broker has refused."""
        for delivery in self._settle(tag, multiple=multiple):
            if delivery.returned is None:
                delivery.doubtful = True
                error: PublishError = self._error(
                    NackError, delivery, "the broker nacked the message"
                )
            else:
                error = self._unroutable(delivery)
            self._fail(delivery, error, now)

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        """Note that a message has no queue; its ack follows (RabbitMQ guide, *Publishers*)."""
        delivery = self._confirms.find(tag)
        if delivery is not None:
            delivery.returned = (reply_code, reply_text)

    def _settle(self, tag: int, *, multiple: bool) -> list[Delivery]:
        settled = self._confirms.settle(tag, multiple=multiple)
        if not settled and tag != 0:
            self._events.stray_confirm(tag)
        for delivery in settled:
            delivery.place = Place.WAITING
        return settled

    def _confirmed(self, delivery: Delivery, now: float) -> None:
        delivery.place = Place.RETIRED
        if delivery.kept:
            self._keeper.settle(delivery)
        if delivery.open:
            delivery.confirm(now)
        self._events.confirmed(delivery)

    # --- the link ------------------------------------------------------------------------------

    def up(self, carrier: Carrier) -> None:
        """Use a new channel; its tags start at 1."""
        self._carrier = carrier
        self._refusal = None

    def down(self, loss: Loss, now: float) -> None:
        """Decide for all that were in flight on a channel that is gone. Idempotent."""
        self._carrier = None
        lost = self._confirms.abandon()
        for delivery in lost:
            delivery.place = Place.WAITING
        if not accuses(loss.reply_code):
            self._lose(lost, loss, now)
        elif len(lost) == 1:
            self._convict(lost[0], loss, now)
        else:
            self._trial.summon(self._still_wanted(lost), loss.text)

    def disconnected(self) -> None:
        """The connection is gone, and with it the broker's Blocked."""
        self._flow.step(FlowEvent.RECONNECTED)

    def refuse(self, error: PublishError, now: float) -> None:
        """Let nobody wait for a link that does not come: fail what waits, and what follows.

        :param error: the template of what they are told
        """
        self._refusal = error
        waiting = [*self._trial.discharge(), *self._backlog]
        self._backlog.clear()
        for delivery in waiting:
            self._fail(delivery, self._fresh(error, delivery), now)

    def block(self, *, blocked: bool) -> None:
        """Stop or go on writing, as the broker's alarm comes or goes."""
        if blocked:
            self._flow.step(FlowEvent.BLOCKED)
        elif self._flow.allows(FlowEvent.UNBLOCKED):
            self._flow.step(FlowEvent.UNBLOCKED)

    def abandon(self, stored: list[Delivery], now: float) -> None:
        """Give back whatever is still here or in the store: the producer is closing."""
        self._carrier = None
        self._backlog.extend(each for each in stored if each.place is Place.STORED)
        for delivery in self._confirms.abandon():
            delivery.place = Place.WAITING
            delivery.doubtful = True
            self._backlog.append(delivery)
        self.refuse(ProducerClosedError("the producer was closed"), now)

    def _lose(self, lost: list[Delivery], loss: Loss, now: float) -> None:
        for delivery in lost:
            if delivery.returned is None:
                delivery.doubtful = True
                error: PublishError = self._error(ConnectionLostError, delivery, loss.text)
            else:
                error = self._unroutable(delivery)
            self._fail(delivery, error, now)

    def _still_wanted(self, lost: list[Delivery]) -> list[Delivery]:
        """Give those whose publishers have not got them back, to be sent again."""
        for delivery in lost:
            delivery.doubtful = True
            if not delivery.open:
                self._leave(delivery, Place.RETIRED)
        return [delivery for delivery in lost if delivery.open]

    def _convict(self, guilty: Delivery, loss: Loss, now: float) -> None:
        """Reject the one that closed the channel alone; the others are free."""
        for delivery in self._trial.convict(guilty, loss.reply_code):
            error = self._error(BrokerRejectedError, delivery, loss.text)
            error.reply_code, error.reply_text = loss.reply_code, loss.text
            self._fail(delivery, error, now)
        self._backlog.extendleft(reversed(self._trial.discharge()))

    # --- the keeper ----------------------------------------------------------------------------

    def kept(self, delivery: Delivery, now: float, *, durable: bool) -> None:
        """The message is stored: now its publisher may be told so."""
        if delivery.open:
            self._events.deferred(delivery)
            delivery.defer(now, durable=durable)

    def not_kept(self, delivery: Delivery, error: PublishError) -> None:
        """The store cannot take it. A publisher gets it back; what is in flight stays there."""
        delivery.kept = False
        delivery.retry = False
        if delivery.place is Place.WAITING:
            self._withdraw(delivery)
        self._leave(delivery, Place.RETIRED)
        if delivery.open:
            error.possibly_sent = delivery.doubtful or delivery.place is Place.IN_FLIGHT
            self._events.given_back(delivery, error)
            delivery.give_back(error)

    # --- the one place where failures are judged -----------------------------------------------

    def _fail(self, delivery: Delivery, error: PublishError, now: float) -> None:
        delivery.reason = error
        if not delivery.open:
            self._leave(delivery, Place.RETIRED)
            return
        self._events.failed(delivery, error)
        if decide(error, retry=delivery.retry, owned=delivery.kept) is Verdict.KEEP:
            delivery.kept = True
            self._leave(delivery, Place.STORED)
            self._keeper.keep(delivery, now)
        else:
            if delivery.kept:
                self._keeper.settle(delivery)
            self._leave(delivery, Place.RETIRED)
            self._events.given_back(delivery, error)
            delivery.give_back(error)

    def _leave(self, delivery: Delivery, place: Place) -> None:
        """Let go of a delivery, unless its tag is open: then only its publisher's wait is over."""
        if delivery.place is not Place.IN_FLIGHT:
            delivery.place = place
            self._door.leave((delivery,))

    def _withdraw(self, delivery: Delivery) -> None:
        suspects = self._trial.suspects
        (suspects if delivery in suspects else self._backlog).remove(delivery)

    def _unsent(self, delivery: Delivery) -> PublishError:
        """Why a message that waits for the link has not been written (again) in time."""
        if self.blocked:
            return self._error(BrokerBlockedError, delivery, "the broker blocks publishers")
        if self._carrier is None:
            return self._error(NotConnectedError, delivery, "not connected in time")
        return self._error(ConfirmTimeoutError, delivery, "not written in time")

    def _unroutable(self, delivery: Delivery) -> PublishError:
        reply_code, reply_text = delivery.returned or (0, "")
        text = f"the broker returned the message: {reply_code} {reply_text}"
        error = self._error(UnroutableError, delivery, text)
        error.reply_code, error.reply_text = reply_code, reply_text
        return error

    @staticmethod
    def _error(kind: type[E], delivery: Delivery, text: str) -> E:
        return kind(
            text,
            message_id=delivery.envelope.message_id,
            attempts=delivery.attempts,
            possibly_sent=delivery.doubtful or delivery.place is Place.IN_FLIGHT,
        )

    def _fresh(self, template: PublishError, delivery: Delivery) -> PublishError:
        return self._error(type(template), delivery, str(template))
