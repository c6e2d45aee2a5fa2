"""The loop of an I/O thread, its timers, and the mailbox by which other threads reach it.

A loop ends with whatever a callback raises. Its end is told, what it had in hand goes back into the
mailbox, and a new loop takes over.

The mailbox's bell rings once per burst: a thread that finds it rung need not ring. The I/O thread
clears it before it empties the box, so that nothing put in meanwhile is overlooked.

pika's own loop takes more calls for a turn, and its timers read ``time.monotonic``, which libraries
for tests stop or move: no heartbeat would be sent then, and no connection be opened again.

Runs on: the I/O thread, except `Mailbox.put`, `IOLoop.order` and `IOLoop.descriptors`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._engine.threads import IDLE
from mlproducer._foreign_calls import guarded, write

logger = logging.getLogger(__name__)

BREAK = 0.5
"""Seconds until the next loop where one has failed before it had begun."""

INVALID = 32
"""As ``POLLNVAL``: a descriptor was closed without a word, by the program."""

LAST_TURNS = 1000
"""Turns in which connections may end; a hundred read what a socket's buffer may hold."""

MANY_CANCELLED = 1000
"""Cancelled timers that may be kept until they would have been due."""

Order = Callable[[], None]
Item = Delivery | Order


class Timer:
    """One call that is due; its ``callback`` is ``None`` once it was made or cancelled."""

    __slots__ = ("callback", "due", "number")

    def __init__(self, due: float, number: int, callback: Order) -> None:
        self.due = due
        self.number = number
        self.callback: Order | None = callback

    def __lt__(self, other: Timer) -> bool:
        return (self.due, self.number) < (other.due, other.number)


