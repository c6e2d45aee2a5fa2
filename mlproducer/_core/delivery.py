"""A message on its way: where it stands, what was tried, and who waits for it.

Two endings, each exactly once: the publisher is *answered*, and the delivery *retires*. They often
coincide, but a confirm that is late answers first and retires later.

Runs on: the I/O thread, which owns a delivery from the mailbox to its retirement, but for what the
retry thread does with one that it has claimed from the store and not handed over yet; and
`Delivery.withdraw`, `Delivery.recall` and `Delivery.leave` on the publisher's.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from mlproducer._core.delivery_states import (
    ANSWER_MOVES,
    ATTEMPT_MOVES,
    CONFIRMED,
    ON_THE_WIRE,
    ROW_IN_STORE,
    ROW_MOVES,
    TAKEN,
    UNANSWERED,
    AnswerEvent,
    AnswerState,
    AttemptEvent,
    AttemptState,
    RowEvent,
    RowState,
)
from mlproducer._core.states import illegal
from mlproducer.errors import PublishError
from mlproducer.message import Envelope, Fate, Receipt
from mlproducer.settings import RetryPolicy


class Doubt(enum.IntEnum):
    """Whether a queue may have the message by an earlier attempt; it only grows."""

    NONE = 0
    SUSPECTED = 1  # only if another message was the one over which the channel was closed
    POSSIBLE = 2


_MAILBOX, _NO_ROW = AttemptState.MAILBOX, RowState.NONE
_WITHDRAWABLE, _NO_DOUBT = AnswerState.WITHDRAWABLE, Doubt.NONE
_FOR_EVER = math.inf
_NOT_RETURNED = (0, "")


class Waiter(Protocol):
    """Whom to answer; a future, or anything that can be taken over, withdrawn and answered."""

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message over; false if it was withdrawn."""

    def cancel(self) -> bool:
        """Withdraw the message; false if it was taken over."""

    def set_result(self, result: Receipt, /) -> None:
        """Answer that it is ours."""

    def set_exception(self, exception: PublishError, /) -> None:
        """Answer that it is the publisher's."""


class NoWaiter:
    """Waits for the fate of a message whose publisher is in another process, or gone."""

    def set_running_or_notify_cancel(self) -> bool:
        """Return true: it cannot be withdrawn."""
        return True

    def cancel(self) -> bool:
        """Return false: it is taken over."""
        return False

    def set_result(self, result: Receipt, /) -> None:
        """Do nothing: no one waits."""

    def set_exception(self, exception: PublishError, /) -> None:
        """Do nothing: no one waits."""


