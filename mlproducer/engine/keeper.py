"""Looks after messages that wait for a retry: writes them to the store, and sends out what is due.

The courier gives orders and does not wait; what became of them goes back to it by the mailbox. The
store is touched here and nowhere else, so that a slow one never holds up the link.

Runs on: the retry thread; `Keeper.keep`, `Keeper.settle` and `Keeper.sweep_soon` on the I/O thread.
"""

from __future__ import annotations

import functools
import logging
import queue
import time
from collections.abc import Callable

from mlproducer.core.backoff import Backoff
from mlproducer.core.delivery import Delivery, Place
from mlproducer.engine.gate import Gate
from mlproducer.engine.roles import Desk
from mlproducer.errors import BufferFullError, StoreError
from mlproducer.stores.protocol import Store

logger = logging.getLogger(__name__)

Command = Callable[[], None]


class Keeper:
    """Keeps the messages of one producer."""

    def __init__(self, store: Store, gate: Gate, backoff: Backoff, interval: float) -> None:
        self._store = store
        self._gate = gate
        self._backoff = backoff
        self._interval = interval
        self._desk: Desk | None = None
        self._watch: Command | None = None
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._held: dict[Delivery, None] = {}
        self._keys: dict[Delivery, int] = {}
        self._deliveries: dict[int, Delivery] = {}
        self._next_sweep = 0.0
        self._running = True

    def __len__(self) -> int:
        """Count the messages kept, also those on their way to the store; anyone may ask."""
        return len(self._held)

    def held(self) -> list[Delivery]:
        """Give the deliveries that are kept now; anyone may ask."""
        return list(self._held)

    def serve(self, desk: Desk, watch: Command) -> None:
        """Say whom to answer, and what to look after at each sweep."""
        self._desk = desk
        self._watch = watch

    # --- orders --------------------------------------------------------------------------------

    def keep(self, delivery: Delivery, now: float) -> None:
        """Store a message, or note in its row what came of the last attempt."""
        if delivery.place is Place.IN_FLIGHT:
            due = None  # its tag is open: it may still be confirmed, and must not be sent again
        elif delivery.attempts == 0:
            due = now
        else:
            due = now + self._backoff.delay(delivery.attempts - 1)
        new = delivery not in self._held
        self._held[delivery] = None
        write = self._put if new else self._note
        self._commands.put(functools.partial(write, delivery, delivery.attempts, due))

    def settle(self, delivery: Delivery) -> None:
        """Delete the row of a message that has found its end."""
        self._held.pop(delivery, None)
        self._commands.put(functools.partial(self._done, delivery))
        if not self._held:
            self._gate.emptied.changed()

    def sweep_soon(self) -> None:
        """Send out what is due without waiting for the next sweep."""
        self._commands.put(self.sweep)

    def stop(self) -> None:
        """End the thread once it has done what it was told so far."""
        self._commands.put(self._stop)

    # --- the thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Carry out orders, and sweep at each interval."""
        while self._running:
            timeout = max(0.0, self._next_sweep - time.monotonic())
            try:
                command = self._commands.get(timeout=timeout)
            except queue.Empty:
                command = self.sweep
            try:
                command()
            except Exception:
                logger.exception("retry thread: a step failed; going on")

    def sweep(self) -> None:
        """Hand what is due back to the courier, as far as the window has room."""
        now = time.monotonic()
        self._next_sweep = now + self._interval
        if self._watch is not None:
            self._watch()
        desk = self._desk
        if desk is None or not self._keys or not desk.ready():
            return
        for row in self._store.claim(now, limit=len(self._keys)):
            delivery = self._deliveries[row.key]
            if self._gate.try_enter(delivery):
                desk.order(functools.partial(desk.readmit, delivery))
            else:
                self._store.release(row.key, row.attempts, now)

    def _stop(self) -> None:
        self._running = False

    def _put(self, delivery: Delivery, attempts: int, due: float | None) -> None:
        desk = self._desk
        if desk is None:
            return
        try:
            key = self._store.put(delivery.envelope, attempts, due)
        except (BufferFullError, StoreError) as error:
            self._held.pop(delivery, None)
            self._gate.emptied.changed()
            desk.order(functools.partial(desk.not_kept, delivery, error))
            return
        self._keys[delivery] = key
        self._deliveries[key] = delivery
        desk.order(functools.partial(desk.kept, delivery, durable=self._store.durable))

    def _note(self, delivery: Delivery, attempts: int, due: float | None) -> None:
        key = self._keys.get(delivery)
        if key is not None:
            self._store.release(key, attempts, due)

    def _done(self, delivery: Delivery) -> None:
        key = self._keys.pop(delivery, None)
        if key is not None:
            del self._deliveries[key]
            self._store.done(key)
