"""Where publishers wait for the courier's answer: one for one message, or in line for many.

The courier keeps the deadline, at the publisher's word. The publisher's own wait is a little
longer, and is the backstop for when the courier is silent.

Runs on: the users' threads; an `Answer` is given on the I/O thread.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from attrs import define

from mlproducer.core.delivery import Delivery
from mlproducer.errors import ConfirmTimeoutError, PublishError
from mlproducer.latch import Latch
from mlproducer.message import Receipt

if TYPE_CHECKING:
    from mlproducer.engine.engine import Engine

GRACE = 0.15
"""Seconds beyond a publisher's deadline within which the courier is expected to have spoken."""


class Answer:
    """What one publisher waits for: a future as far as the courier is concerned, and interruptible.

    Whoever takes the token decides: the courier that the message is sent, or the publisher that it
    is withdrawn.
    """

    __slots__ = ("_given", "_heirs", "_latch", "_token")

    def __init__(self) -> None:
        self._latch: Latch | None = None
        self._token = [None]
        self._given: Receipt | PublishError | None = None
        self._heirs: list[Future[Receipt]] | None = None

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message over; false if it was withdrawn."""
        return self._take_token()

    def cancel(self) -> bool:
        """Withdraw the message; false if it was taken over."""
        return self._take_token()

    def set_result(self, receipt: Receipt) -> None:
        """Answer that it is ours."""
        self._give(receipt)

    def set_exception(self, error: PublishError) -> None:
        """Answer that it is the publisher's."""
        self._give(error)

    def done(self) -> bool:
        """Whether the answer is there."""
        return self._given is not None

    def wait(self, timeout: float) -> bool:
        """Wait for the answer; false if it did not come in ``timeout`` seconds."""
        if self._given is None:
            latch = self._latch = Latch()
            if self._given is None:  # else it came before the latch could be seen
                return latch.wait(timeout)
        return True

    def receipt(self) -> Receipt:
        """Give the answer that is there, or raise it."""
        if self._given is None:
            raise LookupError("there is no answer yet")
        if isinstance(self._given, PublishError):
            raise self._given
        return self._given

    def bequeath(self) -> Future[Receipt]:
        """Give a future that has the answer once it comes, for one who waits no longer."""
        heir: Future[Receipt] = Future()
        heirs = self._heirs = [heir]
        if self._given is not None:
            _settle(heirs, self._given)
        return heir

    def _take_token(self) -> bool:
        try:
            self._token.pop()
        except IndexError:
            return False
        return True

    def _give(self, given: Receipt | PublishError) -> None:
        self._given = given
        if self._latch is not None:
            self._latch.open()
        if self._heirs is not None:
            _settle(self._heirs, given)


def _settle(heirs: list[Future[Receipt]], given: Receipt | PublishError) -> None:
    """Pass an answer on, once: whoever takes the heir out of the list does it."""
    with contextlib.suppress(IndexError):
        heir = heirs.pop()
        if isinstance(given, Receipt):
            heir.set_result(given)
        else:
            heir.set_exception(given)


@define
class Wait:
    """A delivery, the answer that its publisher waits for, and whoever carries it."""

    engine: Engine
    delivery: Delivery
    answer: Answer

    def finish(self) -> Receipt:
        """Wait until the courier has spoken; at the deadline ask it to.

        :raises PublishError: the message is the publisher's again
        """
        answer = self.answer
        if not (answer.done() or answer.wait(self.delivery.deadline - time.monotonic())):
            self.engine.expire(self.delivery)
            if not answer.wait(GRACE):
                return self._unanswered()
        return answer.receipt()

    def _unanswered(self) -> Receipt:
        """End the wait although the courier is silent: its thread hangs, or has just died."""
        delivery = self.delivery
        withdrawn = self.answer.cancel()
        error = ConfirmTimeoutError(
            "the I/O thread does not answer",
            message_id=delivery.envelope.message_id,
            attempts=delivery.attempts,
            possibly_sent=not withdrawn,
        )
        if withdrawn or not delivery.retry:
            self.engine.withdraw(delivery)
            raise error
        elapsed = time.monotonic() - delivery.started
        message_id = delivery.envelope.message_id
        heir = self.answer.bequeath()
        return Receipt(message_id, delivery.attempts, elapsed, False, error, heir)


class Line:
    """Deliveries, and what was refused among them, in the order in which they were handed in."""

    def __init__(self) -> None:
        self._waits: deque[Wait | PublishError] = deque()
        self._results: list[Receipt | PublishError] = []

    def skip(self, error: PublishError) -> None:
        """Keep the place of a task that could not be handed in."""
        self._waits.append(error)

    def enter(self, wait: Wait) -> None:
        """Pass the gate, and answer meanwhile those ahead whose time is up."""
        delivery = wait.delivery
        while self._waits and not _undecided(self._waits[0]):
            self._finish_next()
        self._waits.append(wait)
        hand_in = wait.engine.post
        while not wait.engine.gate.enter(delivery, self._deadline()):
            if self._waits[0] is wait:
                hand_in = wait.engine.turn_away
                break
            self._finish_next()
        try:
            hand_in(delivery)
        except PublishError as error:
            wait.answer.set_exception(error)

    def finish(self) -> list[Receipt | PublishError]:
        """Answer all that are left, and give everything in order."""
        while self._waits:
            self._finish_next()
        return self._results

    def withdraw(self) -> None:
        """Take back all that are left, since nobody will look at their answers."""
        for each in self._waits:
            if isinstance(each, Wait):
                each.engine.withdraw(each.delivery)

    def _finish_next(self) -> None:
        each = self._waits.popleft()
        if isinstance(each, PublishError):
            self._results.append(each)
            return
        try:
            self._results.append(each.finish())
        except PublishError as error:
            self._results.append(error)

    def _deadline(self) -> float:
        """When the wait of the first in line ends."""
        head = self._waits[0]
        return head.delivery.deadline if isinstance(head, Wait) else -math.inf


def _undecided(each: Wait | PublishError) -> bool:
    return isinstance(each, Wait) and not each.answer.done()
