"""The life of deliveries: accepted, sent, then confirmed, stored for a retry, or failed.

The sender owns every delivery from the moment it is accepted until it retires, and holds to one
rule above all: a message is on the wire at most once per live channel. A confirm that is late
therefore only ends the publisher's wait; the tag stays open until the broker settles it or its
channel is gone.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlproducer._core import events
from mlproducer._core.breaker import Breaker
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_errors import (
    exhausted,
    failure,
    rejected,
    silent_store,
    unreachable,
    unroutable,
)
from mlproducer._core.delivery_states import (
    ACCEPTED,
    ACKED,
    ROW_IN_STORE,
    ROW_PENDING,
    UNANSWERED,
    WRITTEN,
    AnswerState,
    AttemptEvent,
    AttemptState,
    RowEvent,
    RowState,
)
from mlproducer._core.events import Emit
from mlproducer._core.failures import INTERNAL_ERROR, SOFT_ACCUSATIONS, FailureHandler, accuses
from mlproducer._core.interfaces import (
    NO_PERMISSION,
    NOT_FOUND,
    Channel,
    Confirm,
    LeaveWindow,
    Loss,
    MakeDeadLetter,
    RetryWorker,
)
from mlproducer._core.send_queue import SendQueue
from mlproducer._core.shutdown import CLOSED, Shutdown
from mlproducer._core.states import CircuitState
from mlproducer._foreign_calls import guarded
from mlproducer.errors import (
    BrokerBlockedError,
    CircuitOpenError,
    ConfirmTimeoutError,
    ConnectionLostError,
    MessageTooLargeError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    PublishError,
    StoreError,
)
from mlproducer.message import Envelope

# In an enum's class they would be looked up for each message, several times.
_NO_ROW, _WITHDRAWABLE = RowState.NONE, AnswerState.WITHDRAWABLE
_LATE, _CONFIRMED = AttemptState.LATE, AttemptState.CONFIRMED
_MAILBOX = AttemptState.MAILBOX

SILENCE = 3
"""Confirm timeouts without a confirm between them after which the broker does not confirm."""


MAX_ROUTES = 10_000
"""Routes that are remembered; with more of them, those that come later are as if never seen."""


class Sender:
    """Carries deliveries over the connection and answers their publishers.

    :param max_retries: attempts after the first
    :ivar failure handler: who decides what is done with failures
    :ivar shutdown: what happens when the producer is closed
    :ivar confirmed: messages that the broker has confirmed; anyone may read it
    :ivar timeouts: confirm timeouts since the last confirm
    """

    def __init__(
        self,
        max_retries: int,
        breaker: Breaker,
        retry_worker: RetryWorker,
        make_dead_letter: MakeDeadLetter,
        leave_window: LeaveWindow,
        emit: Emit,
    ) -> None:
        self.breaker = breaker
        self._retry_worker = retry_worker
        self._leave_window = leave_window
        self._emit = emit
        self.failures = FailureHandler(
            max_retries, breaker, retry_worker, make_dead_letter, leave_window, emit
        )
        self._send_queue = SendQueue()
        self.shutdown = Shutdown(self._send_queue, self.failures)
        self._refusal: PublishError | None = None
        self._attempt_counted = False
        self.confirmed = 0
        self._exchange = self._key = ""
        self.timeouts = 0

    # --- what others may see -------------------------------------------------------------------

    # Any thread may read these. Each reads attributes that only the I/O thread sets, or takes the
    # length of what only that one changes: no lock, and an answer that may be old by a moment.

    @property
    def in_flight(self) -> int:
        """Messages written and neither confirmed nor lost."""
        return len(self._send_queue.confirms)

    @property
    def waiting(self) -> int:
        """Messages accepted and not written."""
        return len(self._send_queue.backlog) + len(self._send_queue.poison.suspects)

    @property
    def blocked(self) -> bool:
        """Whether the broker has blocked publishers."""
        return self._send_queue.blocked

    @property
    def able(self) -> bool:
        """Whether a message handed over now would be written."""
        return (
            self._send_queue.channel is not None and not self.blocked and not self.breaker.refuses()
        )

    @property
    def refused(self) -> bool:
        """Whether what is handed over now fails at once, since no connection could be made."""
        return self._refusal is not None

    @property
    def confirming(self) -> bool:
        """Whether the broker confirms what it is sent, as far as is known; anyone may ask."""
        return self.timeouts < SILENCE

    def overdue(self, now: float, limit: float) -> bool:
        """Whether some message has been in flight, unconfirmed, for ``limit`` seconds."""
        oldest = self._send_queue.confirms.oldest()
        return oldest is not None and now - oldest.sent_at >= limit

    # --- publishers ----------------------------------------------------------------------------

    def accept(self, deliveries: Iterable[Delivery], now: float) -> None:
        """Take messages from their publishers, unless they were withdrawn meanwhile.

        What a publisher waits for, it may withdraw until it is written; a future, until now.
        """
        backlog = self._send_queue.backlog
        # Where all is well a message is queued here, without a call, which most messages are.
        well = self.breaker.state is CircuitState.CLOSED and self._refusal is None
        well = well and not self.shutdown.begun
        for delivery in deliveries:
            if delivery.attempt is not _MAILBOX:
                continue  # it was taken for lost, and its publisher has handed it over after all
            if not (delivery.answers_deferral or delivery.claim()):
                self.failures.retire(delivery)
            elif well and delivery.row is _NO_ROW and delivery.answer in UNANSWERED:
                delivery.attempt = ACCEPTED[delivery.attempt]
                backlog.append(delivery)
            else:
                self.readmit(delivery, now)

    def readmit(self, delivery: Delivery, now: float) -> None:
        """Take a message that is to be sent, maybe from the store."""
        if delivery.row is not RowState.NONE and not self._wants(delivery, now):
            return
        if not delivery.open:
            self.failures.drop(delivery)
        elif self.shutdown.begun:
            self.shutdown.release(delivery, now)
        elif self._circuit_is_full():
            self.failures.judge(delivery, self._circuit_open(delivery, now), now)
        elif self._refusal is not None:
            self._refuse_one(delivery, self._refusal, now)
        else:
            self._send_queue.add(delivery)

    def _wants(self, delivery: Delivery, now: float) -> bool:
        """Whether a message whose row this process has claimed again is to be sent."""
        if delivery.in_flight or delivery.attempt is AttemptState.QUEUED:
            return False  # another had its row for a while; its tag, or its turn, decides
        if delivery.row is RowState.WRITING:
            self.failures.stored(delivery, now)  # its row is there after all
        if delivery.open and delivery.attempt is AttemptState.RETIRED:
            self.failures.retire(delivery)  # it goes back once its row is deleted
            return False
        return True

    def stored_ahead(self, deliveries: Iterable[Delivery]) -> None:
        """Note that messages are stored, and may be sent for the first time."""
        for delivery in deliveries:
            if delivery.row is _NO_ROW:
                delivery.step_row(RowEvent.STORED_AHEAD)

    def turn_away(self, delivery: Delivery, now: float) -> None:
        """Judge a message for which the in-flight window had no room in time."""
        self._fail_unsent(delivery, now)

    def expire(self, delivery: Delivery, now: float) -> None:
        """End the wait of a publisher whose time is up; its message may live on."""
        if not delivery.waits_for_answer:
            return
        if delivery.row in ROW_PENDING:
            return  # the store has a moment more, and `store_is_late` then answers
        if delivery.attempt is AttemptState.MAILBOX:
            self._store_is_silent(delivery, now)
        elif delivery.attempt is AttemptState.QUEUED:
            self._send_queue.withdraw(delivery)
            self._fail_unsent(delivery, now)
        elif delivery.in_flight:
            delivery.step_attempt(AttemptEvent.TIMED_OUT)
            self.timeouts += 1
            self.failures.judge(delivery, failure(ConfirmTimeoutError, delivery, "no confirm"), now)

    def release(self, *, suspects: bool) -> list[Delivery]:
        """Give up, for another connection, what has not been written.

        :param suspects: also those under isolation, which are sent nowhere else: among others they
            would close the next channel under all that is in flight there
        """
        return self._send_queue.clear() if suspects else self._send_queue.clear_backlog()

    def pump(self, now: float) -> bool:
        """Write what waits, as far as there is room; half-open, one message as the probe.

        :returns: whether something still waits
        """
        queue, closed = self._send_queue, self.breaker.state is CircuitState.CLOSED
        channel, backlog = queue.channel, queue.backlog
        if not (backlog or queue.poison.suspects):
            return False
        if channel is None or queue.blocked:
            return True
        if not (closed or self.able):
            return True
        room = 1 if self.breaker.state is CircuitState.HALF_OPEN else channel.room()
        batch: list[tuple[Envelope, int]] = []
        while room > 0:
            # One at a time, so that an exception leaves the others where they are.
            alone = bool(queue.poison.suspects)
            if not (alone or backlog):
                break
            delivery = queue.next_suspect() if alone else backlog.popleft()
            if delivery is None:
                break
            if delivery.answer is _WITHDRAWABLE:
                delivery.claim()
            if delivery.answer is _WITHDRAWABLE or delivery.answer not in UNANSWERED:
                self.failures.retire(delivery)  # withdrawn while it waited
            elif delivery.leased_until < now or (delivery.recalled and not delivery.relied_on):
                self._hold_back(delivery, now)
            elif len(delivery.envelope.properties) <= channel.longest_properties:
                room = 0 if alone else room - delivery.size
                if delivery.attempts or delivery.row in ROW_IN_STORE:
                    self._begin_retry(delivery)
                delivery.attempt = WRITTEN[delivery.attempt]
                delivery.attempts += not delivery.dead
                delivery.sent_at = now
                if not closed:
                    self.breaker.sent(delivery, now)
                batch.append((delivery.envelope, queue.confirms.register(delivery)))
            else:
                text = "the headers exceed the frame size"
                self.failures.judge(delivery, failure(MessageTooLargeError, delivery, text), now)
        if batch:
            apart = channel.publish(batch)
            if apart:
                queue.confirms.set_apart(apart)
        return bool(backlog or queue.poison.suspects)

    def _hold_back(self, delivery: Delivery, now: float) -> None:
        """Do not write what has been raised to its publisher, or may be another process's by now.

        Its lease ended while this process, or the store, was frozen: what is right is known once
        the store has been asked.
        """
        if delivery.recalled and not delivery.relied_on:
            self.failures.judge(delivery, failure(PublishError, delivery, "taken back"), now)
            return
        delivery.suspect(Doubt.POSSIBLE)
        if delivery.retry or delivery.in_store or delivery.relied_on:
            self.failures.defer(delivery, now)
        else:
            text = f"the message may have been taken over from the store: {self._retry_worker.name}"
            self.failures.judge(delivery, failure(StoreError, delivery, text), now)

    def _begin_retry(self, delivery: Delivery) -> None:
        """Forget what came of the attempt before, and tell of this one."""
        delivery.counted = False
        self._emit(events.Resumed(delivery))
        if delivery.doubt is not Doubt.NONE:
            self._emit(events.PossibleDuplicate(delivery))
        if delivery.attempts and not delivery.dead:
            self._emit(events.Retried(delivery))

    # --- the broker ----------------------------------------------------------------------------

    def acked(self, confirms: Sequence[Confirm], now: float) -> bool:
        """Settle what the broker has taken; what it returned before is unroutable.

        :returns: whether something waits to be written
        """
        settled = self._settle(confirms)
        taken, delivered = [], []
        for delivery in settled:
            if delivery.attempt is _LATE:
                self._emit(events.LateConfirm(delivery))
            delivery.attempt = attempt = ACKED[delivery.attempt]
            if attempt is _CONFIRMED:
                taken.append(delivery)
            else:
                self.failures.judge(delivery, unroutable(delivery), now)
        if settled:
            self.timeouts = 0
        breaker = self.breaker
        calm = breaker.state is CircuitState.CLOSED and not breaker.failures
        if taken and not (calm and breaker.is_told_once):
            breaker.succeeded(taken, now)
        for delivery in taken:
            if delivery.row is not _NO_ROW or delivery.dead:
                self._conclude(delivery)
            if delivery.answer in UNANSWERED:
                delivered.append(delivery)
            envelope = delivery.envelope
            if envelope.routing_key is not self._key or envelope.exchange is not self._exchange:
                self._note_route(envelope)
        if delivered:
            self.confirmed += len(delivered)
            self._emit(events.Confirmed(delivered, now))
            for delivery in delivered:
                delivery.confirm(now)
        self._leave_window(taken)
        return bool(self._send_queue.backlog or self._send_queue.poison.suspects)

    def _note_route(self, envelope: Envelope) -> None:
        """Remember that a route was there; most messages have that of the one before them."""
        self._exchange, self._key = envelope.exchange, envelope.routing_key
        if len(self.failures.routes) < MAX_ROUTES:
            self.failures.routes.add((self._exchange, self._key))

    def nacked(self, confirms: Sequence[Confirm], now: float) -> bool:
        """Settle what the broker has refused; another queue it was routed to may hold it.

        :returns: whether something waits to be written
        """
        settled = self._settle(confirms)
        for delivery in settled:
            delivery.step_attempt(AttemptEvent.NACKED)
        self._fail_all(settled, NackError, "the broker nacked the message", now)
        return bool(self._send_queue.backlog or self._send_queue.poison.suspects)

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        """Note that a message has no queue; its ack follows (RabbitMQ guide, *Publishers*)."""
        delivery = self._send_queue.confirms.find(tag)
        if delivery is not None:
            delivery.returned = (reply_code, reply_text)
            delivery.step_attempt(AttemptEvent.RETURNED)

    def block(self, *, blocked: bool) -> None:
        """Stop or go on writing, as the broker's alarm comes or goes."""
        self._send_queue.blocked = blocked

    def _settle(self, confirms: Sequence[Confirm]) -> list[Delivery]:
        """Close tags, and tell of a confirm that settles nothing."""
        settle, settled = self._send_queue.confirms.settle, []
        for tag, multiple in confirms:
            some = settle(tag, multiple=multiple)
            if some:
                settled += some
            elif tag != 0 and not self.shutdown.begun:
                self._emit(events.UnknownTag(tag))
        return settled

    def _conclude(self, delivery: Delivery) -> None:
        """Do what is left where the broker has taken a message that was in trouble before."""
        self.failures.delete(delivery)
        if delivery.dead and delivery.open:
            self._emit(events.DeadLettered(delivery))
            delivery.fail(exhausted(delivery))

    # --- the connection --------------------------------------------------------------------------

    def up(self, channel: Channel) -> None:
        """Use a new channel; its tags start at 1."""
        self._send_queue.channel = channel
        self._refusal = None
        self._attempt_counted = False

    def use_channel(self, channel: Channel) -> None:
        """Write by another way on the same channel of AMQP."""
        if self._send_queue.channel is not None:
            self._send_queue.channel = channel

    def down(self, loss: Loss, now: float) -> None:
        """Decide for all that were in flight on a channel that is gone. Idempotent."""
        lost = self._send_queue.lose_channel()
        if not accuses(loss.reply_code):
            self._fail_all(lost, ConnectionLostError, loss.text, now, **loss.facts)
        elif len(lost) == 1:
            self._reject(lost[0], loss, now)
        else:
            linked = loss.reply_code in SOFT_ACCUSATIONS
            self._send_queue.poison.isolate(self._still_wanted(lost, linked=linked))

    def recover(self, known: Iterable[Delivery], now: float) -> list[Delivery]:
        """Take up messages over which a callback has failed between two of their steps.

        :param known: those that have a slot or a row, and belong to this connection
        :returns: those for which an order to the store, or its answer, may be under way
        """
        queue = self._send_queue
        waiting = {*queue.backlog, *queue.poison.suspects, *queue.confirms}
        owed: list[Delivery] = []
        for delivery in known:
            if delivery not in waiting:
                guarded(self._recover, delivery, owed, now)
        return owed

    def _recover(self, delivery: Delivery, owed: list[Delivery], now: float) -> None:
        if delivery.attempt is AttemptState.QUEUED:
            if delivery.claim_again():
                self._send_queue.backlog.append(delivery)
            else:
                self.failures.retire(delivery)
            return
        if delivery.attempt is AttemptState.MAILBOX:
            if delivery.answer is AnswerState.WAITING and delivery.row is _NO_ROW:
                self.readmit(delivery, now)  # it was accepted by half
            return
        if delivery.in_flight:
            delivery.step_attempt(AttemptEvent.LOST)
        text = "an I/O callback failed"
        if delivery.attempt in (AttemptState.FAILED, AttemptState.UNROUTABLE):
            self._fail_all([delivery], ConnectionLostError, text, now)
        elif delivery.attempt is AttemptState.CONFIRMED:
            self._conclude(delivery)
            if delivery.open:
                self.confirmed += 1
                self._emit(events.Confirmed([delivery], now))
                delivery.confirm(now)
            delivery.confirm_again(now)
            self._leave_window((delivery,))
        elif not self.failures.resume(delivery, failure(PublishError, delivery, text), now):
            owed.append(delivery)

    def disconnected(self) -> None:
        """The connection is gone, and with it the broker's Blocked."""
        self._send_queue.blocked = False

    def refuse(self, error: PublishError, now: float) -> None:
        """Fail what waits for a connection, and what follows: an attempt to connect has failed.

        :param error: the template of what they are told
        """
        self._refusal = error
        self._count_attempt(error, now)
        self._attempt_counted = False  # the next attempt is another one
        for delivery in self._send_queue.clear():
            self._refuse_one(delivery, error, now)

    def _refuse_one(self, delivery: Delivery, error: PublishError, now: float) -> None:
        self.failures.judge(delivery, unreachable(delivery, error), now)

    def _fail_all(
        self,
        deliveries: list[Delivery],
        kind: type[PublishError],
        text: str,
        now: float,
        /,
        **facts: Any,
    ) -> None:
        """Fail attempts whose message may be in a queue, but for those that were returned."""
        for delivery in deliveries:
            if delivery.attempt is AttemptState.UNROUTABLE:
                self.failures.judge(delivery, unroutable(delivery), now)
            else:
                delivery.doubt = Doubt.POSSIBLE
                self.failures.judge(delivery, failure(kind, delivery, text, **facts), now)

    def _still_wanted(self, lost: list[Delivery], *, linked: bool) -> list[Delivery]:
        """Return those whose publishers do not get them back, to be sent again.

        :param linked: the connection is still there: the offender was not routed by it either
        """
        wanted = []
        for delivery in lost:
            delivery.suspect(Doubt.SUSPECTED if linked else Doubt.POSSIBLE)
            delivery.innocent += 1
            self.breaker.released(delivery)
            if delivery.open and delivery.row is not RowState.WITHDRAWING:
                delivery.step_attempt(AttemptEvent.ISOLATED)
                wanted.append(delivery)
            else:
                self.failures.retire(delivery)
        return wanted

    def _reject(self, offender: Delivery, loss: Loss, now: float) -> None:
        """Reject the one that closed the channel alone; the others are free."""
        if loss.reply_code == INTERNAL_ERROR:
            offender.suspect(Doubt.POSSIBLE)
        refused = self._send_queue.poison.reject(offender, loss.reply_code)
        if loss.reply_code in (NO_PERMISSION, NOT_FOUND):
            self._doubt_what_was_there(refused, loss.reply_code)
        for delivery in refused:
            self.failures.judge(delivery, rejected(delivery, loss.reply_code, loss.text), now)
        self._send_queue.add_first(self._send_queue.poison.release())

    def _doubt_what_was_there(self, refused: list[Delivery], reply_code: int) -> None:
        """Suspect earlier attempts of having been routed, where the broker would have done so.

        It has confirmed messages to that exchange, or on that route. So that was taken away since,
        and some were routed before it was, though their confirms never came.
        """
        routes = self.failures.routes
        exchanges = {exchange for exchange, _ in routes}
        for delivery in refused:
            exchange, key = delivery.envelope.exchange, delivery.envelope.routing_key
            there = exchange in exchanges if reply_code == NOT_FOUND else (exchange, key) in routes
            if there and delivery.doubt is Doubt.SUSPECTED:
                delivery.suspect(Doubt.POSSIBLE)

    # --- the retry worker ------------------------------------------------------------------------

    def stored(self, deliveries: Iterable[Delivery], now: float) -> None:
        """Messages are stored: now their publishers may be told so."""
        for delivery in deliveries:
            if delivery.row in ROW_PENDING or not delivery.open:
                self.failures.stored(delivery, now)

    def not_stored(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """The store cannot take it. A publisher gets it back; what is in flight stays there."""
        if delivery.attempt is AttemptState.QUEUED:
            self._send_queue.withdraw(delivery)
        self.failures.refused(delivery, error, now)

    def withdrawn(self, deliveries: Iterable[Delivery], now: float, *, gone: bool) -> None:
        """Messages go back to their publishers.

        :param gone: their rows are deleted; else another process has them, and sends them
        """
        for delivery in deliveries:
            self.store_is_late(delivery, now, gone=gone)

    def store_is_late(self, delivery: Delivery, now: float, *, gone: bool = False) -> None:
        """Answer a publisher without the store, which has had its time.

        :param gone: its row is known to be gone; else another process may send the message
        """
        if not self.failures.may_stop_waiting(delivery):
            return
        if delivery.attempt is AttemptState.QUEUED:
            self._send_queue.withdraw(delivery)  # a suspect, of which nothing could be stored
        self.failures.stop_waiting(delivery, now, gone=gone)

    def taken_over(self, deliveries: Iterable[Delivery], now: float) -> None:
        """Another process has claimed their rows: it sends them, and they are not sent here.

        What is in flight stays there, since its confirm would be the first to come.
        """
        for delivery in deliveries:
            delivery.suspect(Doubt.POSSIBLE)
            if delivery.attempt is AttemptState.QUEUED:
                self._send_queue.withdraw(delivery)
                self._hold_back(delivery, now)
            if delivery.attempt is AttemptState.SCHEDULED and delivery.row in ROW_PENDING:
                self.failures.stored(delivery, now)

    def ended_elsewhere(self, deliveries: Iterable[Delivery], now: float, *, dead: bool) -> None:
        """Another process has delivered or dead-lettered them, and counted that: tell it here."""
        for delivery in deliveries:
            if delivery.attempt is AttemptState.QUEUED:
                self._send_queue.withdraw(delivery)
            self.failures.end_elsewhere(delivery, now, dead=dead)

    def vanished(self, deliveries: Iterable[Delivery]) -> None:
        """Their rows are gone, and no copy of them is here: they are their publishers' again."""
        for delivery in deliveries:
            # Another process may have claimed the row before, and have or deliver its message.
            delivery.suspect(Doubt.POSSIBLE)
            store = self._retry_worker.name
            text = f"the message is gone from the store, by no doing of ours: {store}"
            self.failures.lose(delivery, failure(StoreError, delivery, text))

    def _store_is_silent(self, delivery: Delivery, now: float) -> None:
        """Give back a message that was to be stored before it is sent, unless its row is there."""
        if delivery.claim() and delivery.may_fail():  # else its publisher relies on the order
            self.failures.refused(delivery, silent_store(delivery, self._retry_worker.name), now)

    # --- why a message was not sent ------------------------------------------------------------

    def _circuit_is_full(self) -> bool:
        """Whether the breaker has no place for another message; half-open, it has one."""
        if self.breaker.state is CircuitState.CLOSED:
            return False
        half_open = self.breaker.state is CircuitState.HALF_OPEN
        return self.breaker.refuses() or (half_open and self.waiting > 0)

    def _circuit_open(self, delivery: Delivery, now: float) -> CircuitOpenError:
        error = failure(CircuitOpenError, delivery, "the circuit breaker is open")
        error.retry_after = self.breaker.retry_after(now)
        return error

    def _fail_unsent(self, delivery: Delivery, now: float) -> None:
        error = self._unsent(delivery, now)
        if isinstance(error, NotConnectedError):
            self._count_attempt(error, now)
        self.failures.judge(delivery, error, now)

    def _count_attempt(self, error: PublishError, now: float) -> None:
        """Tell the breaker of an attempt to connect, once, however many messages it fails."""
        if error.counts_for_breaker and not self._attempt_counted:
            self._attempt_counted = True
            self.breaker.failed(None, now)

    def _unsent(self, delivery: Delivery, now: float) -> PublishError:
        """Why a message that waits for the connection has not been written (again) in time."""
        if self.shutdown.begun:
            return failure(ProducerClosedError, delivery, CLOSED)
        if self.breaker.refuses():
            return self._circuit_open(delivery, now)
        if self.blocked:
            return failure(BrokerBlockedError, delivery, "the broker blocks publishers")
        if self._send_queue.channel is None:
            return failure(NotConnectedError, delivery, "not connected in time")
        return failure(ConfirmTimeoutError, delivery, "not written in time")
