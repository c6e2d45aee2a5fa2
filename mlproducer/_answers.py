"""Waiting of publishers for the sender's answer: for one message, or for many in order.

At the deadline the publisher asks the sender to decide. The publisher's own wait is a little
longer, for the case that the sender does not answer.

Runs on: the users' threads; an `Answer` is set on the I/O thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mlproducer import _clock as time
from mlproducer._core.delivery import NO_WAITER, Delivery
from mlproducer._core.delivery_errors import failure
from mlproducer._core.delivery_states import AnswerState
from mlproducer._synchronization import Latch, Relay
from mlproducer.errors import ConfirmTimeoutError, ConnectionLostError, PublishError
from mlproducer.message import Fate, Receipt

if TYPE_CHECKING:
    from mlproducer._engine.engine import Engine

T = TypeVar("T")

GRACE = 0.15
"""Seconds after a publisher's deadline within which the sender is expected to answer."""

MOMENT = 0.05
"""Seconds to wait for an answer that the sender is about to set."""


class Answer:
    """The answer to one publisher: the part of a future that the sender uses, but interruptible.

    Deleting the attribute ``_token`` is one step under the GIL, and succeeds once: for the sender,
    which takes the message, or for the publisher, which withdraws it.

    :param relay: wakes publishers, one after another
    :ivar given: the answer, once it is set
    """

    __slots__ = ("_latch", "_relay", "_token", "given")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._latch: Latch | None = None
        self._token = None
        self.given: Receipt | PublishError | None = None

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message; return false if it was withdrawn or taken before."""
        try:
            del self._token
        except AttributeError:
            return False
        return True

    cancel = set_running_or_notify_cancel
    """Withdraw the message; return false if it was taken."""

    def set_result(self, given: Receipt | PublishError) -> None:
        """Set the answer: the library owns the message."""
        self.given = given
        if self._latch is not None:
            self._relay.open(self._latch)

    set_exception = set_result
    """Set the answer: the publisher owns the message."""

    def wait(self, timeout: float) -> bool:
        """Wait for the answer; return false after ``timeout`` seconds."""
        if self.given is None:
            latch = self._latch = Latch()
            try:
                if self.given is None:  # checked after _latch was set: a later answer opens it
                    latch.wait(timeout)
            finally:
                self._relay.pass_on()
        return self.given is not None

    def outcome(self) -> Receipt | PublishError:
        """Return the answer, which must be set."""
        if self.given is None:
            raise LookupError("there is no answer yet")
        return self.given


def returned(outcome: Receipt | PublishError) -> Receipt:
    """Return a receipt, or raise an error."""
    if isinstance(outcome, PublishError):
        raise outcome
    return outcome


def finish(engine: Engine, delivery: Delivery, answer: Answer) -> Receipt:
    """Wait for the sender's answer; at the deadline ask for it.

    :param engine: the engine that has the delivery
    :raises PublishError: the publisher owns the message
    """
    if answer.given is None and not answer.wait(delivery.deadline - time.monotonic()):
        engine.expire(delivery)
        if not answer.wait(GRACE):
            return returned(unanswered(engine, delivery, answer))
    return returned(answer.outcome()) if not isinstance(answer.given, Receipt) else answer.given


def unanswered(engine: Engine, delivery: Delivery, answer: Answer) -> Receipt | PublishError:
    """End the wait without the sender's answer: its thread hangs, or has just died.

    :returns: the answer for the publisher
    """
    outcome, certain = stop_waiting(engine, delivery)
    return outcome if certain or not answer.wait(MOMENT) else answer.outcome()


def stop_waiting(engine: Engine, delivery: Delivery) -> tuple[Receipt | PublishError, bool]:
    """Stop waiting for a sender that does not answer.

    A message that was not written is withdrawn. One that was may still be confirmed: the library
    keeps it, or, if it is not to be retried, abandons it.

    :returns: the answer for the publisher, and whether it is final. It is not if the sender is
        about to set another: then the error applies if none comes within `MOMENT`, since the sender
        returns the message, and is blocked while it notes that
    """
    text = "the I/O thread does not answer"
    if engine.take_back(delivery, error := failure(ConfirmTimeoutError, delivery, text)):
        error.possibly_sent = False
        return error, True
    error.possibly_sent = True
    if delivery.retry:
        successor = Fate()
        if delivery.stop_waiting(successor):
            elapsed = time.monotonic() - delivery.started
            message_id = delivery.envelope.message_id
            return Receipt(message_id, delivery.attempts, elapsed, False, error, successor), True
    else:
        delivery.recall()
        if delivery.stop_waiting(NO_WAITER):
            return error, True
    return error, False


class PendingAnswers:
    """The waits of `publish_many`, in the order of its tasks, and their results."""

    def __init__(self) -> None:
        self._waits: deque[tuple[int, Engine, Delivery, Answer]] = deque()
        self._results: list[Receipt | PublishError] = []
        self._at_gate: Delivery | None = None
        self._asked = 0  # how many, from the head, the sender was asked about
        self._asked_at = 0.0
        self._silent = False  # it has not answered
        self._pid = os.getpid()

    def taken_from(self, tasks: Iterable[T]) -> Iterator[T]:
        """Yield tasks; if that raises, the exception gets the results so far as ``results``."""
        try:
            yield from tasks
        except Exception as error:
            vars(error)["results"] = self.finish()
            raise

    def skip(self, error: PublishError) -> None:
        """Add the error of a task that was refused."""
        self._results.append(error)

    def enter(self, engine: Engine, delivery: Delivery, answer: Answer) -> None:
        """Enter the gate, and meanwhile finish earlier waits whose deadline has passed."""
        waits, results = self._waits, self._results
        while waits:
            place, _, _, ahead = waits[0]
            if ahead.given is None:
                break
            results[place] = ahead.given
            waits.popleft()
            if self._asked:
                self._asked -= 1
        waits.append((len(results), engine, delivery, answer))
        results.append(_UNANSWERED)
        hand_in, self._at_gate = engine.post, delivery
        while not engine.gate.enter(delivery, (head := waits[0][2]).deadline):
            if head is delivery:
                hand_in = engine.turn_away
                break
            self._finish_next()
        self._at_gate = None
        try:
            hand_in(delivery)
        except PublishError as error:
            if delivery.answer is not AnswerState.WITHDRAWN:
                raise  # the error is not this message's: a signal handler raised it
            answer.set_exception(error)

    def leave_to_parent(self) -> None:
        """End the waits that this process, a child, has from before the fork; else do nothing.

        The parent goes on with these messages. Nothing of its connection is touched here: its locks
        may have been held at the fork, by threads that a child does not have.
        """
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        text = "the process was forked meanwhile; its parent has the message"
        for place, _, delivery, answer in self._waits:
            error = failure(ConnectionLostError, delivery, text)
            error.possibly_sent = True
            self._results[place] = answer.given or error
        self._waits.clear()
        self._asked, self._silent = 0, False

    def finish(self) -> list[Receipt | PublishError]:
        """Finish all waits, and return the results in order."""
        self.leave_to_parent()
        while self._waits:
            self._finish_next()
        return self._results

    def withdraw(self) -> None:
        """Withdraw all messages that are left, since their results will not be returned."""
        self.leave_to_parent()
        for _, engine, delivery, _ in self._waits:
            engine.withdraw(delivery)

    def _finish_next(self) -> None:
        place, engine, delivery, answer = self._waits[0]
        self._results[place] = self._answer_of(engine, delivery, answer)
        self._waits.popleft()  # after that: an interrupt withdraws what is in the queue
        if self._asked:
            self._asked -= 1

    def _answer_of(
        self, engine: Engine, delivery: Delivery, answer: Answer
    ) -> Receipt | PublishError:
        """Wait as `finish` does, but a sender that does not answer costs one `GRACE` in all."""
        if answer.given is None and not answer.wait(delivery.deadline - time.monotonic()):
            if not self._asked:
                self._expire_due()
            ends = delivery.deadline if self._silent else self._asked_at
            if not answer.wait(ends + GRACE - time.monotonic()):
                self._silent = True
                return unanswered(engine, delivery, answer)
        self._silent = False
        return answer.outcome()

    def _expire_due(self) -> None:
        """Ask the sender at once about all messages whose deadline has passed."""
        self._asked_at = now = time.monotonic()
        for _, engine, delivery, answer in self._waits:
            if delivery.deadline > now or delivery is self._at_gate:
                return
            self._asked += 1
            if answer.given is None:
                engine.expire(delivery)


_UNANSWERED = PublishError("not answered yet")
