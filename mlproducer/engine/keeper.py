"""Looks after messages in the store: writes them there, and sends out what is due.

The courier gives orders and does not wait; what became of them goes back to it by the mailbox. The
store is touched here and nowhere else, so that a slow one never holds up the link. Orders that have
come together are carried out together, so that they share one transaction and one fsync.

What cannot be written now is written at the next sweep, and before that nothing is claimed: so a
store that fails for a while delays, and makes neither losses nor duplicates.

Runs on: the retry thread; orders come from the I/O thread, `Keeper.write_ahead`
from publishers'.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from attrs import define, evolve, field

from mlproducer.core.backoff import Backoff
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.farewell import CLOSED
from mlproducer.engine.gate import Gate
from mlproducer.engine.roles import Desk
from mlproducer.engine.shelf import Shelf, record_of
from mlproducer.engine.threads import TimerThread
from mlproducer.errors import BufferFullError, ProducerClosedError, StoreError
from mlproducer.observe.events import EventSink
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Store

MIN_PATIENCE, MAX_PATIENCE = 0.05, 5.0
"""Seconds for which messages wait for a store that somebody else is writing to."""

SAFETY = 0.9
"""The part of a lease in which its holder relies on it."""


@define(eq=False)
class _Put:
    delivery: Delivery
    entry: Entry
    begun: bool = False

    def begin(self) -> bool:
        """Whether it is still wanted; what is stored ahead is claimed from its publisher here."""
        if self.entry.ahead and not self.begun:
            return self.delivery.claim()
        return self.delivery.stored or self.begun


@define(eq=False)
class _Note:
    delivery: Delivery
    record: Record = field(repr=False)
    delay: float | None


@define(eq=False)
class _End:
    delivery: Delivery
    counted: bool
    told: bool = False


class Keeper:
    """Keeps the messages of one producer.

    :param interval: seconds between sweeps
    :ivar asked: the store has been asked how much it holds, or could not be
    :ivar hurries: the last sweep left some that are due, and the next need not wait
    """

    def __init__(
        self, store: Store, gate: Gate, backoff: Backoff, interval: float, events: EventSink
    ) -> None:
        self.name = store.name
        self.durable = store.durable
        self.writes_ahead = store.write_ahead
        self.thread = TimerThread(self.sweep)
        self.shelf = Shelf(durable=store.durable)
        self.hurries = False
        self.asked = not store.durable
        self._store = store
        self._gate = gate
        self._backoff = backoff
        self._interval = interval
        self._events = events
        self._desk: Desk | None = None
        self._watch: Callable[[], None] | None = None
        self._orders: deque[_Put | _Note | _End] = deque()
        self._rung = False
        self._renew_at = math.inf
        self._ended = Counter[
            bool
        ]()  # rows by whether they are dead, to be deleted since the start
        self._deleted = Counter[bool]()
        self._counted = (Depth(), 0, 0)

    @property
    def depth(self) -> Depth:
        """Count the rows, whoever wrote them, but for those about to be deleted; anyone may ask."""
        depth, waiting, dead = self._counted
        return Depth(
            max(0, depth.waiting - (self._ended[False] - waiting)),
            max(0, depth.dead - (self._ended[True] - dead)),
        )

    def serve(self, desk: Desk, watch: Callable[[], None]) -> None:
        """Say whom to answer, and what to look after at each sweep."""
        self._desk = desk
        self._watch = watch
        self.thread.due = time.monotonic() + (0.0 if self.durable else self._interval)

    # --- orders --------------------------------------------------------------------------------

    def write_ahead(self, delivery: Delivery) -> None:
        """Store a message before it is sent, then hand it to the I/O thread."""
        self._order(_Put(delivery, Entry(Record(delivery.envelope), ahead=True)))

    def keep(self, delivery: Delivery, now: float, *, known: bool) -> None:
        """Store a message, or note in its row what came of the last attempt."""
        record, delay = record_of(delivery, now), self._delay(delivery)
        if known:
            self._order(_Note(delivery, record, delay))
        else:
            self._order(_Put(delivery, Entry(record, delay)))

    def settle(self, delivery: Delivery) -> None:
        """Delete the row of a message that has found its end."""
        self._ended[delivery.dead] += delivery.kept
        self._order(_End(delivery, counted=delivery.kept))

    def withdraw(self, delivery: Delivery) -> None:
        """Delete the row of a message, and say so."""
        self._order(_End(delivery, counted=False, told=True))

    def sweep_soon(self) -> None:
        """Send out what is due without waiting for the next sweep."""
        self.hurries = False
        self.thread.order(self.sweep)

    def stop(self) -> None:
        """End the thread once all orders are carried out, and let go of the store."""
        self.thread.order(self._close)
        self.thread.stop()

    def _order(self, order: _Put | _Note | _End) -> None:
        self._orders.append(order)
        if not self._rung:
            self._rung = True
            self.thread.order(self._carry_out)

    def _delay(self, delivery: Delivery) -> float | None:
        """Say when a message is due again; never while its tag is open and may be confirmed."""
        if delivery.place is Place.IN_FLIGHT:
            return None
        if delivery.dead:
            buried, delivery.buried = delivery.buried, True
            return self._backoff.maximum if buried else 0.0
        if delivery.attempts == 0:
            return 0.0
        return self._backoff.delay(delivery.attempts - 1)

    # --- the thread: sweeps --------------------------------------------------------------------

    def sweep(self) -> None:
        """Hand what is due back to the courier, as far as link and window have room."""
        now = time.monotonic()
        self.thread.due = min(now + self._interval, self._renew_at)
        if self._watch is not None:
            self._watch()
        try:
            self._carry_out()
            self._renew(now)
            self._count()
            self._send_out()
        except StoreError as error:
            self._failed(error)
        if not self.asked:
            self.asked = True
            self._gate.emptied.changed()

    def _send_out(self) -> None:
        desk = self._desk
        room = 0
        if desk is not None and self.depth.stored:
            room = min(desk.ready(), self._gate.room())
        if desk is None or room == 0:
            return
        now = time.monotonic()
        rows = self._store.claim(room)
        self.hurries = bool(rows)
        self._gate.share(backlog=self.hurries)
        taken, left = [], []
        for row in rows:
            delivery = self.shelf.take(row, now, self._lease_from(now))
            if delivery is None:
                self._store.done([row.claim])
            elif self._gate.try_enter(delivery):
                taken.append(delivery)
            else:
                left.append(Change(row.claim, row.record, 0.0))
                self.shelf.park(delivery, row.claim)
        if left:
            self.hurries = True
            self._store.release(left)
        if taken:
            desk.order(partial(desk.readmit, taken))

    def _renew(self, now: float) -> None:
        """Let the leases of what is on its way begin anew, and see which have been lost."""
        holders = {claim: delivery for delivery, claim in list(self.shelf.claims.items())}
        if not holders or now < self._renew_at:
            return
        self._renew_at = now + self._store.lease / 3
        lost = self._store.renew(list(holders))
        for delivery in holders.values():
            delivery.leased_until = self._lease_from(now)
        for claim in lost:
            self._lose(holders[claim])

    def _lease_from(self, now: float) -> float:
        self._renew_at = min(self._renew_at, now + self._store.lease / 3)
        return now + self._store.lease * SAFETY

    def _lose(self, delivery: Delivery) -> None:
        """Leave a message to whoever has taken it over; its own publisher may never hear of it."""
        delivery.leased_until = -math.inf
        claim = self.shelf.drop(delivery)
        if claim is not None and delivery.place is Place.STORED:
            self.shelf.park(delivery, claim)

    # --- the thread: orders --------------------------------------------------------------------

    def _carry_out(self) -> None:
        """Do all that was ordered so far; what the store does not take now stays ordered."""
        self._rung = False
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        if not orders:
            return
        puts = [order for order in orders if isinstance(order, _Put)]
        notes = [order for order in orders if isinstance(order, _Note)]
        ends = [order for order in orders if isinstance(order, _End)]
        if puts:
            self._put(puts, _patience(puts))
        waiting = notes or any(end.counted or end.told for end in ends)
        try:
            if notes:
                self._note(notes)
            notes = []
            if ends:
                self._end(ends)
            ends = []
            if waiting:
                self._count()
        except StoreError as error:
            self._orders.extendleft(reversed([*notes, *ends]))
            self._failed(error)

    def _put(self, puts: Sequence[_Put], patience: float) -> None:
        """Store messages, but for those whose publishers have given up waiting for it."""
        taken: list[_Put] = []
        entries = self._wanted(puts, taken)
        now = time.monotonic()
        try:
            claims = self._store.put(entries, patience)
        except BufferFullError as error:
            if len(taken) == 1:
                self._refuse(taken, error)
            else:
                for put in taken:  # for some of them there may be room
                    self._put([evolve(put, begun=True)], patience)
        except StoreError as error:
            taken += [put for put in puts if put not in taken and put.begin()]
            self._refuse(taken, error)
            self._failed(error)
        else:
            self._stored(taken, claims, now)

    def _wanted(self, puts: Sequence[_Put], taken: list[_Put]) -> Iterator[Entry]:
        for put in puts:
            if put.begin():
                taken.append(put)
                yield put.entry

    def _stored(self, puts: Sequence[_Put], claims: Sequence[Claim], now: float) -> None:
        leased_until = self._lease_from(now)
        for put, claim in zip(puts, claims, strict=True):
            put.delivery.stored = put.delivery.stored or put.entry.ahead
            if put.entry.delay is None:
                self.shelf.hold(put.delivery, claim, leased_until)
            else:
                self.shelf.park(put.delivery, claim)
        ahead = [put.delivery for put in puts if put.entry.ahead]
        kept = [put.delivery for put in puts if not put.entry.ahead]
        if kept:
            self._count()
            self._gate.leave([put.delivery for put in puts if put.entry.delay is not None])
            self._tell(lambda desk: desk.kept(kept))
        if ahead and not self._tell(lambda desk: desk.stored_ahead(ahead)):
            self._part(ahead, now)

    def _part(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Answer those whose message was stored when the producer had been closed already."""
        for delivery in deliveries:
            if delivery.retry:
                delivery.entrust(now)
            else:
                self.settle(delivery)
                message_id = delivery.envelope.message_id
                error = ProducerClosedError(CLOSED, message_id=message_id)
                self._events.given_back(delivery, error)
                delivery.give_back(error)

    def _refuse(self, puts: Sequence[_Put], error: BufferFullError | StoreError) -> None:
        refusals = [(put.delivery, _copy(error, put.delivery)) for put in puts]
        if refusals and not self._tell(lambda desk: desk.not_kept(refusals)):
            for delivery, refusal in refusals:
                if delivery.open:
                    self._events.given_back(delivery, refusal)
                    delivery.give_back(refusal)

    def _note(self, notes: Sequence[_Note]) -> None:
        held = [(note, self.shelf.claims.get(note.delivery)) for note in notes]
        known = [(note, claim) for note, claim in held if claim is not None]
        lost = set(
            self._store.release([Change(claim, note.record, note.delay) for note, claim in known])
        )
        for note, claim in known:
            if claim in lost:
                self._lose(note.delivery)
            elif note.delay is not None:
                self.shelf.park(note.delivery, claim)

    def _end(self, ends: Sequence[_End]) -> None:
        claims = [self.shelf.claim_of(end.delivery) for end in ends]
        self._store.done([claim for claim in claims if claim is not None])
        for end in ends:
            self.shelf.drop(end.delivery)
            self._deleted[end.delivery.dead] += end.counted
        told = [end.delivery for end in ends if end.told]
        if told:
            self._tell(lambda desk: desk.withdrawn(told))

    def _count(self) -> None:
        self._counted = (self._store.depth(), self._deleted[False], self._deleted[True])
        if not self.depth.stored:
            self._gate.emptied.changed()

    def _close(self) -> None:
        self._carry_out()
        try:
            self._store.close()
        except StoreError as error:
            self._failed(error)

    def _failed(self, error: StoreError) -> None:
        self._events.store_failed(error)

    def _tell(self, say: Callable[[Desk], None]) -> bool:
        """Have something said on the I/O thread; false if that has ended."""
        desk = self._desk
        return desk is not None and desk.order(partial(say, desk))


def _patience(puts: Sequence[_Put]) -> float:
    """How long the publishers of these will wait."""
    left = max(put.delivery.deadline for put in puts) - time.monotonic()
    return min(max(left, MIN_PATIENCE), MAX_PATIENCE)


def _copy(error: BufferFullError | StoreError, delivery: Delivery) -> BufferFullError | StoreError:
    message_id = delivery.envelope.message_id
    return type(error)(str(error), message_id=message_id, attempts=delivery.attempts)
