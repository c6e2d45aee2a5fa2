"""How many messages, and how many bytes, may be inside at once.

Publishers pass the gate before their message is handed over, and wait here while the in-flight
window is full: first come, first served, so that a large message is not starved by small ones.

A signal handler, or a finaliser that the collector runs, may publish in the middle of any of this,
on the thread that holds the lock. It is refused: its confirm would have to pass the I/O thread,
which would wait for that lock in turn.

Runs on: publishers enter, the I/O thread lets them leave.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from mlproducer import _clock as time
from mlproducer._core.delivery import Delivery
from mlproducer._synchronization import Latch, Watch
from mlproducer.errors import WouldDeadlockError

MAX_BYTES = 64 * 1024 * 1024
"""Bytes inside, so that a window of large messages does not fill the memory."""


class Turn(Protocol):
    """What a publisher waits on for its slot."""

    def open(self) -> bool | None:
        """Tell it that it is inside; from any thread, and never blocking.

        :returns: false where the slot is not wanted any more
        """


class Gate:
    """The deliveries inside, each in its own slot.

    :ivar emptied: changes when the last one leaves
    """

    def __init__(self, limit: int, max_bytes: int = MAX_BYTES) -> None:
        self.emptied = Watch()
        self._limit = limit
        self._max_bytes = max_bytes
        self._inside: dict[Delivery, int] = {}
        self._bytes = self._reserved = 0
        self._queue: deque[tuple[Delivery, Turn]] = deque()
        # guards: _inside, _bytes, _reserved, _queue; never held while waiting, logging or calling
        # back. An RLock, since it knows at every moment whether this thread holds it.
        self._lock = threading.RLock()
        # As Condition asks it; where a later Python has another name, Condition is asked.
        self._is_held_here: Callable[[], bool] = getattr(
            self._lock, "_is_owned", partial(_is_held_here, self._lock)
        )

    def __len__(self) -> int:
        return len(self._inside)

    def room(self) -> int:
        """How many more may come in, at most; without the lock, so others may be first."""
        return max(0, self._limit - len(self._inside))

    def share(self, *, backlog: bool) -> None:
        """Leave a quarter of the window to messages that wait for a retry, while there are some."""
        with self._lock:
            self._reserved = max(1, self._limit // 4) if backlog else 0
            turns = self._next_locked() if self._queue else ()
        self._open(turns)

    def welcomes(self) -> bool:
        """Whether it is worth while to look for messages that wait for a retry."""
        return 2 * self.room() >= (self._reserved if self._queue else self._limit)

    def spare(self) -> int:
        """How many stored messages may be fetched for when there is room; none if others wait."""
        return 0 if self._queue else self._limit // 2

    def inside(self) -> list[Delivery]:
        """Return the deliveries that are inside now; without the lock, for signal handlers."""
        return list(self._inside)  # one step under the GIL

    def holds(self, delivery: Delivery) -> bool:
        """Whether a delivery has a slot."""
        return delivery in self._inside

    def check(self) -> None:
        """Refuse a call that would wait for what only its own thread can release.

        :raises WouldDeadlockError: it comes from a signal handler, or from a finaliser
        """
        if self._is_held_here():
            raise WouldDeadlockError("called by a signal handler or finaliser amid another call")

    def enter(self, delivery: Delivery, deadline: float) -> bool:
        """Take a slot, waiting for one until ``deadline`` (monotonic); false if none came free.

        An interrupted publisher calls `leave`, which also takes it out of the queue.

        :raises WouldDeadlockError: this thread was interrupted in the middle of another such call
        """
        if self._is_held_here():
            self.check()
        with self._lock:
            if not self._queue and self._admit_locked(delivery, self._reserved):
                return True
            turn = Latch()
            self._queue.append((delivery, turn))
        return turn.wait(deadline - time.monotonic()) or not self.give_up(delivery)

    def ask(self, delivery: Delivery, turn: Turn) -> bool:
        """Take a slot, or stand in line for one until ``turn`` is opened; false for the latter.

        One that stands in line calls `give_up` when it does not want to wait any longer.

        :raises WouldDeadlockError: as for `enter`
        """
        self.check()
        with self._lock:
            if not self._queue and self._admit_locked(delivery, self._reserved):
                return True
            self._queue.append((delivery, turn))
        return False

    def try_enter(self, delivery: Delivery) -> bool:
        """Take a slot if one is free and no publisher waits, or one that is left to retries."""
        with self._lock:
            queued = self._queue and not self._reserved
            admitted = not queued and self._admit_locked(delivery, 0)
            if admitted and self._reserved == self._limit:
                self._reserved = 0  # a window of one: the next turn is a publisher's
            return admitted

    def leave(self, deliveries: Iterable[Delivery]) -> None:
        """Give slots back; for a delivery that holds none, nothing happens."""
        if self._is_held_here():
            return  # of a call that was refused for that, and so holds none
        with self._lock:
            for delivery in deliveries:
                size = self._inside.pop(delivery, None)
                if size is not None:
                    self._bytes -= size
                elif self._queue:
                    self._forget_locked(delivery)
            if not self._inside:
                self._bytes = 0  # an interrupt between slot and bytes leaves them apart
            turns = self._next_locked() if self._queue else ()
        if turns:
            self._open(turns)
        if not self._inside and self.emptied.watched:
            self.emptied.changed()

    def give_up(self, delivery: Delivery) -> bool:
        """Leave the queue, unless the slot came in the last moment; those behind may fit now."""
        with self._lock:
            if delivery in self._inside:
                return False
            self._forget_locked(delivery)
            turns = self._next_locked()
        self._open(turns)
        return True

    def _open(self, turns: Sequence[tuple[Delivery, Turn]]) -> None:
        """Tell publishers that they are inside; a slot that is declined goes to the next in line.

        That is a loop, since all in line may have gone.
        """
        while turns:
            declined = [delivery for delivery, turn in turns if turn.open() is False]
            if not declined:
                return
            with self._lock:
                for delivery in declined:
                    self._bytes -= self._inside.pop(delivery, 0)
                turns = self._next_locked()
            if not self._inside:
                self.emptied.changed()

    def _admit_locked(self, delivery: Delivery, reserved: int) -> bool:
        """Let it in where there is room; one that is too large for the bytes goes in alone."""
        size = delivery.size
        if len(self._inside) >= self._limit - reserved:
            return False
        if self._inside and self._bytes + size > self._max_bytes:
            return False
        self._inside[delivery] = size
        self._bytes += size
        return True

    def _next_locked(self) -> list[tuple[Delivery, Turn]]:
        turns = []
        while self._queue and self._admit_locked(self._queue[0][0], self._reserved):
            turns.append(self._queue.popleft())
        return turns

    def _forget_locked(self, delivery: Delivery) -> None:
        self._queue = deque(entry for entry in self._queue if entry[0] is not delivery)


def _is_held_here(lock: threading.RLock) -> bool:
    """Whether the current thread holds a lock: who does not must not notify others of it."""
    try:
        # guards: what the lock guards
        threading.Condition(lock).notify(0)
    except RuntimeError:
        return False
    return True
