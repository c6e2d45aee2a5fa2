"""Writes to the store what the retry worker is ordered to, together what has come together.

Orders that come in a burst share one transaction, and so one fsync. A store that is full for one
kind of orders may be fit for another. What cannot be noted or deleted now stays ordered. So does
what is cut in the middle, by a MemoryError say: it is carried out again, from the beginning.

Runs on: the retry thread; `StoreWriter.order` and `StoreWriter.depth` on any.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from attrs import define, field

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.delivery import Delivery, Doubt, Owner
from mlproducer._core.events import Emit
from mlproducer._core.shutdown import CLOSED
from mlproducer._engine.gate import Gate
from mlproducer._engine.store_orders import Delete, Put, Update
from mlproducer._engine.stored_rows import StoredRows, record_of
from mlproducer.errors import BufferFullError, ProducerClosedError, PublishError, StoreError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, RowFate, Store

MIN_PATIENCE, MAX_PATIENCE = 0.05, 5.0
"""Seconds for which messages wait for a store that another process is writing to."""


@define(eq=False)
class _Count:
    """What the store held when it was last asked.

    :ivar waiting: by how much orders that were carried out by then had changed that number
    :ivar dead: by how much that of the dead
    :ivar new: what has been stored since, and whether it is dead
    """

    depth: Depth
    waiting: int = 0
    dead: int = 0
    new: dict[Delivery, bool] = field(factory=dict)


Order = TypeVar("Order", Put, Update, Delete)

_ENDS = (RowFate.CONFIRMED, RowFate.DEAD_LETTERED)

MOST_UNCOUNTED = 2_000
"""Rows that are stored between two counts at most, where there is always something to store."""

TRACED = 500
"""Rows whose fate is asked for in one call."""


class StoreWriter:
    """Carries out orders.

    :param ring: has `carry_out` called soon, on the retry thread
    :ivar owners: the connections; each is answered for the messages that belong to it
    :ivar known: the store has been counted, and has not failed since
    :ivar abandoned: what has failed, since its I/O thread had ended
    """

    def __init__(
        self,
        store: Store,
        stored_rows: StoredRows,
        gate: Gate,
        emit: Emit,
        ring: Callable[[], None],
    ) -> None:
        self.owners: Sequence[Owner] = ()
        self._store = store
        self._stored_rows = stored_rows
        self._gate = gate
        self._emit = emit
        self._ring = ring
        self._orders: deque[Put | Update | Delete] = deque()
        self._in_hand: list[Put | Update | Delete] = []
        self._cut = False  # those in hand may have been carried out, or a part of them
        self._rung = False
        self._count_due = False
        # By how much rows become more or fewer, by whether they are dead. I/O threads order at the
        # same time, and to add is more than one step; so each thread has a sum of its own.
        self._ordered: dict[int, Counter[bool]] = {}
        self._carried = Counter[bool]()
        self._counted = _Count(Depth())
        self.known = not store.durable
        self.abandoned: list[Delivery] = []

    @property
    def depth(self) -> Depth:
        """Return how many rows there will be after all orders, of all processes; on any thread.

        Of those stored ahead these are other processes' alone; this one's are inside the window.
        """
        # `_counted` is replaced as a whole, so that a reader has one count or the other; list()
        # copies in one step what other threads add to.
        count = self._counted
        new = list(count.new.values())
        waiting = dead = 0
        for ordered in list(self._ordered.values()):
            waiting += ordered[False]
            dead += ordered[True]
        return Depth(
            max(0, count.depth.waiting + new.count(False) + waiting - count.waiting),
            max(0, count.depth.dead + new.count(True) + dead - count.dead),
            count.depth.ahead,
        )

    def order(self, order: Put | Update | Delete) -> None:
        """Have something written."""
        if isinstance(order, Delete):
            # A row that is not there yet is not counted, and must not be subtracted from others.
            order.counted = order.waited and self._stored_rows.claim_of(order.delivery) is not None
        if not isinstance(order, Put):
            thread = threading.get_ident()
            ordered = self._ordered.get(thread) or self._ordered.setdefault(thread, Counter())
            ordered[order.dead] += order.change
        self._orders.append(order)
        if not self._rung:
            self._rung = True
            self._ring()

    def put_now(self, delivery: Delivery, entry: Entry, now: float) -> bool:
        """Store a message in memory; false where that fails, or it is there: an order tells."""
        rows = self._stored_rows
        if delivery.successor is not None and (delivery in rows.rowless or rows.claim_of(delivery)):
            return False  # as `_put` says
        try:
            [claim] = self._store.put([entry], 0.0)
        except (BufferFullError, StoreError):
            return False
        self._counted.new[delivery] = entry.record.dead
        if entry.delay is None:
            self._stored_rows.hold(delivery, claim, now)
        else:
            self._stored_rows.park(delivery, claim)
        return True

    def count(self) -> None:
        """Ask the store how much it holds."""
        self._count_due = False
        try:
            depth = self._store.depth()
        except BaseException:
            # Here and not before the call: a flush() that looks meanwhile goes by the last count.
            self.known = False
            raise
        others = max(0, depth.ahead - len(self._stored_rows.ahead))
        counted = Depth(depth.waiting, depth.dead, others)
        self._counted = _Count(counted, self._carried[False], self._carried[True])
        self.known = True
        if not self.depth.total:
            self._gate.emptied.changed()

    def carry_out(self) -> bool:
        """Do all that was ordered so far; what the store does not take now stays ordered."""
        self._rung = False  # first: an order that comes after that rings
        again, self._cut = self._cut, True
        for _ in range(len(self._orders)):  # only this thread takes orders out
            self._in_hand.append(self._orders[0])
            self._orders.popleft()
        orders = list(dict.fromkeys(self._in_hand))  # a cut between these two leaves one twice
        puts = [order for order in orders if isinstance(order, Put)]
        updates = [order for order in orders if isinstance(order, Update)]
        deletes = [order for order in orders if isinstance(order, Delete)]
        steps: tuple[tuple[Callable[[Any], None], Sequence[Any]], ...] = (
            (self._put_rest if again else self._put, puts),
            (self._update, updates),
            (self._delete, deletes),
        )
        left = [each for step, some in steps if not self._attempt(step, some) for each in some]
        # What was refused has been told so. Other failures are met once more, not for ever.
        self._in_hand = [
            each for each in left if not isinstance(each, Put) or (each.cut and not again)
        ]
        self._cut = any(isinstance(each, Put) for each in self._in_hand)
        if self._cut:
            self._ring()
        if again:
            self.settle_counts()
        self._count_if_due()
        return not left

    def settle_counts(self) -> None:
        """Count what has been carried out as what was ordered and is not to be done any more."""
        carried = Counter[bool]()
        for ordered in list(self._ordered.values()):
            carried.update(ordered)
        for order in self.pending():
            if not isinstance(order, Put):
                carried[order.dead] -= order.change
        self._carried = carried

    def pending(self) -> list[Put | Update | Delete]:
        """Return what is still to be carried out."""
        return list(dict.fromkeys([*self._in_hand, *self._orders]))

    def _attempt(self, step: Callable[[Sequence[Order]], None], orders: Sequence[Order]) -> bool:
        """Do one kind of orders; a store that is full for one may be fit for another."""
        if not orders:
            return True
        try:
            step(orders)
        except Exception as error:  # noqa: BLE001 - also where a user's store fails in its own way
            self.failed(self._as_store_error(error))
            return False
        return True

    def put_again(self) -> None:
        """Store what publishers rely on, and what the store has lost, as far as it can be done now.

        They are remembered until they are stored: a close finds them although the store is silent.
        """
        puts = list(self._stored_rows.rowless.values())
        self._attempt(self._put, puts)
        for put in puts:
            if not put.wanted:
                self._stored_rows.rowless.pop(put.delivery, None)
        if puts and not self._stored_rows.rowless:
            self._gate.emptied.changed()  # a flush() may have waited for these alone
        self._count_if_due()

    def _put_rest(self, puts: Sequence[Put]) -> None:
        """Store what is not there yet of what was cut, and tell of what is."""
        claims = [(put, self._stored_rows.claim_of(put.delivery)) for put in puts]
        there = [(put, claim) for put, claim in claims if claim is not None]
        if there:
            now = time.monotonic()
            puts = [put for put, _ in there]
            self._stored(puts, [claim for _, claim in there], now, again=True)
        for put, claim in claims:
            if claim is None and put.cut:  # it may be there all the same
                put.delivery.suspect(Doubt.POSSIBLE)
        self._put([put for put, claim in claims if claim is None])

    def _put(self, puts: Sequence[Put]) -> None:
        """Store messages, but for those whose publishers have given up waiting for it.

        One may have a row by now: it was refused, its publisher left before the I/O thread heard of
        that, and what came of its attempt was then noted, in a row of its own. A second row would
        make a second message.
        """
        rows = self._stored_rows
        # Only a publisher that left has a successor; so most bursts ask for no claim.
        left = [put for put in puts if put.delivery.successor is not None]
        there = [put for put in left if rows.claim_of(put.delivery) is not None]
        if there:
            puts = [put for put in puts if put not in there]
            sure = [put.delivery for put in there if put.delivery not in rows.lost_rows]
            self._tell(sure, lambda owner, some: owner.stored(some))
        taken: list[Put] = []
        cut_before = any(put.cut for put in puts)
        for put in puts:
            put.cut = True
        entries = self._wanted(puts, taken)
        now = time.monotonic()
        try:
            claims = self._store.put(entries, _patience(puts))
        except BufferFullError as error:
            if len(taken) == 1:
                self._refuse(taken, error)
            else:  # for some of them there may be room
                for put in taken:
                    self._attempt(self._put, [put])
        except Exception as error:
            if not isinstance(error, StoreError):
                for put in puts:  # it may be there all the same
                    put.delivery.suspect(Doubt.POSSIBLE)
                if not cut_before:
                    raise
            taken += [put for put in puts if put not in taken and put.wanted]
            self._refuse(taken, self._as_store_error(error))
            for put in puts:
                put.cut = False
            raise
        else:
            self._stored(taken, claims, now)

    def _wanted(self, puts: Sequence[Put], taken: list[Put]) -> Iterator[Entry]:
        for put in puts:
            if put.wanted:
                taken.append(put)
                if put.entry.delay is not None and self._store.durable:
                    # From its COMMIT on another process may claim it, before this one hears of it.
                    put.delivery.lease(-math.inf)
                yield put.entry

    def _stored(
        self, puts: Sequence[Put], claims: Sequence[Claim], now: float, *, again: bool = False
    ) -> None:
        """Tell that messages are stored; what can fail, as counting can, comes after that.

        :param again: some may have been taken from their publishers by this, which was cut then
        """
        ahead, kept = [], []
        for put, claim in zip(puts, claims, strict=True):
            if put.entry.delay is None:
                self._stored_rows.hold(put.delivery, claim, now)
            else:
                self._stored_rows.park(put.delivery, claim)
        for put in puts:
            delivery = put.delivery
            self._stored_rows.rowless.pop(delivery, None)
            if put.entry.ahead:
                self._stored_rows.ahead.add(delivery)
            else:
                self._counted.new[delivery] = put.entry.record.dead
            if not put.entry.ahead:
                kept.append(delivery)
            elif put.restores:
                continue
            elif delivery.claim_again() if again else _is_taken(delivery):
                ahead.append(delivery)
            else:  # its publisher has given up while it was being stored
                self.order(Delete(delivery, dead=False, waited=False))
        _open(puts)
        self._gate.leave([put.delivery for put in puts if put.entry.delay is not None])
        for delivery in self._tell(kept, lambda owner, some: owner.stored(some)):
            if not delivery.open:
                self.order(Delete(delivery, delivery.dead, waited=True))
        self._part(self._tell(ahead, lambda owner, some: owner.stored_ahead(some)), now)
        if kept:
            self._count_due = True

    def _part(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Answer those whose message was stored when the producer had been closed already."""
        for delivery in deliveries:
            if delivery.open and delivery.retry:
                delivery.release(now)
                continue
            self.order(Delete(delivery, delivery.dead, waited=False))
            if delivery.open:
                message_id = delivery.envelope.message_id
                self._fail_late(delivery, ProducerClosedError(CLOSED, message_id=message_id))

    def _refuse(self, puts: Sequence[Put], error: BufferFullError | StoreError) -> None:
        """Tell that messages are not stored; those that publishers rely on are put again later."""
        refusals: dict[Delivery, PublishError] = {}
        for put in puts:
            put.delivery.lease(math.inf)  # there is nothing that another could have
            if put.restores or put.delivery.relied_on:
                self._stored_rows.rowless[put.delivery] = put
            else:
                put.refusal = refusals[put.delivery] = _copy(error, put.delivery)
        for delivery in self._tell(
            list(refusals),
            lambda owner, some: owner.not_stored([(each, refusals[each]) for each in some]),
        ):
            if delivery.open and delivery.is_ours:
                self._fail_late(delivery, refusals[delivery])
        _open(puts)

    def _fail_late(self, delivery: Delivery, error: PublishError) -> None:
        """Fail a message whose I/O thread has ended."""
        self.abandoned.append(delivery)
        self._emit(events.Failed(delivery, error))
        delivery.fail(error)

    def _as_store_error(self, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        return StoreError(f"the store {self._store.name} failed: {type(error).__name__}")

    def _update(self, updates: Sequence[Update]) -> None:
        held = [(update, self._stored_rows.claims.get(update.delivery)) for update in updates]
        known = [(update, claim) for update, claim in held if claim is not None]
        lost = set(
            self._store.release(
                [Change(claim, update.record, update.delay) for update, claim in known]
            )
        )
        sure = []
        for update, claim in held:
            delivery = update.delivery
            if claim is None or claim in lost:
                self._miss(update)
                lost_row = self._stored_rows.lost_rows.get(delivery)
                safe = lost_row is not None and lost_row.told
            else:
                safe = True
                self._stored_rows.ahead.discard(delivery)
                if update.delay is not None:
                    self._stored_rows.park(delivery, claim)
            if update.told and safe:
                sure.append(delivery)
        self._done(updates)
        self._tell(sure, lambda owner, some: owner.stored(some))

    def _miss(self, update: Update) -> None:
        """Remember what is to be stored of a message, should its row turn out to be gone."""
        delivery = update.delivery
        self._stored_rows.lose(delivery)
        put = Put(delivery, Entry(update.record, update.delay), restores=True)
        if delivery in self._stored_rows.lost_rows:
            self._stored_rows.lost_rows[delivery].put = put
        elif delivery in self._stored_rows.rowless or (
            delivery.relied_on and not self._stored_rows.claim_of(delivery)
        ):
            self._stored_rows.rowless[delivery] = put  # it could not be written so far

    def trace(self) -> None:
        """Learn what became of rows that are not this process's any more, or may not be.

        These are rows whose claim was lost, and those that wait, and that another process may have
        delivered, as far as a publisher can be told.
        """
        asked = self._stored_rows.lost_and_waiting()
        for begin in range(0, len(asked), TRACED):
            piece = asked[begin : begin + TRACED]
            fates = self._store.trace([claim for _, claim in piece])
            self._learn([delivery for delivery, _ in piece], fates)

    def _learn(self, deliveries: Sequence[Delivery], fates: Sequence[RowFate]) -> None:
        by_fate: dict[RowFate, list[Delivery]] = {fate: [] for fate in RowFate}
        for delivery, fate in zip(deliveries, fates, strict=True):
            by_fate[fate].append(delivery)
        taken = [
            each for each in by_fate[RowFate.TAKEN] if self._stored_rows.first_seen_taken(each)
        ]
        self._tell(taken, lambda owner, some: owner.taken_over(some))
        vanished = []
        for delivery in by_fate[RowFate.MISSING]:
            if self._stored_rows.expects(delivery):
                continue  # its transaction is not over, or was rolled back
            lost_row = self._stored_rows.lost_rows.get(delivery)
            if lost_row is None:
                vanished.append(delivery)
                continue
            if delivery.open:
                delivery.lease(math.inf)  # there is nothing that another could have
                self._stored_rows.rowless[delivery] = lost_row.put or self._restoring(delivery)
            self._stored_rows.drop(delivery)
        self._tell(vanished, lambda owner, some: owner.vanished(some))
        for fate in _ENDS:
            self._tell_end(by_fate[fate], fate)
        for delivery in [*vanished, *by_fate[_ENDS[0]], *by_fate[_ENDS[1]]]:
            self._stored_rows.drop(delivery)  # not before they are told, should this be cut

    def _restoring(self, delivery: Delivery) -> Put:
        record = record_of(delivery, time.monotonic())
        return Put(delivery, Entry(record, ahead=not delivery.in_store), restores=True)

    def _delete(self, deletes: Sequence[Delete]) -> None:
        claims = [self._stored_rows.claim_of(delete.delivery) for delete in deletes]
        self._store.done([claim for claim in claims if claim is not None])
        told = [
            (delete.delivery, claim)
            for delete, claim in zip(deletes, claims, strict=True)
            if delete.told
        ]
        fates = self._fates([claim for _, claim in told])
        for delete in deletes:
            self._stored_rows.drop(delete.delivery)
            self._stored_rows.rowless.pop(delete.delivery, None)
        self._withdraw([delivery for delivery, _ in told], fates)
        self._done(deletes)

    def _fates(self, claims: Sequence[Claim | None]) -> list[RowFate]:
        """Ask what became of rows that have just been deleted, unless they were another's by then.

        So it was if the lease had ended while this process, or the store, was frozen.
        """
        held = [claim for claim in claims if claim is not None]
        fates = iter(self._store.trace(held) if held else ())
        return [RowFate.MISSING if claim is None else next(fates) for claim in claims]

    def _withdraw(self, deliveries: Sequence[Delivery], fates: Sequence[RowFate]) -> None:
        """Tell whose row is gone, and what another process does, or has done, with the others."""
        by_fate: dict[RowFate, list[Delivery]] = {}
        for delivery, fate in zip(deliveries, fates, strict=True):
            by_fate.setdefault(fate, []).append(delivery)
        for fate, some in by_fate.items():
            if fate in _ENDS:
                self._tell_end(some, fate)
            else:
                gone = fate is RowFate.MISSING
                self._tell(some, partial(_say_withdrawn, gone=gone))

    def _tell_end(self, deliveries: Sequence[Delivery], fate: RowFate) -> None:
        dead = fate is RowFate.DEAD_LETTERED
        self._tell(deliveries, lambda owner, some: owner.ended_elsewhere(some, dead=dead))

    def _done(self, orders: Sequence[Update] | Sequence[Delete]) -> None:
        """Note that there is something to count, where the orders have made a difference."""
        for order in orders:
            self._carried[order.dead] += order.change
        if any(isinstance(order, Update) or order.waited for order in orders):
            self._count_due = True

    def _count_if_due(self) -> None:
        """Count, if it can be done; a store that cannot is told of, and harms nothing.

        Where more has been ordered meanwhile, that is carried out first; but what was stored since
        the last count is remembered until the next.
        """
        if not self._count_due or (self._orders and len(self._counted.new) < MOST_UNCOUNTED):
            return
        try:
            self.count()
        except Exception as error:  # noqa: BLE001 - also where a user's store fails in its own way
            self.failed(self._as_store_error(error))

    def failed(self, error: StoreError) -> None:
        """Tell that the store cannot be used: what is left is unknown until it is counted."""
        self.known = False
        self._emit(events.StoreFailed(error))

    def _tell(
        self, deliveries: Sequence[Delivery], say: Callable[[Owner, list[Delivery]], None]
    ) -> list[Delivery]:
        """Have something said on the I/O thread of each; give those whose thread has ended."""
        batches: dict[Owner, list[Delivery]] = {}
        for delivery in deliveries:
            batches.setdefault(delivery.owner or self.owners[0], []).append(delivery)
        unheard = []
        for owner, batch in batches.items():
            if not owner.order(partial(say, owner, batch)):
                unheard += batch
        return unheard


def _say_withdrawn(owner: Owner, deliveries: list[Delivery], *, gone: bool) -> None:
    owner.withdrawn(deliveries, gone=gone)


def _is_taken(delivery: Delivery) -> bool:
    return delivery.claim() or (delivery.open and delivery.relied_on)


def _open(puts: Sequence[Put]) -> None:
    for put in puts:
        done, put.done = put.done, None  # this may be done again
        if done is not None:
            done.open()


def _patience(puts: Sequence[Put]) -> float:
    """How long the publishers of these will wait."""
    left = max(put.delivery.deadline for put in puts) - time.monotonic()
    return min(max(left, MIN_PATIENCE), MAX_PATIENCE)


def _copy(error: BufferFullError | StoreError, delivery: Delivery) -> BufferFullError | StoreError:
    # Not of a store's own subclass, which may take other arguments, and is not among our errors.
    kind = BufferFullError if isinstance(error, BufferFullError) else StoreError
    return kind(
        str(error),
        message_id=delivery.envelope.message_id,
        attempts=delivery.attempts,
        possibly_sent=delivery.doubt is not Doubt.NONE,
    )