class Owner(Protocol):
    """A connection's I/O thread, as the retry worker sees it: where answers and due messages go."""

    def order(self, order: Callable[[], None]) -> bool:
        """Have something done on the I/O thread; false if that has ended."""

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages again."""

    def pass_on(self, deliveries: Sequence[Delivery], owner: Owner) -> None:
        """Have another connection send messages that belong to this one."""

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored, and may be sent for the first time."""

    def stored(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored, and wait for a retry."""

    def not_stored(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """They could not be stored."""

    def withdrawn(self, deliveries: Sequence[Delivery], *, gone: bool) -> None:
        """Their rows are gone, or are another process's, which sends them."""

    def taken_over(self, deliveries: Sequence[Delivery]) -> None:
        """Another process has claimed their rows, and sends them."""

    def ended_elsewhere(self, deliveries: Sequence[Delivery], *, dead: bool) -> None:
        """Another process has delivered them, or dead-lettered them."""

    def vanished(self, deliveries: Sequence[Delivery]) -> None:
        """Their rows are gone from the store, and there is no copy of them."""

    def order_again(self, deliveries: Sequence[Delivery]) -> None:
        """No order is under way for them, nor an answer."""

    def expire(self, delivery: Delivery) -> None:
        """A publisher's time is up."""

    def ready(self) -> int:
        """How many messages handed over now would be written: none, one as a probe, or many."""


class Delivery:
    """One message, from `publish()` to its fate.

    :ivar attempt: where the attempt to send it stands
    :ivar row: where its row of the store stands
    :ivar answer: what its publisher has been told
    :ivar owner: the connection that it belongs to; only that one's I/O thread gives it to another
    :ivar size: bytes, as the gate and the connection count them
    :ivar waiter: what the publisher waits for; for ``submit()`` the message's fate
    :ivar answers_deferral: the publisher waits for an answer, not for the fate
    :ivar fate: what is told next, once something was or is about to be: mostly what a receipt
        waits for, from when the answer was DEFERRED
    :ivar successor: gets the answer where the publisher has ended its wait without one
    :ivar recalled: its publisher was told that the message is its own: it is not written again
    :ivar retry: the library may keep the message and try again
    :ivar policy: how often and how soon it is tried again; ``None``: as the settings say
    :ivar deadline: monotonic time until which the publisher waits
    :ivar dead: retries are used up; what is sent now, the envelope, is the dead letter
    :ivar counted: the breaker has counted the attempt as failed
    :ivar first_failed: monotonic time of the first failure, 0 before it
    :ivar doubt: whether an earlier attempt, or another process, may have brought it to a queue
    :ivar unrouted: how often it was returned although its route had been confirmed before
    :ivar innocent: how many attempts went down with a channel that was closed over one of several
    :ivar leased_until: monotonic time until which its row is this process's, who may send it
    :ivar reason: what went wrong with the last attempt
    :ivar returned: the broker's reply code and text, from the last Basic.Return
    """

    __slots__ = (
        "__weakref__",
        "_unspoken",
        "answer",
        "answers_deferral",
        "attempt",
        "attempts",
        "counted",
        "dead",
        "deadline",
        "doubt",
        "envelope",
        "fate",
        "first_failed",
        "innocent",
        "leased_until",
        "owner",
        "policy",
        "reason",
        "recalled",
        "retry",
        "returned",
        "row",
        "sent_at",
        "size",
        "started",
        "successor",
        "unrouted",
        "waiter",
    )

    def __init__(
        self,
        envelope: Envelope,
        waiter: Waiter,
        *,
        started: float,
        deadline: float,
        retry: bool = True,
        policy: RetryPolicy | None = None,
        answers_deferral: bool = True,
        owner: Owner | None = None,
    ) -> None:
        # One statement for those of a value, and no look-up in the class of an enum: this is a
        # third of the time less, for what each message does.
        self.attempt = _MAILBOX
        self.row = _NO_ROW
        self.answer = _WITHDRAWABLE
        self.doubt = _NO_DOUBT
        self.envelope = envelope
        self.waiter = waiter
        self.owner = owner
        self.size = len(envelope.properties) + len(envelope.body)
        self.started = started
        self.deadline = deadline
        self.retry = retry
        self.policy = policy
        self.answers_deferral = answers_deferral
        self.fate: Waiter | None = None
        self.successor: Waiter | None = None
        self.reason: PublishError | None = None
        self._unspoken = None
        self.recalled = self.counted = self.dead = False
        self.attempts = self.unrouted = self.innocent = 0
        self.sent_at = self.first_failed = 0.0
        self.leased_until = _FOR_EVER
        self.returned = _NOT_RETURNED

    @classmethod
    def stored(
        cls,
        envelope: Envelope,
        *,
        started: float,
        policy: RetryPolicy | None = None,
        attempts: int = 0,
        dead: bool = False,
        doubtful: bool = False,
        reason: PublishError | None = None,
        first_failed: float = 0.0,
        unrouted: int = 0,
        fate: Waiter | None = None,
    ) -> Delivery:
        """Return the delivery of a message that is a row of the store, of this process or another.

        :param fate: what waits for its end; ``None``: nothing in this process
        """
        delivery = cls(envelope, NO_WAITER, started=started, deadline=started, policy=policy)
        delivery.attempt, delivery.row = AttemptState.SCHEDULED, RowState.HELD
        delivery.answer = AnswerState.DEFERRED
        delivery.fate = fate
        delivery.attempts, delivery.dead = attempts, dead
        delivery.doubt = Doubt.POSSIBLE if doubtful else Doubt.NONE
        delivery.reason, delivery.first_failed = reason, first_failed
        delivery.unrouted = unrouted
        return delivery

    # --- where it stands -----------------------------------------------------------------------

    def step_attempt(self, event: AttemptEvent) -> AttemptState:
        """Move the attempt, and return its new state.

        :raises IllegalMoveError: its table has no such move; nothing has changed
        """
        try:
            self.attempt = ATTEMPT_MOVES[self.attempt][event]
        except KeyError:
            raise illegal(self.attempt, event) from None
        return self.attempt

    def step_row(self, event: RowEvent) -> RowState:
        """Move the row, and return its new state.

        :raises IllegalMoveError: its table has no such move; nothing has changed
        """
        try:
            self.row = ROW_MOVES[self.row][event]
        except KeyError:
            raise illegal(self.row, event) from None
        return self.row

    def step_answer(self, event: AnswerEvent) -> AnswerState:
        """Move the answer, and return its new state.

        :raises IllegalMoveError: its table has no such move; nothing has changed
        """
        try:
            self.answer = ANSWER_MOVES[self.answer][event]
        except KeyError:
            raise illegal(self.answer, event) from None
        return self.answer

    @property
    def open(self) -> bool:
        """Whether something is still to be told."""
        return self.answer in UNANSWERED

    @property
    def in_flight(self) -> bool:
        """Whether its tag is open."""
        return self.attempt in ON_THE_WIRE

    @property
    def waits_for_answer(self) -> bool:
        """Whether a call waits until something is said; not one that waits for the fate."""
        unanswered = self.answer is AnswerState.WAITING or self.answer is AnswerState.WITHDRAWABLE
        return unanswered and self.answers_deferral

    @property
    def in_store(self) -> bool:
        """Whether it goes on as a row of the store; what was only written ahead may go back."""
        return self.row in ROW_IN_STORE

    # --- facts that threads other than its owner note --------------------------------------------

    def recall(self) -> None:
        """Have it not written again: its publisher has been, or is being, told that it is its own.

        It is set by the publisher's thread, once, and read by the I/O thread right before each
        write: one that has begun by then is not undone, and none begins after it.
        """
        self.retry = False
        self.recalled = True

    def hand_over(self, owner: Owner) -> None:
        """Give what waits here, or is due, to another connection; on the thread that has it."""
        if self.attempt is AttemptState.QUEUED:
            self.step_attempt(AttemptEvent.HANDED_OVER)
        self.owner = owner

    def give_to(self, owner: Owner) -> None:
        """Let another connection own it; on the thread that has it."""
        self.owner = owner

    def extend(self, deadline: float) -> None:
        """Let its publisher wait until ``deadline``; before it is handed over."""
        self.deadline = deadline

    def lease(self, until: float) -> None:
        """Note until when its row is this process's; ``-inf``: it may be another's already."""
        self.leased_until = until

    def unload(self) -> None:
        """Drop the body, which its row has: a backlog takes no memory."""
        self.envelope = self.envelope.unloaded()

    def reload(
        self, envelope: Envelope, attempts: int, *, dead: bool, doubtful: bool, waits: bool
    ) -> None:
        """Take from its row, which was claimed again, what another process may have added.

        What is in flight stays as it is written, and its tag decides; but that another process may
        have sent it is true of it as well. A dead letter stays one where its row could not be told
        of it, since another process had that.

        :param waits: the row says that it waits for a route that was there before
        """
        if doubtful and self.doubt is Doubt.NONE:
            self.doubt = Doubt.POSSIBLE
        if not self.in_flight:
            if dead or not self.envelope.properties:  # see `unload`
                self.envelope, self.dead = envelope, dead
            # Of its attempts a row has those that count, as `record_of` writes them.
            more = max(0, attempts + (0 if dead else self.innocent) - self.attempts)
            self.attempts += more
            if waits:  # those of another process were for want of the route
                self.unrouted += more if self.unrouted else self.attempts - self.innocent

    def suspect(self, doubt: Doubt) -> None:
        """Note that a queue may have it."""
        self.doubt = max(self.doubt, doubt)

    # --- who has the message -------------------------------------------------------------------

    def claim(self) -> bool:
        """Take the message over from its publisher; false if it was withdrawn, or taken before.

        The sender does so before the first write, the failure handler before it decides what
        becomes of a message that was not written, and the store writer once its row is committed.
        A publisher that withdraws its message takes the same token. Taking it is one step in C that
        the interpreter's lock does not divide (`del`, or a lock of the standard library's future),
        so one thread wins, and only that one moves the answer out of WITHDRAWABLE. Asking first and
        taking then would let two of them go on with the message.
        """
        claimed = self.waiter.set_running_or_notify_cancel()
        if claimed:
            self.answer = TAKEN[self.answer]
        return claimed

    def claim_again(self) -> bool:
        """Do what `claim` does, where it may have been cut after its first step."""
        if not self.is_ours and self.answer is AnswerState.WITHDRAWABLE:
            self.answer = TAKEN[self.answer]
        return self.open

    def withdraw(self) -> bool:
        """Take the message back; on the publisher's thread.

        :returns: false if the library has it, or had it: see `claim`
        """
        withdrawn = self.open and self.waiter.cancel()
        if withdrawn:
            self.step_answer(AnswerEvent.WITHDRAWN)
        return withdrawn

    @property
    def is_ours(self) -> bool:
        """Whether the library has the message, or gets it now."""
        if self.answer is AnswerState.WITHDRAWABLE:
            return self.claim()
        return self.answer is not AnswerState.WITHDRAWN

    # --- who answers first ----------------------------------------------------------------------

    def stop_waiting(self, successor: Waiter) -> bool:
        """End a publisher's wait although the I/O thread has not answered; on its own thread.

        :param successor: gets the answer if it comes
        :returns: false if the I/O thread is about to answer; then that is the answer
        """
        self.successor = (
            successor  # before the token goes, so that the thread that misses it finds this
        )
        return self._speak_first()

    @property
    def relied_on(self) -> bool:
        """Whether its publisher has been told, or has told itself, that the message is ours."""
        told = self.fate or self.successor
        return told is not self.waiter and isinstance(told, Fate)

    def may_fail(self) -> bool:
        """Take the right to say that it is the publisher's; false where that relies on us."""
        listener = self._listener()
        return listener is self.waiter or not isinstance(listener, Fate)

    def confirm(self, now: float) -> None:
        """Tell that the broker has confirmed it."""
        self.answer = CONFIRMED[self.answer]
        receipt = Receipt(self.envelope.message_id, self.attempts, now - self.started)
        self._listener().set_result(receipt)

    def confirm_again(self, now: float) -> None:
        """Do what `confirm` does, where it may have been cut after its first step."""
        listener = self._listener()
        told = listener.done() if isinstance(listener, Fate) else getattr(listener, "given", True)
        if not told:
            listener.set_result(
                Receipt(self.envelope.message_id, self.attempts, now - self.started)
            )

    def defer(self, now: float, *, durable: bool) -> None:
        """Tell a publisher that waits for an answer that the library goes on without it."""
        if self.answer is not AnswerState.WAITING:
            return
        self.step_answer(AnswerEvent.DEFERRED)
        if not self.answers_deferral:
            return
        listener = self._listener()
        left = listener if isinstance(listener, Fate) and listener is not self.waiter else None
        self.fate = fate = left or Fate()
        if durable:
            fate.delivery = self
        if left is None:
            # Not `Fate`'s own, which looks at its lock first: no interrupt can have left a new one.
            Future.set_running_or_notify_cancel(fate)
            listener.set_result(self._deferral(now, fate, durable=durable))

    def release(self, now: float) -> None:
        """Tell that the message is in a durable store, and its fate not to be learned here."""
        self.step_answer(AnswerEvent.RELEASED)
        unknown: Future[Receipt] = Future()
        unknown.cancel()
        self._listener().set_result(self._deferral(now, unknown, durable=True))

    def _deferral(self, now: float, fate: Future[Receipt], *, durable: bool) -> Receipt:
        message_id, elapsed = self.envelope.message_id, now - self.started
        return Receipt(message_id, self.attempts, elapsed, durable, self.reason, fate)

    def fail(self, error: PublishError) -> None:
        """Tell that the library does not own it, or gives up on it."""
        self.step_answer(AnswerEvent.FAILED)
        self._listener().set_exception(error)

    def _listener(self) -> Waiter:
        """Return what is to be told: the publisher's waiter, or what came in its place."""
        fate = self.fate
        if fate is None:
            try:  # `_speak_first`, without a call, since each confirm comes through here
                del self._unspoken
                fate = self.waiter
            except AttributeError:
                fate = self.successor or NO_WAITER
            self.fate = fate
        return fate

    def _speak_first(self) -> bool:
        """Take the right to speak first.

        Deleting an attribute is one step in C: of two threads that do it one finds it gone. The
        I/O thread that finds it gone tells the successor instead, so none of the two is silent.
        """
        try:
            del self._unspoken
        except AttributeError:
            return False
        return True


NO_WAITER = NoWaiter()
