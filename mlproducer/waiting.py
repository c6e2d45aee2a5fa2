"""Where publishers wait for the courier's answer: one for one message, or in line for many.

The courier keeps the deadline, at the publisher's word. The publisher's own wait is a little
longer, and is the backstop for when the courier is silent.

Runs on: the users' threads.
"""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from mlproducer.core.delivery import Delivery
from mlproducer.engine.engine import Engine
from mlproducer.errors import ConfirmTimeoutError, PublishError
from mlproducer.message import Receipt

GRACE = 0.15
"""Seconds beyond a publisher's deadline within which the courier is expected to have spoken."""


def answer(engine: Engine, delivery: Delivery) -> Receipt:
    """Wait until the courier has spoken; at the deadline ask it to.

    :raises PublishError: the message is the publisher's again
    """
    future = delivery.answer
    try:
        error = future.exception(max(0.0, delivery.deadline - time.monotonic()))
    except FutureTimeoutError:
        engine.expire(delivery)
        try:
            error = future.exception(GRACE)
        except FutureTimeoutError:
            return _unanswered(engine, delivery, future)
    if error is not None:
        raise error
    return future.result(0)


def _unanswered(engine: Engine, delivery: Delivery, future: Future[Receipt]) -> Receipt:
    """End the wait although the courier is silent: its thread hangs, or has just died."""
    withdrawn = future.cancel()
    error = ConfirmTimeoutError(
        "the I/O thread does not answer",
        message_id=delivery.envelope.message_id,
        attempts=delivery.attempts,
        possibly_sent=not withdrawn,
    )
    if withdrawn or not delivery.retry:
        engine.withdraw(delivery)
        raise error
    elapsed = time.monotonic() - delivery.started
    message_id = delivery.envelope.message_id
    return Receipt(message_id, delivery.attempts, elapsed, False, error, future)


class Line:
    """Deliveries, and what was refused among them, in the order in which they were handed in."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Delivery | PublishError] = deque()
        self._results: list[Receipt | PublishError] = []

    def skip(self, error: PublishError) -> None:
        """Keep the place of a task that could not be handed in."""
        self._waiting.append(error)

    def enter(self, delivery: Delivery) -> None:
        """Pass the gate, and answer meanwhile those ahead whose time is up."""
        while self._waiting and not _undecided(self._waiting[0]):
            self._answer_next()
        while not self._engine.gate.enter(delivery, min(delivery.deadline, self._deadline())):
            if self._deadline() >= delivery.deadline:
                self._engine.turn_away(delivery)
                break
            self._answer_next()
        else:
            self._engine.post(delivery)
        self._waiting.append(delivery)

    def finish(self) -> list[Receipt | PublishError]:
        """Answer all that are left, and give everything in order."""
        while self._waiting:
            self._answer_next()
        return self._results

    def withdraw(self) -> None:
        """Take back all that are left, since nobody will look at their answers."""
        for each in self._waiting:
            if isinstance(each, Delivery):
                self._engine.withdraw(each)

    def _answer_next(self) -> None:
        each = self._waiting.popleft()
        if isinstance(each, PublishError):
            self._results.append(each)
            return
        try:
            self._results.append(answer(self._engine, each))
        except PublishError as error:
            self._results.append(error)

    def _deadline(self) -> float:
        """When the wait of the first in line ends."""
        head = self._waiting[0] if self._waiting else None
        return head.deadline if isinstance(head, Delivery) else math.inf


def _undecided(each: Delivery | PublishError) -> bool:
    return isinstance(each, Delivery) and not each.answer.done()