class EventLoop:
    """What pika asks of a loop, in a third of the calls that its own takes for each turn.

    It holds no descriptor, and no other thread wakes it but by the mailbox's. A hang-up that comes
    alone is told as what was asked for, since the read or write that follows meets it.
    """

    READ, WRITE, ERROR = 1, 4, 8  # as poll() has them, which is not there under eventlet

    def __init__(self) -> None:
        self._poll: Any = select.poll() if hasattr(select, "poll") else _Select()
        self._handlers: dict[int, tuple[Callable[[int, int], None], int]] = {}
        self._ready: dict[int, int] = {}
        self._callbacks: deque[Order] = deque()
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._cancelled = 0
        self._stopping = False

    def start(self) -> None:
        """Run until `stop`, or until a callback raises."""
        # One function, and one look at the clock for each turn: a message that waits alone costs
        # two turns.
        now = time.monotonic()
        try:
            while not self._stopping:
                wait = None
                if self._callbacks:
                    wait = 0.0
                elif self._timers:
                    wait = (self._timers[0].due - now) * 1000.0
                    wait = max(0.0, wait)  # less would be for ever
                ready = self._poll.poll(wait)
                if len(ready) == 1 and not ready[0][1] & INVALID:
                    [(fd, events)] = ready
                    handler, wanted = self._handlers[fd]
                    handler(fd, events & wanted or wanted)
                elif ready:
                    self._handle(ready)
                now = time.monotonic()
                if self._callbacks or (self._timers and self._timers[0].due <= now):
                    self.process_timeouts()
                    now = time.monotonic()
        finally:
            self._stopping = False

    def _handle(self, ready: Iterable[tuple[int, int]]) -> None:
        self._ready = dict(ready)
        for fd in list(self._ready):
            events = self._ready.get(fd, 0)  # another's handler may have removed it
            if events & INVALID:
                self.remove_handler(fd)  # else it would be ready for ever
            elif events:
                handler, wanted = self._handlers[fd]
                handler(fd, events & wanted or wanted)

    def stop(self) -> None:
        """End the loop after this turn; on its own thread."""
        self._stopping = True

    def close(self) -> None:
        """Forget all that is watched, and all that is due."""
        for descriptor in list(self._handlers):
            self.remove_handler(descriptor)
        self._callbacks.clear()
        self._timers.clear()

    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None:
        """Watch a descriptor."""
        self._handlers[fd] = handler, events
        self._poll.register(fd, events)

    def update_handler(self, fd: int, events: int) -> None:
        """Watch a descriptor for other events."""
        self._handlers[fd] = self._handlers[fd][0], events
        self._poll.modify(fd, events)

    def remove_handler(self, fd: int) -> None:
        """Watch it no longer; what it was ready for in this turn is dropped."""
        self._ready.pop(fd, None)
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def add_callback(self, callback: Order) -> None:
        """Have something called in the next turn; on the loop's thread."""
        self._callbacks.append(callback)

    def call_later(self, delay: float, callback: Order) -> Timer:
        """Have something called after so many seconds."""
        timer = Timer(time.monotonic() + max(0.0, delay), next(self._numbers), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def remove_timeout(self, timer: Timer) -> None:
        """Have it called no more; one that was called or cancelled is left as it is."""
        if timer.callback is None:
            return
        timer.callback = None
        self._cancelled += 1
        if self._cancelled > MANY_CANCELLED:
            self._timers = [each for each in self._timers if each.callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def process_timeouts(self) -> None:
        """Make the calls that are due now; what they add is for the next turn."""
        for _ in range(len(self._callbacks)):
            self._callbacks.popleft()()
        now, due = time.monotonic(), []
        while self._timers and self._timers[0].due <= now:
            due.append(heapq.heappop(self._timers))
        for timer in due:
            callback, timer.callback = timer.callback, None
            if callback is not None:  # a call before it may have cancelled it
                callback()

    def descriptors(self) -> Iterator[int]:
        """Return every descriptor that is watched, for a forked child to close."""
        return iter(list(self._handlers))

    @property
    def watches(self) -> bool:
        """Whether there is a descriptor that it watches."""
        return bool(self._handlers)

    def sever(self, spared: int) -> None:
        """Shut down every socket but one, so that pika sees their end at once."""
        shut_down(fd for fd in list(self._handlers) if fd != spared)


class _Select:
    """The part of a poll object that a loop uses, where there is only ``select()``."""

    def __init__(self) -> None:
        self._events: dict[int, int] = {}

    def register(self, fd: int, events: int) -> None:
        """Watch a descriptor."""
        self._events[fd] = events

    modify = register
    """Watch a descriptor for other events."""

    def unregister(self, fd: int) -> None:
        """Watch it no longer."""
        del self._events[fd]

    def poll(self, wait: float | None) -> list[tuple[int, int]]:
        """Return what is ready, after at most ``wait`` milliseconds."""
        kinds = (EventLoop.READ, EventLoop.WRITE, EventLoop.ERROR)
        read, write, broken = (
            [fd for fd, events in self._events.items() if events & kind] for kind in kinds
        )
        ready = select.select(read, write, broken, None if wait is None else wait / 1000)
        found: dict[int, int] = {}
        for kind, some in zip(kinds, ready, strict=True):
            for fd in some:
                found[fd] = found.get(fd, 0) | kind
        return list(found.items())


def shut_down(descriptors: Iterable[int]) -> None:
    """Shut down what is connected; pika fails over a socket that is shut down before it is."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            # Not a duplicate, for which there may be no descriptor left; so it is released again.
            twin = socket.socket(fileno=descriptor)
            try:
                twin.getpeername()
                twin.shutdown(socket.SHUT_RDWR)
            finally:
                twin.detach()


class Mailbox:
    """A queue of deliveries and of orders, with a descriptor that becomes readable."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._rung = False
        self._closed = False
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)

    def __len__(self) -> int:
        return len(self._items)

    def fileno(self) -> int:
        """Return the descriptor to watch."""
        return self._ear.fileno()

    def descriptors(self) -> list[int]:
        """Return all descriptors, for a forked child to close."""
        return [self._ear.fileno(), self._bell.fileno()]

    def put(self, item: Item) -> bool:
        """Hand something over; false if the box is not drained any more."""
        # Added before `_closed` is read; `close` sets that before it takes what is left. So an item
        # that comes at this moment is seen by one of the two, and `deque.remove` decides by which.
        self._items.append(item)
        if self._closed:
            return not self._take_back(item)
        if not self._rung:
            # As `ring` does, without a call. No call stands between the two steps, a context
            # manager's neither: an interrupt there would leave a box that is never rung again.
            self._rung = True
            try:
                self._bell.send(b"\0")
            except OSError:
                return True
        return True

    def ring(self) -> None:
        """Ring even if it was rung: a put may have been interrupted between its steps."""
        self._rung = True
        try:
            self._bell.send(b"\0")
        except OSError:
            return  # full of rings, so it will be heard; or closed

    def drain(self) -> Iterator[Item]:
        """Return what is in the box now; what comes meanwhile rings again."""
        try:  # noqa: SIM105 - suppress() is three calls for each burst
            self._ear.recv(4096)
        except BlockingIOError:
            pass
        # Cleared before the items are counted: one that is added after that finds it cleared, and
        # rings. The other way round it would lie here until the next one came.
        self._rung = False
        for _ in range(len(self._items)):
            yield self._items.popleft()

    def close(self) -> list[Item]:
        """Release the descriptors, take nothing more, and give what is left."""
        self._closed = True
        self._ear.close()
        self._bell.close()
        left = []
        while self._items:
            with contextlib.suppress(IndexError):
                left.append(self._items.popleft())
        return left

    def _take_back(self, item: Item) -> bool:
        """Take out what came too late; false if `close` has given it, which is decided here."""
        try:
            self._items.remove(item)
        except ValueError:
            return False
        return True


class IOLoop:
    """The mailbox, and the loop that empties it.

    :param accept: takes deliveries from the mailbox
    :param pump: writes what a burst has brought
    """

    def __init__(
        self, accept: Callable[[Sequence[Delivery]], None], pump: Callable[[], None]
    ) -> None:
        self._accept = accept
        self._pump = pump
        self._loop = EventLoop()
        self._in_hand: deque[Delivery] = deque()  # to which an append mostly allocates nothing
        self._open = True
        self._left = False
        self._never = threading.Event()
        self._thread = 0
        self._began = False
        self._error: BaseException | None = None
        self.mailbox = Mailbox()

    def order(self, order: Order) -> bool:
        """Have something done on the I/O thread; false if that has ended."""
        return self.mailbox.put(order)

    def check_owner(self) -> None:
        """See, in debug runs, that this is the I/O thread, or that there is none yet.

        Not on the way of a confirmed message, where it would cost more than any other call.
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

    def run(
        self,
        begin: Callable[[EventLoop], None],
        failed: Callable[[BaseException, list[Delivery]], None],
    ) -> None:
        """Run until `stop`; survive whatever is raised, and go on where another thread died.

        :param begin: uses a loop, the first one or the next
        :param failed: leaves everything of a loop that failed; gets what was being handed over
        """
        self._thread = threading.get_ident()
        while self._open:
            try:
                self._run_loop(begin, failed)
            except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread
                self._error = error
                if not self._began:  # nor must what fails again at once keep a CPU busy
                    self._never.wait(BREAK)
            while self._left:
                self._never.wait(IDLE)
        self._clear_away()
        self._handle(self.mailbox.close())

    def _run_loop(
        self,
        begin: Callable[[EventLoop], None],
        failed: Callable[[BaseException, list[Delivery]], None],
    ) -> None:
        """Run a loop; a new one where one has failed, maybe along with its thread."""
        began, self._began = self._began, False
        if began or self._error is not None:
            error, self._error = self._error, None
            failed(error or RuntimeError("the I/O thread died"), list(self._in_hand))
            self._in_hand.clear()
            self._clear_away()
            self._loop = EventLoop()
        self._loop.add_handler(self.mailbox.fileno(), self._on_bell, EventLoop.READ)
        begin(self._loop)
        self.mailbox.ring()
        self._began = True
        self._loop.start()

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
        self._pump()

    def _handle(self, items: Iterable[Item]) -> None:
        """Hand over deliveries together, as far as no order stands between them."""
        for item in items:
            if isinstance(item, Delivery):
                self._in_hand.append(item)
            else:
                self._hand_over()
                item()
        if self._in_hand:  # as `_hand_over`, without a call
            self._accept(self._in_hand)
            self._in_hand.clear()

    def _hand_over(self) -> None:
        if self._in_hand:
            self._accept(self._in_hand)
            self._in_hand.clear()

    def _clear_away(self) -> None:
        """Close the loop, after last turns in which pika sees and closes what is still open."""
        # pika learns of an end only by its own loop, and keeps the descriptor until it does. What
        # came in before that end is read first, a piece in each turn.
        try:
            self._loop.sever(self.mailbox.fileno())
            self._loop.remove_handler(self.mailbox.fileno())
            for _ in range(LAST_TURNS):
                self._loop.add_callback(self._loop.stop)
                self._loop.start()
                if not self._loop.watches:
                    break
        except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread
            text = "the I/O loop failed again while it was cleared away"
            write(logger, logging.ERROR, text, error=error)
        guarded(self._loop.close)
