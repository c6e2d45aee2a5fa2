"""Waiting for the sender's answer on an event loop, without blocking it.

Other threads free a slot of the in-flight window, and set the answer; they wake the event loop by
``call_soon_threadsafe``.

Runs on: an event loop's thread; `Notifier.open` and an `AwaitedAnswer` are called on others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlproducer import _clock as time
from mlproducer._answers import GRACE, MOMENT, Answer, returned, stop_waiting
from mlproducer._core.delivery import Delivery
from mlproducer._synchronization import Relay
from mlproducer.errors import PublishError
from mlproducer.message import Receipt

if TYPE_CHECKING:
    from mlproducer._engine.engine import Engine


class Notifier:
    """Wakes a coroutine on an event loop, once, from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._notified: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_over(self) -> bool:
        """Whether the loop has been closed, and wakes nothing any more."""
        return self._loop.is_closed()

    def open(self) -> None:
        """Wake the coroutine; nothing happens if the loop has been closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._notify)

    async def wait(self, timeout: float) -> bool:
        """Wait to be woken; return false after ``timeout`` seconds."""
        await asyncio.wait((self._notified,), timeout=max(0.0, timeout))
        return self._notified.done()

    def _notify(self) -> None:
        if not self._notified.done():
            self._notified.set_result(None)


class AwaitedAnswer(Answer):
    """The answer to one `apublish`."""

    __slots__ = ("_notifier",)

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay)
        self._notifier = Notifier()

    def set_result(self, given: Receipt | PublishError) -> None:
        """Set the answer: the library owns the message."""
        super().set_result(given)
        self._notifier.open()

    set_exception = set_result
    """Set the answer: the publisher owns the message."""

    async def comes(self, timeout: float) -> bool:
        """Wait for the answer; return false after ``timeout`` seconds."""
        return (
            self.given is not None or await self._notifier.wait(timeout) or self.given is not None
        )


async def in_thread(function: Callable[[], object]) -> None:
    """Call a function that may block on a thread of the event loop's executor."""
    await asyncio.to_thread(function)


class AwaitedTurn:
    """A place in line at the gate, whose message is handed over as soon as its turn comes.

    By then the event loop may be stopped or closed, and a slot that waited for it would be lost to
    all others. The thread that opens the gate and the coroutine, at its deadline, compete for the
    token; the one that takes it hands the message over.

    :ivar handed_over: by the thread that opened the gate
    :ivar declined: the deadline has passed or the loop was closed, and the slot is free again
    """

    def __init__(self, engine: Engine, delivery: Delivery) -> None:
        self.handed_over = self.declined = False
        self._engine = engine
        self._delivery = delivery
        self._notifier = Notifier()
        self._token = [None]

    def open(self) -> bool:
        """Hand the message over; return false if nothing waits for it any more."""
        if not self.take():
            return True
        if self._notifier.is_over or time.monotonic() >= self._delivery.deadline:
            self.declined = True
        else:
            self.handed_over = self._engine.try_post(self._delivery)
        self._notifier.open()
        return not self.declined

    def take(self) -> bool:
        """Take the token; return false if it was taken."""
        try:
            self._token.pop()
        except IndexError:
            return False
        return True

    async def comes(self, timeout: float) -> bool:
        """Wait for the turn; return false after ``timeout`` seconds."""
        return await self._notifier.wait(timeout)


async def hand_over(engine: Engine, delivery: Delivery) -> None:
    """Enter the gate and hand the message over; turn it away if there is no room by the deadline.

    :raises ProducerClosedError: the producer was closed meanwhile
    """
    turn = AwaitedTurn(engine, delivery)
    if engine.gate.ask(delivery, turn):
        engine.post(delivery)
        return
    await turn.comes(delivery.deadline - time.monotonic())
    if turn.take():
        turn.declined = engine.gate.give_up(delivery)
    else:
        await turn.comes(GRACE)  # the other thread is about to hand it over
    if turn.declined:
        engine.turn_away(delivery)
    elif not turn.handed_over:
        engine.post(delivery)


async def finish(engine: Engine, delivery: Delivery, answer: AwaitedAnswer) -> Receipt:
    """Wait for the sender's answer; at the deadline ask for it, even if this is cancelled.

    :raises PublishError: the publisher owns the message
    """
    try:
        came = await answer.comes(delivery.deadline - time.monotonic())
    except asyncio.CancelledError:
        engine.expire_in_time(delivery)
        raise
    if not came:
        engine.expire(delivery)
        if not await answer.comes(GRACE):
            outcome, certain = stop_waiting(engine, delivery)
            if certain or not await answer.comes(MOMENT):
                return returned(outcome)
    return returned(answer.outcome())
