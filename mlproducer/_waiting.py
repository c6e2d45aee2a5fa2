"""Where publishers wait for the sender's answer: one for one message, or in line for many.

The sender keeps the deadline, at the publisher's word. The publisher's own wait is a little
longer, and is the backstop for when the sender is silent.

Runs on: the users' threads; an `Answer` is given on the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mlproducer import _clock as time
from mlproducer._core.delivery import NO_WAITER, Delivery
from mlproducer._core.delivery_errors import failure
from mlproducer._core.delivery_states import AnswerState
from mlproducer._fate import Fate
from mlproducer._latch import Latch, Relay
from mlproducer.errors import ConfirmTimeoutError, PublishError
from mlproducer.message import Receipt

if TYPE_CHECKING:
    from mlproducer._engine.engine import Engine

T = TypeVar("T")

GRACE = 0.15
"""Seconds beyond a publisher's deadline within which the sender is expected to have spoken."""

MOMENT = 0.05
"""Seconds for an answer that the sender has begun to give."""


class Answer:
    """What one publisher waits for: a future as far as the sender is concerned, and interruptible.

    Whoever deletes the token, which only one can, decides: the sender that the message is sent, or
    the publisher that it is withdrawn.

    :param relay: lets publishers through to their answers
    :ivar given: the answer, once it is there
    """

    __slots__ = ("_latch", "_relay", "_token", "given")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._latch: Latch | None = None
        self._token = None
        self.given: Receipt | PublishError | None = None

    def set_running_or_notify_cancel(self) -> bool:
        """Take the message over; false if it was withdrawn, or taken over before."""
        try:
            del self._token
        except AttributeError:
            return False
        return True

    cancel = set_running_or_notify_cancel
    """Withdraw the message; false if it was taken over."""

    def set_result(self, given: Receipt | PublishError) -> None:
        """Answer that it is ours."""
        self.given = given
        if self._latch is not None:
            self._relay.open(self._latch)

    set_exception = set_result
    """Answer that it is the publisher's."""

    def wait(self, timeout: float) -> bool:
        """Wait for the answer; false if it did not come in ``timeout`` seconds."""
        if self.given is None:
            latch = self._latch = Latch()
            try:
                if self.given is None:  # else it came before the latch could be seen
                    latch.wait(timeout)
            finally:
                self._relay.pass_on()
        return self.given is not None

    def outcome(self) -> Receipt | PublishError:
        """Give the answer, which is there."""
        if self.given is None:
            raise LookupError("there is no answer yet")
        return self.given


def told(outcome: Receipt | PublishError) -> Receipt:
    """Give a receipt, or raise an error: the message is the publisher's again."""
    if isinstance(outcome, PublishError):
        raise outcome
    return outcome


def finish(engine: Engine, delivery: Delivery, answer: Answer) -> Receipt:
    """Wait until the sender has spoken; at the deadline ask it to.

    :param engine: whoever carries the delivery
    :raises PublishError: the message is the publisher's again
    """
    if answer.given is None and not answer.wait(delivery.deadline - time.monotonic()):
        engine.expire(delivery)
        if not answer.wait(GRACE):
            return told(unanswered(engine, delivery, answer))
    return told(answer.outcome()) if not isinstance(answer.given, Receipt) else answer.given


def unanswered(engine: Engine, delivery: Delivery, answer: Answer) -> Receipt | PublishError:
    """End the wait although the sender is silent: its thread hangs, or has just died.

    :returns: what the publisher is told
    """
    outcome, certain = stop_waiting(engine, delivery)
    return outcome if certain or not answer.wait(MOMENT) else answer.outcome()


def stop_waiting(engine: Engine, delivery: Delivery) -> tuple[Receipt | PublishError, bool]:
    """Wait no longer for a sender that has said nothing.

    What has not been written is withdrawn. What has may be confirmed, or sent again, for all that
    is known here: the library goes on with it, or, if it is not to be retried, leaves it.

    :returns: what the publisher is told, and whether that is certain. It is not where the sender
        has begun to speak: then it is an error that holds if nothing comes in a `MOMENT`, since
        the sender gives the message back, and is held up while it notes that
    """
    text = "the I/O thread does not answer"
    if engine.take_back(delivery, error := failure(ConfirmTimeoutError, delivery, text)):
        error.possibly_sent = False
        return error, True
    error.possibly_sent = True
    if delivery.retry:
        successor = Fate()
        if delivery.leave(successor):
            elapsed = time.monotonic() - delivery.started
            message_id = delivery.envelope.message_id
            return Receipt(message_id, delivery.attempts, elapsed, False, error, successor), True
    else:
        delivery.recall()
        if delivery.leave(NO_WAITER):
            return error, True
    return error, False


class Line:
    """Waits in the order in which their messages were handed in, and what has come of them."""

    def __init__(self) -> None:
        self._waits: deque[tuple[int, Engine, Delivery, Answer]] = deque()
        self._results: list[Receipt | PublishError] = []
        self._at_gate: Delivery | None = None
        self._asked = 0  # of those that wait, from the head, the sender has been asked
        self._asked_at = 0.0
        self._silent = False  # it has not answered

    def taken_from(self, tasks: Iterable[T]) -> Iterator[T]:
        """Take tasks one by one; where that raises, ``results`` is what came of those before."""
        try:
            yield from tasks
        except Exception as error:
            vars(error)["results"] = self.finish()
            raise

    def skip(self, error: PublishError) -> None:
        """Note that a task could not be handed in."""
        self._results.append(error)

    def enter(self, engine: Engine, delivery: Delivery, answer: Answer) -> None:
        """Pass the gate, and answer meanwhile those ahead whose time is up."""
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
                raise  # it is not about this message: a signal handler has raised it
            answer.set_exception(error)

    def finish(self) -> list[Receipt | PublishError]:
        """Answer all that are left, and give everything in order."""
        while self._waits:
            self._finish_next()
        return self._results

    def withdraw(self) -> None:
        """Take back all that are left, since nobody will look at their answers."""
        for _, engine, delivery, _ in self._waits:
            engine.withdraw(delivery)

    def _finish_next(self) -> None:
        place, engine, delivery, answer = self._waits[0]
        self._results[place] = self._answer_of(engine, delivery, answer)
        self._waits.popleft()  # not before: an interrupt has to find it, to withdraw it
        if self._asked:
            self._asked -= 1

    def _answer_of(
        self, engine: Engine, delivery: Delivery, answer: Answer
    ) -> Receipt | PublishError:
        """Do what `finish` does, but so that a silent sender costs the line one `GRACE`."""
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
        """Ask the sender about all whose time is up, and not about one after the other."""
        self._asked_at = now = time.monotonic()
        for _, engine, delivery, answer in self._waits:
            if delivery.deadline > now or delivery is self._at_gate:
                return
            self._asked += 1
            if answer.given is None:
                engine.expire(delivery)


_UNANSWERED = PublishError("not answered yet")
