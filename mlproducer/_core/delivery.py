"""A message on its way: where it is, what was tried, and whom to tell.

Two endings, each exactly once: the publisher is *answered*, and the delivery *retires*. They often
coincide, but a confirm that is late answers first and retires later.

Runs on: the I/O thread, which owns a delivery from the mailbox to its retirement.
"""

from __future__ import annotations

import enum
import math
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from mlproducer._fate import Fate
from mlproducer.errors import PublishError
from mlproducer.message import Envelope, Receipt
from mlproducer.settings import RetryPolicy

if TYPE_CHECKING:
    from mlproducer._core.interfaces import Owner


class Place(enum.Enum):
    """Where a delivery is; always exactly one."""

    MAILBOX = enum.auto()  # handed over, by its publisher or another sender, not yet seen by this
    WAITING = enum.auto()  # with the sender, for a connection that can carry it
    IN_FLIGHT = enum.auto()  # written, its tag open
    STORED = enum.auto()  # with the retry worker, for a retry
    RETIRED = enum.auto()  # confirmed, or given back, or dead-lettered


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
        """Nobody withdraws it."""
        return True

    def cancel(self) -> bool:
        """It is taken over."""
        return False

    def set_result(self, result: Receipt, /) -> None:
        """Tell nobody."""

    def set_exception(self, exception: PublishError, /) -> None:
        """Tell nobody."""


