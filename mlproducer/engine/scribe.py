"""Writes to the store what the keeper is ordered to, together what has come together.

Orders that come in a burst share one transaction, and so one fsync. A store that is full for one
kind of orders may be fit for another. What cannot be noted or deleted now stays ordered.

Runs on: the retry thread; `Scribe.order` and `Scribe.depth` on any.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from attrs import define, field

from mlproducer import clock as time
from mlproducer.core.delivery import Delivery
from mlproducer.core.farewell import CLOSED
from mlproducer.core.ports import Desk
from mlproducer.engine.gate import Gate
from mlproducer.engine.shelf import Shelf
from mlproducer.errors import BufferFullError, ProducerClosedError, PublishError, StoreError
from mlproducer.latch import Latch
from mlproducer.observe.events import EventSink
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, Store

MIN_PATIENCE, MAX_PATIENCE = 0.05, 5.0
"""Seconds for which messages wait for a store that somebody else is writing to."""


@define(eq=False)
class Put:
    """Store a message.

    :ivar begun: it was claimed from its publisher
    :ivar done: opened once it is stored, or refused
    :ivar refusal: why it is not
    """

    delivery: Delivery
    entry: Entry
    begun: bool = False
    done: Latch | None = None
    refusal: PublishError | None = None

    def begin(self) -> bool:
        """Whether it is still wanted; what is stored ahead is claimed from its publisher here."""
        if self.entry.ahead and not self.begun:
            return self.delivery.claim()
        return self.delivery.stored or self.begun


@define(eq=False)
class Note:
    """Note in a message's row what came of the last attempt.

    :ivar first: the row did not count among those that wait before
    """

    delivery: Delivery
    record: Record = field(repr=False)
    delay: float | None
    first: bool

    @property
    def dead(self) -> bool:
        """Whether it counts among the dead."""
        return self.record.dead

    @property
    def change(self) -> int:
        """By how much it changes their number."""
        return int(self.first)


@define(eq=False)
class End:
    """Delete the row of a message that has found its end, or goes back to its publisher.

    :ivar counted: the row counts among those that wait or are dead
    :ivar told: its publisher waits for the deletion
    """

    delivery: Delivery
    dead: bool
    counted: bool
    told: bool = False

    @property
    def change(self) -> int:
        """By how much it changes their number."""
        return -self.counted


Order = TypeVar("Order", Put, Note, End)


class Scribe:
    """Carries out orders.

    :param ring: has `carry_out` called soon, on the retry thread
    :ivar desks: the connections; each is answered for the messages that belong to it
    """

    def __init__(
        self, store: Store, shelf: Shelf, gate: Gate, events: EventSink, ring: Callable[[], None]
    ) -> None:
        self.desks: Sequence[Desk] = ()
        self._store = store
        self._shelf = shelf
        self._gate = gate
        self._events = events
        self._ring = ring
        self._orders: deque[Put | Note | End] = deque()
        self._rung = False
        # By how much rows become more or fewer, by whether they are dead.
        self._ordered = Counter[bool]()
        self._carried = Counter[bool]()
        self._counted = (Depth(), 0, 0)

    @property
    def depth(self) -> Depth:
        """Count the rows, whoever wrote them, as they will be after all orders; anyone may ask."""
        depth, waiting, dead = self._counted
        return Depth(
            max(0, depth.waiting + self._ordered[False] - waiting),
            max(0, depth.dead + self._ordered[True] - dead),
        )

    def order(self, order: Put | Note | End) -> None:
        """Have something written."""
        if not isinstance(order, Put):
            self._ordered[order.dead] += order.change
        self._orders.append(order)
        if not self._rung:
            self._rung = True
            self._ring()

    def count(self) -> None:
        """Ask the store how much it holds."""
        self._counted = (self._store.depth(), self._carried[False], self._carried[True])
        if not self.depth.stored:
            self._gate.emptied.changed()

    def carry_out(self) -> bool:
        """Do all that was ordered so far; what the store does not take now stays ordered."""
        self._rung = False
        orders = [self._orders.popleft() for _ in range(len(self._orders))]
        puts = [order for order in orders if isinstance(order, Put)]
        notes = [order for order in orders if isinstance(order, Note)]
        ends = [order for order in orders if isinstance(order, End)]
        steps = (
            self._attempt(self._put, puts, again=False),  # it has told those whom it refused
            self._attempt(self._note, notes),
            self._attempt(self._end, ends),
        )
        return all(steps)

    def _attempt(
        self,
        step: Callable[[Sequence[Order]], None],
        orders: Sequence[Order],
        *,
        again: bool = True,
    ) -> bool:
        """Do one kind of orders; a store that is full for one may be fit for another."""
        if not orders:
            return True
        try:
            step(orders)
        except Exception as error:  # noqa: BLE001 - also where a user's store fails in its own way
            self.failed(self._as_store_error(error))
            if again:
                self._orders.extendleft(reversed(orders))
            return False
        return True

    def _put(self, puts: Sequence[Put]) -> None:
        """Store messages, but for those whose publishers have given up waiting for it."""
        taken: list[Put] = []
        entries = self._wanted(puts, taken)
        now = time.monotonic()
        try:
            claims = self._store.put(entries, _patience(puts))
        except BufferFullError as error:
            if len(taken) == 1:
                self._refuse(taken, error)
            else:
                for put in taken:  # for some of them there may be room
                    put.begun = True
                    self._put([put])
        except Exception as error:
            taken += [put for put in puts if put not in taken and put.begin()]
            self._refuse(taken, self._as_store_error(error))
            raise
        else:
            self._stored(taken, claims, now)

    def _wanted(self, puts: Sequence[Put], taken: list[Put]) -> Iterator[Entry]:
        for put in puts:
            if put.begin():
                taken.append(put)
                yield put.entry

    def _stored(self, puts: Sequence[Put], claims: Sequence[Claim], now: float) -> None:
        for put, claim in zip(puts, claims, strict=True):
            put.delivery.stored = put.delivery.stored or put.entry.ahead
            if put.entry.delay is None:
                self._shelf.hold(put.delivery, claim, now)
            else:
                self._shelf.park(put.delivery, claim)
        _open(puts)
        ahead = [put.delivery for put in puts if put.entry.ahead]
        kept = [put.delivery for put in puts if not put.entry.ahead]
        if kept:
            self.count()
            self._gate.leave([put.delivery for put in puts if put.entry.delay is not None])
            self._tell(kept, lambda desk, some: desk.kept(some))
        self._part(self._tell(ahead, lambda desk, some: desk.stored_ahead(some)), now)

    def _part(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Answer those whose message was stored when the producer had been closed already."""
        for delivery in deliveries:
            if delivery.retry:
                delivery.entrust(now)
            else:
                self.order(End(delivery, delivery.dead, counted=delivery.kept))
                message_id = delivery.envelope.message_id
                error = ProducerClosedError(CLOSED, message_id=message_id)
                self._events.given_back(delivery, error)
                delivery.give_back(error)

    def _refuse(self, puts: Sequence[Put], error: BufferFullError | StoreError) -> None:
        for put in puts:
            put.refusal = _copy(error, put.delivery)
        refusals = {put.delivery: put.refusal for put in puts if put.refusal is not None}
        for delivery in self._tell(
            list(refusals),
            lambda desk, some: desk.not_kept([(each, refusals[each]) for each in some]),
        ):
            if delivery.open:
                self._events.given_back(delivery, refusals[delivery])
                delivery.give_back(refusals[delivery])
        _open(puts)

    def _as_store_error(self, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        return StoreError(f"the store {self._store.name} failed: {type(error).__name__}")

    def _note(self, notes: Sequence[Note]) -> None:
        held = [(note, self._shelf.claims.get(note.delivery)) for note in notes]
        known = [(note, claim) for note, claim in held if claim is not None]
        lost = set(
            self._store.release([Change(claim, note.record, note.delay) for note, claim in known])
        )
        for note, claim in known:
            if claim in lost:
                self._shelf.lose(note.delivery)
            elif note.delay is not None:
                self._shelf.park(note.delivery, claim)
        self._done(notes)

    def _end(self, ends: Sequence[End]) -> None:
        claims = [self._shelf.claim_of(end.delivery) for end in ends]
        self._store.done([claim for claim in claims if claim is not None])
        for end in ends:
            self._shelf.drop(end.delivery)
        self._done(ends)
        told = [end.delivery for end in ends if end.told]
        self._tell(told, lambda desk, some: desk.withdrawn(some))

    def _done(self, orders: Sequence[Note] | Sequence[End]) -> None:
        """Count anew, if it can be done, where the orders have made a difference."""
        for order in orders:
            self._carried[order.dead] += order.change
        if any(isinstance(order, Note) or order.counted for order in orders):
            try:
                self.count()
            except StoreError as error:
                self.failed(error)

    def failed(self, error: StoreError) -> None:
        """Tell that the store cannot be used."""
        self._events.store_failed(error)

    def _tell(
        self, deliveries: Sequence[Delivery], say: Callable[[Desk, list[Delivery]], None]
    ) -> list[Delivery]:
        """Have something said on the I/O thread of each; give those whose thread has ended."""
        batches: dict[Desk, list[Delivery]] = {}
        for delivery in deliveries:
            batches.setdefault(delivery.desk or self.desks[0], []).append(delivery)
        unheard = []
        for desk, batch in batches.items():
            if not desk.order(partial(say, desk, batch)):
                unheard += batch
        return unheard


def _open(puts: Sequence[Put]) -> None:
    for put in puts:
        if put.done is not None:
            put.done.open()


def _patience(puts: Sequence[Put]) -> float:
    """How long the publishers of these will wait."""
    left = max(put.delivery.deadline for put in puts) - time.monotonic()
    return min(max(left, MIN_PATIENCE), MAX_PATIENCE)


def _copy(error: BufferFullError | StoreError, delivery: Delivery) -> BufferFullError | StoreError:
    message_id = delivery.envelope.message_id
    return type(error)(str(error), message_id=message_id, attempts=delivery.attempts)
