"""A loop that may fail, on a thread that may not.

pika's loop ends with whatever a callback raises, and would go on accepting callbacks that never
run. Here its end is told, what it had in hand goes back into the mailbox, and a new loop takes
over.

Runs on: the I/O thread, except `IOLoop.order` and `IOLoop.descriptors`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AttemptState
from mlproducer._engine.connection import EventLoop
from mlproducer._engine.mailbox import Item, Mailbox, Order
from mlproducer._engine.threads import IDLE
from mlproducer._guard import write

logger = logging.getLogger(__name__)

BREAK = 0.5
"""Seconds between tries to make a loop in a process that has no descriptor left."""


class IOLoopOwner(Protocol):
    """Who works on the loop."""

    def begin(self, loop: EventLoop) -> None:
        """Use this loop, the first one or the next."""

    def accept(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries from the mailbox."""

    def pump(self) -> None:
        """Write what a burst has brought."""

    def failed(self, error: BaseException) -> None:
        """Leave everything that belonged to a loop that failed."""

    def ended(self) -> None:
        """No loop runs any more, and no timer fires."""


class IOLoop:
    """The mailbox, and the loop that empties it."""

    def __init__(self, owner: IOLoopOwner) -> None:
        self._owner = owner
        self._loop = EventLoop()
        self._in_hand: list[Delivery] = []
        self._open = True
        self._left = False
        self._never = threading.Event()
        self._thread = 0
        self.mailbox = Mailbox()

    def order(self, order: Order) -> bool:
        """Have something done on the I/O thread; false if that has ended."""
        return self.mailbox.put(order)

    def check_owner(self) -> None:
        """See, in debug runs, that this is the I/O thread, or that there is none yet.

        Not on the way of a confirmed message, where it would be the dearest call.
        """
        if __debug__ and self._thread not in (0, threading.get_ident()):
            raise AssertionError("a delivery is touched by a thread that does not own it")

    def descriptors(self) -> list[int]:
        """Return every descriptor that is held here, for a forked child to close."""
        return [*self._loop.descriptors(), *self.mailbox.descriptors()] if self._open else []

    def call_later(self, delay: float, function: Callable[[], None]) -> bool:
        """Have something done after ``delay`` seconds, unless the loop ends; false if it has."""
        if self._open:
            self._loop.call_later(delay, function)
        return self._open

    def run(self) -> None:
        """Run until `stop`; survive whatever a callback raises."""
        self._thread = threading.get_ident()
        while self._open:
            self._loop.add_handler(self.mailbox.fileno(), self._on_bell, EventLoop.READ)
            self._owner.begin(self._loop)
            self.mailbox.ring()
            try:
                self._loop.start()
            except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread
                if not self._left:
                    self._owner.failed(error)
                    self._put_back()
            while self._left:
                self._never.wait(IDLE)
            self._clear_away()
            if self._open:
                self._loop = self._next_loop()
        self._handle(self.mailbox.close())
        self._owner.ended()

    def _next_loop(self) -> EventLoop:
        """Make another loop, once there are descriptors for one."""
        told = False
        while True:
            try:
                return EventLoop()
            except (OSError, AssertionError) as error:  # pika asserts that it has its descriptors
                if not told:
                    write(logger, logging.CRITICAL, "no descriptor for an I/O loop", error=error)
                told = True
            self._never.wait(BREAK)

    def stop(self) -> None:
        """End the loop and the thread."""
        self._open = False
        self._loop.stop()

    def leave(self) -> None:
        """Sleep for good, in a forked child: a greenlet, unlike a thread, goes on in it."""
        self._left = True
        self._open = False

    def discard(self) -> None:
        """Release what was never run."""
        self.mailbox.close()
        self._loop.close()

    def _on_bell(self, _fd: int, _events: int) -> None:
        if self._left:
            self._loop.stop()
            return
        self._handle(self.mailbox.drain())
        self._owner.pump()

    def _handle(self, items: Iterable[Item]) -> None:
        """Hand over deliveries together, as far as no order stands between them."""
        for item in items:
            if isinstance(item, Delivery):
                self._in_hand.append(item)
            else:
                self._hand_over()
                item()
        if self._in_hand:  # as `_hand_over`, without a call
            self._owner.accept(self._in_hand)
            self._in_hand.clear()

    def _hand_over(self) -> None:
        if self._in_hand:
            self._owner.accept(self._in_hand)
            self._in_hand.clear()

    def _put_back(self) -> None:
        in_hand, self._in_hand = self._in_hand, []
        here: object = self._owner
        for delivery in in_hand:
            handed_over = delivery.owner is not None and delivery.owner is not here
            if delivery.attempt is AttemptState.MAILBOX and not handed_over:
                self.mailbox.put(delivery)

    def _clear_away(self) -> None:
        """Close the loop, after a last turn in which pika sees and closes what is still open."""
        self._loop.sever(self.mailbox.fileno())
        self._loop.remove_handler(self.mailbox.fileno())
        self._loop.add_callback_threadsafe(self._loop.stop)
        try:
            self._loop.start()
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread
            text = "the I/O loop failed again while it was cleared away"
            write(logger, logging.ERROR, text, error=error)
        self._loop.close()