class Delivery:
    """One message, from `publish()` to its fate.

    :ivar owner: the connection that it belongs to; only that one's I/O thread gives it to another
    :ivar size: bytes, as the gate and the connection count them
    :ivar answer: what the publisher waits for; for ``submit()`` the message's fate
    :ivar fate: what is told next, once something was or is about to be: mostly what a receipt
        waits for, from when the answer was DEFERRED
    :ivar taken: the library has the message: its publisher cannot withdraw it any more
    :ivar heir: what gets the answer where the publisher has ended its wait without one
    :ivar recalled: its publisher was told that the message is its own: it is not written again
    :ivar retry: the library may keep the message and try again
    :ivar policy: how often and how soon it is tried again; ``None``: as the settings say
    :ivar answer_deferral: the publisher waits for an answer, not for the fate
    :ivar deadline: monotonic time until which the publisher waits
    :ivar counted: the breaker has counted the attempt as failed
    :ivar dead: retries are used up; what is sent now is the dead letter
    :ivar first_failed: monotonic time of the first failure, 0 before it
    :ivar open: somebody is still to be told
    :ivar doubtful: an earlier attempt, or another process, may have brought it to a queue
    :ivar suspected: the only doubt is of an attempt on a channel that was closed over a message
    :ivar unrouted: how often it was returned although its route had been confirmed before
    :ivar innocent: how many attempts went down with a channel that was closed over one of several
    :ivar stored: the retry worker has a row for it, or was told to make one
    :ivar kept: the message is ours: it goes on without its publisher
    :ivar buried: its letter has been handed to the retry worker before
    :ivar leased_until: monotonic time until which its row is this process's, who may send it
    :ivar reason: what went wrong with the last attempt
    :ivar late: its publisher has stopped waiting for the confirm of the attempt under way
    :ivar returned: the broker's reply code and text, between Basic.Return and its ack
    """

    __slots__ = (
        "__weakref__",
        "answer",
        "answer_deferral",
        "attempts",
        "buried",
        "counted",
        "dead",
        "deadline",
        "doubtful",
        "envelope",
        "fate",
        "first_failed",
        "heir",
        "innocent",
        "kept",
        "late",
        "leased_until",
        "open",
        "owner",
        "place",
        "policy",
        "reason",
        "recalled",
        "retry",
        "returned",
        "sent_at",
        "size",
        "started",
        "stored",
        "suspected",
        "taken",
        "unrouted",
        "word",
    )

    def __init__(
        self,
        envelope: Envelope,
        answer: Waiter,
        *,
        started: float,
        deadline: float,
        retry: bool = True,
        policy: RetryPolicy | None = None,
        answer_deferral: bool = True,
    ) -> None:
        self.envelope = envelope
        self.owner: Owner | None = None
        self.size = envelope.size
        self.answer = answer
        self.fate: Waiter | None = None
        self.heir: Waiter | None = None
        self.word = None
        self.taken = False
        self.recalled = False
        self.started = started
        self.deadline = deadline
        self.retry = retry
        self.policy = policy
        self.answer_deferral = answer_deferral
        self.attempts = 0
        self.sent_at = 0.0
        self.first_failed = 0.0
        self.counted = False
        self.dead = False
        self.open = True
        self.doubtful = False
        self.suspected = False
        self.unrouted = 0
        self.innocent = 0
        self.stored = False
        self.kept = False
        self.buried = False
        self.leased_until = math.inf
        self.late = False
        self.place = Place.MAILBOX
        self.reason: PublishError | None = None
        self.returned: tuple[int, str] | None = None

    # --- who has the message -------------------------------------------------------------------

    def claim(self) -> bool:
        """Take the message over from its publisher; false if it was withdrawn, or taken before.

        The sender does so before the first write, the failure handler before it decides what
        becomes of a message that was not written, and the store's writer once its row is committed.
        A publisher that withdraws its message takes the same token, so only one of them goes on
        with it.
        """
        claimed = self.answer.set_running_or_notify_cancel()
        if claimed:
            self.taken = True
        return claimed

    @property
    def is_ours(self) -> bool:
        """Whether the library has the message, or gets it now."""
        return self.taken or self.claim()

    # --- who speaks first ----------------------------------------------------------------------

    def leave(self, heir: Waiter) -> bool:
        """End a publisher's wait although the I/O thread has not answered; on its own thread.

        :param heir: gets the answer if it comes
        :returns: false if the I/O thread is about to answer; then that is the answer
        """
        self.heir = heir
        return self._take_word()

    @property
    def promised(self) -> bool:
        """Whether its publisher has been told, or has told itself, that the message is ours."""
        told = self.fate or self.heir
        return told is not self.answer and isinstance(told, Fate)

    def may_fail(self) -> bool:
        """Take the right to say that it is the publisher's; false where it was promised."""
        listener = self._listener()
        return listener is self.answer or not isinstance(listener, Fate)

    def confirm(self, now: float) -> None:
        """Tell that the broker has confirmed it."""
        self.open = False
        receipt = Receipt(self.envelope.message_id, self.attempts, now - self.started)
        self._listener().set_result(receipt)

    def defer(self, now: float, *, durable: bool) -> None:
        """Tell a publisher that waits for an answer that the library goes on without it."""
        if not (self.open and self.answer_deferral):
            return
        self.answer_deferral = False
        listener = self._listener()
        left = listener if isinstance(listener, Fate) and listener is not self.answer else None
        self.fate = fate = left or Fate()
        if durable:
            fate.delivery = self
        if left is None:
            fate.set_running_or_notify_cancel()
            listener.set_result(self._deferral(now, fate, durable=durable))

    def entrust(self, now: float) -> None:
        """Tell that the message is in a durable store, and its fate not to be learned here."""
        self.open, self.kept = False, True
        unknown: Future[Receipt] = Future()
        unknown.cancel()
        self._listener().set_result(self._deferral(now, unknown, durable=True))

    def _deferral(self, now: float, fate: Future[Receipt], *, durable: bool) -> Receipt:
        message_id, elapsed = self.envelope.message_id, now - self.started
        return Receipt(message_id, self.attempts, elapsed, durable, self.reason, fate)

    def give_back(self, error: PublishError) -> None:
        """Tell that the library does not own it, or gives up on it."""
        self.open = False
        self._listener().set_exception(error)

    def _listener(self) -> Waiter:
        """Give what is to be told: the publisher's answer, or what came in its place."""
        fate = self.fate
        if fate is None:
            try:  # `_take_word`, without a call, since each confirm comes through here
                del self.word
                fate = self.answer
            except AttributeError:
                fate = self.heir or NO_WAITER
            self.fate = fate
        return fate

    def _take_word(self) -> bool:
        """Take the right to speak first, which only one thread can: it deletes the attribute."""
        try:
            del self.word
        except AttributeError:
            return False
        return True


NO_WAITER = NoWaiter()
