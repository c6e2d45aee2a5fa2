"""Publishing for ``await``: the same answers, without a thread that waits for them.

A slot of the in-flight window, and the answer, are told from other threads; they wake the event
loop by ``call_soon_threadsafe``, and nothing here blocks it.

Runs on: an event loop's thread; `Bell.open` and an `AwaitedAnswer` are called on others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._latch import Relay
from mlproducer._waiting import GRACE, MOMENT, Answer, stop_waiting, told
from mlproducer.errors import PublishError
from mlproducer.message import Receipt

if TYPE_CHECKING:
    from mlproducer._engine.engine import Engine


class Bell:
    """Wakes what awaits it on an event loop; rung once, from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: asyncio.Future[None] = self._loop.create_future()

    def open(self) -> None:
        """Ring it; nothing happens where the loop has been closed meanwhile."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ring)

    async def wait(self, timeout: float) -> bool:
        """Wait until it is rung; false if it was not within ``timeout`` seconds."""
        await asyncio.wait((self._rung,), timeout=max(0.0, timeout))
        return self._rung.done()

    def _ring(self) -> None:
        if not self._rung.done():
            self._rung.set_result(None)


class AwaitedAnswer(Answer):
    """What one ``await`` waits for."""

    __slots__ = ("_bell",)

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay)
        self._bell = Bell()

    def set_result(self, given: Receipt | PublishError) -> None:
        """Answer that it is ours."""
        super().set_result(given)
        self._bell.open()

    set_exception = set_result
    """Answer that it is the publisher's."""

    async def comes(self, timeout: float) -> bool:
        """Wait for the answer; false if it did not come in ``timeout`` seconds."""
        return self.given is not None or await self._bell.wait(timeout) or self.given is not None


async def in_thread(function: Callable[[], object]) -> None:
    """Call a function that may block on a thread of the event loop's executor."""
    await asyncio.to_thread(function)


async def enter(engine: Engine, delivery: Delivery) -> bool:
    """Pass the gate, as `Gate.enter` does; false if there was no room by the deadline."""
    bell = Bell()
    if engine.gate.ask(delivery, bell):
        return True
    return await bell.wait(delivery.deadline - time.monotonic()) or not engine.gate.give_up(
        delivery
    )


async def finish(engine: Engine, delivery: Delivery, answer: AwaitedAnswer) -> Receipt:
    """Wait until the sender has spoken; at the deadline ask it to, also where this is cancelled.

    :raises PublishError: the message is the publisher's again
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
                return told(outcome)
    return told(answer.outcome())
