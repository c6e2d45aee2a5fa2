"""What other threads hand to the I/O thread, and the bell that wakes it.

The bell rings once per burst: a thread that finds it rung need not ring. The I/O thread clears it
before it empties the box, so that nothing put in meanwhile is overlooked.

Runs on: any thread puts, the I/O thread drains.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterator

from mlproducer._core.delivery import Delivery

Order = Callable[[], None]
Item = Delivery | Order


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
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)
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
