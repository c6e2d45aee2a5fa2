"""What a failure means for a message: every nack, return, loss and timeout comes through here.

`decide` judges: deferred, failed or dead-lettered. The `FailureHandler` carries that out.

What is said to a publisher waits until the store has done its part: a message is ours once it is
stored, and the publisher's once its row is gone. Where the store has no answer in time,
it is said without one.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

import enum

from attrs import field, frozen

from mlproducer._core import events
from mlproducer._core.breaker import Breaker
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_errors import exhausted, failure, silent_store
from mlproducer._core.delivery_states import (
    ON_THE_WIRE,
    ROW_IN_STORE,
    ROW_KNOWN,
    ROW_PENDING,
    UNANSWERED,
    AnswerState,
    AttemptEvent,
    AttemptState,
    RowEvent,
    RowState,
)
from mlproducer._core.events import Emit
from mlproducer._core.interfaces import LeaveWindow, MakeDeadLetter, RetryWorker
from mlproducer.errors import (
    AuthenticationError,
    CircuitOpenError,
    NotConnectedError,
    PublishError,
    UnroutableError,
)

SOFT_ACCUSATIONS = frozenset({403, 404, 406})
"""Channel errors (AMQP 0-9-1, section 1.5.2.5) by which a broker answers one bad message."""

INTERNAL_ERROR = 541
"""The broker has failed over a message, maybe when some queue had it already."""

HARD_ACCUSATIONS = frozenset({501, 502, 503, 505, 540, INTERNAL_ERROR})
"""Connection errors that a message may have caused; CONNECTION_FORCED and the like are not."""

UNBOUNDED = (CircuitOpenError, AuthenticationError)
"""States that may last so long that the memory should not fill with what waits for their end."""


class Decision(enum.Enum):
    """What is to be done with a message whose attempt failed."""

    DEFER = enum.auto()
    FAIL = enum.auto()
    DEAD_LETTER = enum.auto()


def decide(
    error: PublishError, *, retry: bool, owned: bool, exhausted: bool, durable: bool
) -> Decision:
    """Judge one failure.

    :param retry: the library may keep the message; false where the publisher wants it back
    :param owned: its publisher relies on it: a message that is ours never fails, it is
        dead-lettered where no later attempt can succeed
    :param exhausted: the last retry was used up
    :param durable: the store survives the process; only such a one takes messages while the
        breaker is open or the credentials are wrong, since that may last
    """
    if not retry:
        return Decision.FAIL
    if owned:
        return Decision.DEAD_LETTER if exhausted or error.permanent else Decision.DEFER
    if not error.deferrable or (isinstance(error, UNBOUNDED) and not durable):
        return Decision.FAIL
    return Decision.DEAD_LETTER if exhausted else Decision.DEFER


def accuses(reply_code: int) -> bool:
    """Whether a loss with this code may be the fault of one of the messages in flight."""
    return reply_code in SOFT_ACCUSATIONS or reply_code in HARD_ACCUSATIONS


@frozen
class FailureHandler:
    """Carries out what `decide` says, so that nothing is lost and no answer is given twice.

    :ivar max_retries: attempts after the first, for messages without a policy of their own
    :ivar pending: those whose publisher's answer waits for the store's: their rows say which
    :ivar routes: exchanges and routing keys that the broker has confirmed messages for
    """

    max_retries: int
    breaker: Breaker
    retry_worker: RetryWorker
    make_dead_letter: MakeDeadLetter
    leave_window: LeaveWindow
    emit: Emit
    pending: dict[Delivery, None] = field(factory=dict, init=False)
    routes: set[tuple[str, str]] = field(factory=set, init=False)

    # --- failures ------------------------------------------------------------------------------

    def judge(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Judge an attempt that failed, or that was not made in time."""
        if not (delivery.answer is AnswerState.WAITING or delivery.is_ours):
            self.retire(delivery)  # its publisher has withdrawn it
            return
        self._count(delivery, error, now)
        if delivery.answer not in UNANSWERED:
            self.retire(delivery)
            return
        if delivery.dead:
            if error.permanent:
                self.emit(events.LetterKept(delivery, error))
            self.defer(delivery, now)
            return
        delivery.reason = error
        delivery.first_failed = delivery.first_failed or now
        self.emit(events.AttemptFailed(delivery, error))
        if delivery.row is RowState.WITHDRAWING:
            self.retire(delivery)  # it goes back as soon as its row is gone, with this reason
            return
        waits = isinstance(error, UnroutableError) and self._route_comes_back(delivery)
        verdict = decide(
            error,
            retry=delivery.retry or delivery.relied_on,
            owned=delivery.row in ROW_IN_STORE or delivery.relied_on,
            exhausted=not waits
            and delivery.attempt not in ON_THE_WIRE
            and self._retries_over(delivery) >= 0,
            durable=self.retry_worker.durable,
        )
        if verdict is Decision.FAIL:
            self.fail(delivery, error, now)
        elif verdict is Decision.DEAD_LETTER:
            self._dead_letter(delivery, error, now)
        else:
            self.defer(delivery, now)

    def _dead_letter(self, delivery: Delivery, error: PublishError, now: float) -> None:
        letter = self.make_dead_letter(delivery, error, now)
        delivery.envelope, delivery.dead = letter, True
        self.defer(delivery, now, fresh=True)

    def defer(self, delivery: Delivery, now: float, *, fresh: bool = False) -> None:
        """Have it stored, or have its row say what came of the last attempt.

        :param fresh: it has become a dead letter just now, and is due at once
        """
        before = delivery.row
        known = before in ROW_KNOWN
        if known:
            self.leave(delivery, AttemptEvent.SCHEDULED)
        elif delivery.attempt not in ON_THE_WIRE:
            delivery.step_attempt(AttemptEvent.SCHEDULED)  # its slot is free once it is stored
        sure = before in ROW_IN_STORE or (known and delivery.leased_until >= now)
        # Before the order: the retry thread stores only what its row says is wanted.
        self._step(delivery, RowEvent.NOTE if sure else RowEvent.WRITE)
        stored = self.retry_worker.defer(delivery, now, before=before, fresh=fresh)
        if stored or (sure and before is RowState.AHEAD):
            self.stored(delivery, now)  # it is stored already, maybe since before it was sent

    def fail(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Fail it to its publisher; what has its tag open stays there, and is not sent again."""
        if not delivery.may_fail():  # its publisher has left a moment ago, and relies on us
            if not delivery.dead and (error.permanent or self._used_up(delivery)):
                self._dead_letter(delivery, error, now)
            else:
                self.defer(delivery, now)
            return
        delivery.reason = error  # first: what is retired is told it, should this be cut
        if delivery.row in ROW_KNOWN and self.retry_worker.durable:
            self.retire(delivery)
            waited = delivery.in_store
            self._step(delivery, RowEvent.WITHDRAW)
            self.retry_worker.withdraw(delivery, waited=waited)
            return
        retired = delivery.attempt not in ON_THE_WIRE
        if retired:
            delivery.step_attempt(AttemptEvent.RETIRED)
        self.delete(delivery)
        self._tell(delivery, error)
        if retired:
            self.leave_window((delivery,))

    def fail_at_the_end(self, delivery: Delivery, error: PublishError) -> None:
        """Fail a message when the producer ends, and no answer of the store is heard any more."""
        self.retire(delivery)
        self.delete(delivery)
        self._tell(delivery, error)

    def end_elsewhere(self, delivery: Delivery, now: float, *, dead: bool) -> None:
        """Tell how a message ended in another process."""
        self.retire(delivery)
        if delivery.answer not in UNANSWERED:
            return
        self._step(delivery, RowEvent.GONE)
        if dead:
            delivery.fail(exhausted(delivery))
        else:
            delivery.confirm(now)

    def lose(self, delivery: Delivery, error: PublishError) -> None:
        """Tell that the store has lost a message."""
        self.retire(delivery)
        if delivery.answer in UNANSWERED:
            self._step(delivery, RowEvent.GONE)
            self._tell(delivery, error)

    def drop(self, delivery: Delivery) -> None:
        """Retire what has been answered: it is the store's, or was withdrawn on its way there."""
        self.retire(delivery)
        if delivery.row is RowState.AHEAD:
            self.delete(delivery)

    def delete(self, delivery: Delivery) -> None:
        """Have its row deleted, if there is one; nothing waits for that."""
        if delivery.row in ROW_KNOWN or delivery.row is RowState.WITHDRAWING:
            self.retry_worker.settle(delivery)
            self._step(delivery, RowEvent.DELETE)

    def retire(self, delivery: Delivery) -> None:
        """Send it no more; what has its tag open stays there."""
        self.leave(delivery, AttemptEvent.RETIRED)

    def leave(self, delivery: Delivery, event: AttemptEvent) -> None:
        """Retire or schedule a delivery and free its slot, unless its tag is open."""
        if delivery.attempt not in ON_THE_WIRE:
            delivery.step_attempt(event)
            self.leave_window((delivery,))

    def _step(self, delivery: Delivery, event: RowEvent) -> None:
        """Move the row, and remember whether an answer of the store is waited for."""
        if delivery.step_row(event) in ROW_PENDING:
            self.pending[delivery] = None
        else:
            self.pending.pop(delivery, None)

    # --- answers of the retry worker -------------------------------------------------------------

    def stored(self, delivery: Delivery, now: float) -> None:
        """Tell that it is ours: it is stored."""
        if delivery.row is RowState.WITHDRAWING:
            return  # it has failed meanwhile, and its publisher is told once its row is gone
        if delivery.row is not RowState.HELD:
            self._step(delivery, RowEvent.COMMITTED)
        if delivery.answer not in UNANSWERED:
            self.delete(delivery)  # its publisher has got it back meanwhile
        elif delivery.retry or delivery.relied_on:
            self.emit(events.Deferred(delivery))
            delivery.defer(now, durable=self.retry_worker.durable)
        else:
            reason = delivery.reason or failure(PublishError, delivery, "taken back")
            self.fail(delivery, reason, now)  # its publisher was interrupted meanwhile

    def refused(self, delivery: Delivery, error: PublishError, now: float) -> None:
        """Fail what the store cannot take, or not in time; what is in flight stays there."""
        if delivery.row is RowState.WRITING:
            self._step(delivery, RowEvent.REFUSED)
        if delivery.answer in UNANSWERED and delivery.is_ours:
            error.possibly_sent = (
                delivery.doubt is not Doubt.NONE or delivery.attempt in ON_THE_WIRE
            )
            error.attempts = delivery.attempts
            self.fail(delivery, error, now)

    def may_stop_waiting(self, delivery: Delivery) -> bool:
        """Whether its publisher is to be told what the store did not, which nothing else can then.

        It is not where the publisher has left meanwhile, and relies on the order to store its
        message: that is still under way, and a second one would make a second row.
        """
        if delivery.row is RowState.WRITING and delivery.answer in UNANSWERED:
            return delivery.may_fail()
        return delivery.row in ROW_PENDING

    def stop_waiting(self, delivery: Delivery, now: float, *, gone: bool) -> None:
        """Tell what waits for the store's answer, which has had its time.

        `may_stop_waiting` has said so.

        :param gone: its row is gone. Else that row, if there is one, may become another process's,
            or is, and is sent: it has not been deleted, or its lease is over
        """
        if delivery.row is RowState.WITHDRAWING:
            self._step(delivery, RowEvent.GONE if gone else RowEvent.DELETE)
            if not gone:
                delivery.suspect(Doubt.POSSIBLE)
            error = delivery.reason or failure(PublishError, delivery, "taken back")
            error.possibly_sent = error.possibly_sent or delivery.doubt is not Doubt.NONE
            self._tell(delivery, error)
        elif delivery.row is RowState.WRITING:
            if delivery.leased_until < now and not gone:
                delivery.suspect(Doubt.POSSIBLE)
            self.refused(delivery, silent_store(delivery, self.retry_worker.name), now)
            if (
                delivery.answer not in UNANSWERED
            ):  # behind the order to store it, which may succeed yet
                self.retry_worker.settle(delivery)
                self._step(delivery, RowEvent.DELETE)

    def _tell(self, delivery: Delivery, error: PublishError) -> None:
        self.emit(events.Failed(delivery, error))
        delivery.fail(error)

    # --- after a failure of the I/O thread -------------------------------------------------------

    def resume(self, delivery: Delivery, error: PublishError, now: float) -> bool:
        """Go on with what was cut after its attempt had ended; false if an order may be under way.

        :param error: what its publisher is told where nothing else is known
        """
        if not delivery.open:
            self.leave_window((delivery,))
        elif delivery.row in ROW_PENDING:
            return False
        elif delivery.attempt is AttemptState.RETIRED:
            self.fail(delivery, delivery.reason or error, now)
            self.leave_window((delivery,))
        elif delivery.row is RowState.HELD:
            if delivery.answer is AnswerState.WAITING:
                self.stored(delivery, now)
            return False
        else:
            self.defer(delivery, now)
        return True

    def order_again(self, delivery: Delivery, now: float) -> None:
        """Give the order that was cut off, or take the answer that was, after `resume`."""
        worker = self.retry_worker
        if delivery.row is RowState.WITHDRAWING:
            worker.withdraw(delivery, waited=False)
            return
        holds = worker.holds(delivery)
        if delivery.attempt is AttemptState.SCHEDULED and holds is not False:
            before = RowState.NONE if holds is None else RowState.HELD
            if not worker.defer(delivery, now, before=before):
                return
        if delivery.row is RowState.WRITING:
            self.leave_window((delivery,))
            self.stored(delivery, now)

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
        return delivery.attempt not in ON_THE_WIRE and self._retries_over(delivery) >= 0

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

        A classic queue whose node is down is answered like one that never was. A row says whether
        its message has waited for its route already, in this process or in another.
        """
        route = (delivery.envelope.exchange, delivery.envelope.routing_key)
        if delivery.unrouted:
            self.routes.add(route)
        if route not in self.routes:
            return False
        delivery.unrouted += 1
        return True
