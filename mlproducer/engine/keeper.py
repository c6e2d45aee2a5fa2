"""Looks after messages that wait for a retry: writes them to the store, and sends out what is due.

The courier gives orders and does not wait; what became of them goes back to it by the mailbox. The
store is touched here and nowhere else, so that a slow one never holds up the link.

Runs on: the retry thread; `Keeper.keep`, `Keeper.settle` and `Keeper.sweep_soon` on the I/O thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from mlproducer.core.backoff import Backoff
from mlproducer.core.delivery import Delivery, Place
from mlproducer.engine.gate import Gate
from mlproducer.engine.roles import Desk
from mlproducer.engine.threads import TimerThread
from mlproducer.errors import BufferFullError, StoreError
from mlproducer.stores.protocol import Store


class Keeper:
    """Keeps the messages of one producer.

    :param interval: seconds between sweeps
    :ivar hurries: the last sweep left some that are due, and the next need not wait
    """

    def __init__(self, store: Store, gate: Gate, backoff: Backoff, interval: float) -> None:
        self.durable = store.durable
        self.thread = TimerThread(self.sweep)
        self._store = store
        self._gate = gate
        self._backoff = backoff
        self._interval = interval
        self.hurries = False
        self._desk: Desk | None = None
        self._watch: Callable[[], None] | None = None
        self._held: dict[Delivery, None] = {}
        self._dead: dict[Delivery, None] = {}
        self._keys: dict[Delivery, int] = {}
        self._deliveries: dict[int, Delivery] = {}

    def __len__(self) -> int:
        """Count the messages kept, also those on their way to the store; anyone may ask."""
        return len(self._held)

    @property
    def dead(self) -> int:
        """Count the dead letters that the broker has not taken yet; anyone may ask."""
        return len(self._dead)

    def held(self) -> list[Delivery]:
        """Give the deliveries that are kept now; anyone may ask."""
        return list(self._held)

    def serve(self, desk: Desk, watch: Callable[[], None]) -> None:
        """Say whom to answer, and what to look after at each sweep."""
        self._desk = desk
        self._watch = watch
        self.thread.due = time.monotonic() + self._interval

    # --- orders --------------------------------------------------------------------------------

    def keep(self, delivery: Delivery, now: float) -> None:
        """Store a message, or note in its row what came of the last attempt."""
        due = self._due(delivery, now)
        if delivery not in self._held:
            self._held[delivery] = None
            self.thread.order(partial(self._put, delivery, delivery.attempts, due))
        else:
            self.thread.order(partial(self._note, delivery, delivery.attempts, due))
        if delivery.dead and delivery not in self._dead:
            self._dead[delivery] = None
            self.thread.order(partial(self._bury, delivery, due))

    def settle(self, delivery: Delivery) -> None:
        """Delete the row of a message that has found its end."""
        self.forget(delivery)
        self.thread.order(partial(self._done, delivery))

    def forget(self, delivery: Delivery) -> None:
        """Hold a message no longer, which the store has refused or is going to delete."""
        self._held.pop(delivery, None)
        self._dead.pop(delivery, None)
        if not self._held:
            self._gate.emptied.changed()

    def sweep_soon(self) -> None:
        """Send out what is due without waiting for the next sweep."""
        self.hurries = False
        self.thread.order(self.sweep)

    def _due(self, delivery: Delivery, now: float) -> float | None:
        if delivery.place is Place.IN_FLIGHT:
            return None  # its tag is open: it may still be confirmed, and must not be sent again
        if delivery.dead:
            return now + (self._backoff.maximum if delivery in self._dead else 0.0)
        if delivery.attempts == 0:
            return now
        return now + self._backoff.delay(delivery.attempts - 1)

    # --- the thread ----------------------------------------------------------------------------

    def sweep(self) -> None:
        """Hand what is due back to the courier, as far as link and window have room."""
        now = time.monotonic()
        self.thread.due = now + self._interval
        if self._watch is not None:
            self._watch()
        desk = self._desk
        room = desk.ready() if desk is not None and self._keys else 0
        if desk is None or room == 0:
            return
        rows = self._store.claim(now, room)
        self.hurries = len(rows) == room
        for row in rows:
            delivery = self._deliveries[row.key]
            if self._gate.try_enter(delivery):
                desk.order(partial(desk.readmit, delivery))
            else:
                self.hurries = True
                self._store.release(row.key, row.attempts, now)

    def _put(self, delivery: Delivery, attempts: int, due: float | None) -> None:
        desk = self._desk
        if desk is None:
            return
        try:
            key = self._store.put(delivery.envelope, attempts, due)
        except (BufferFullError, StoreError) as error:
            desk.order(partial(desk.not_kept, delivery, error))
            return
        self._keys[delivery] = key
        self._deliveries[key] = delivery
        desk.order(partial(desk.kept, delivery, durable=self._store.durable))

    def _note(self, delivery: Delivery, attempts: int, due: float | None) -> None:
        key = self._keys.get(delivery)
        if key is not None:
            self._store.release(key, attempts, due)

    def _bury(self, delivery: Delivery, due: float | None) -> None:
        key = self._keys.get(delivery)
        if key is not None:
            self._store.bury(key, delivery.envelope, due)

    def _done(self, delivery: Delivery) -> None:
        key = self._keys.pop(delivery, None)
        if key is not None:
            del self._deliveries[key]
            self._store.done(key)
