"""Looks after messages in the store: has them written there, and sends out what is due.

There is one retry worker for all connections of a producer. Senders give orders and do not wait;
what became of them goes back by the mailbox of the connection that the message belongs to. What is
due goes out on any connection that can carry it. A durable store is touched on the retry worker's
thread and nowhere else, so that a slow one never holds up a connection; into the memory store the
I/O threads put themselves. What the store writer cannot write now it writes at the next sweep, and
before that nothing is claimed: so a store that fails for a while delays, and makes neither losses
nor duplicates.

Runs on: the retry thread; orders come from the I/O thread, `RetryWorker.write_ahead` from
publishers.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from mlproducer import _clock as time
from mlproducer._core.backoff import Backoff
from mlproducer._core.delivery import Delivery, Owner
from mlproducer._core.delivery_states import ROW_KNOWN, AttemptState, RowState
from mlproducer._core.events import Emit
from mlproducer._engine.gate import Gate
from mlproducer._engine.store_orders import Delete, Put, Update
from mlproducer._engine.store_writer import StoreWriter
from mlproducer._engine.stored_rows import StoredRows, record_of, wall_clock
from mlproducer._engine.threads import TimerThread
from mlproducer._synchronization import Latch
from mlproducer.errors import StoreError, UnroutableError
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Claim, Depth, Entry, Row, Store

MIN_PAUSE = 0.5
"""Seconds between two sweeps at least, where leases have to be renewed."""


class RetryWorker:
    """Keeps the messages of one producer.

    :param interval: seconds between sweeps
    :ivar asked: the store has been asked how much it holds, or could not be
    :ivar rests: nothing is claimed any more
    :ivar hurries: the last sweep left some that are due, and the next need not wait
    """

    def __init__(
        self, store: Store, gate: Gate, backoff: Backoff, interval: float, emit: Emit
    ) -> None:
        self.name = store.name
        self.durable = store.durable
        self.writes_ahead = store.write_ahead
        self.thread = TimerThread(self.sweep)
        self.stored_rows = StoredRows(store.lease, durable=store.durable)
        self.hurries = False
        self.rests = False
        self.asked = not store.durable
        self._own_due = self._in_vain_at = -math.inf
        self._store = store
        self._gate = gate
        self._backoff = backoff
        self._interval = interval
        self._store_writer = StoreWriter(store, self.stored_rows, gate, emit, self._ring)
        self._in_memory = type(store) is MemoryStore
        # guards: the store, its rows and its writer, where I/O threads put into the memory store
        # themselves; held by the retry thread for a sweep, and waited for by that one alone
        self._lock = threading.RLock()
        self._watch: Callable[[], None] | None = None
        self._woken = False
        self._expected: deque[tuple[Delivery, Claim]] = deque()
        self._claims_ahead = hasattr(store, "claim_ahead")
        self._ahead_since: tuple[float, float] | None = None
        self._found = 0  # rows that the store returned of what it was last asked for
        self._claiming = False  # by the sweep under way, or by one that was cut
        self._claimed: list[Row] = []

    @property
    def depth(self) -> Depth:
        """Return how many rows there are, of all processes; any thread may ask."""
        return self._store_writer.depth

    @property
    def backlog(self) -> tuple[int, float]:
        """How many rows are due, and the age of the oldest in seconds, where the store knows."""
        found: tuple[int, float] = getattr(self._store, "backlog", (0, 0.0))
        return found

    @property
    def known(self) -> bool:
        """Whether the store holds all that it should, has said how much, and has not failed since.

        What it should hold and does not may have left the window: see `_send_out`.
        """
        return self._store_writer.known and not self.stored_rows.rowless

    @property
    def expects(self) -> bool:
        """Whether a row may soon be due here; any thread may ask.

        Not if the last sweep found none, though all that were deferred here were due by then, but
        for those that wait for what may never come: a route, or a place for dead letters. Others
        are other processes', or wait as well for them.
        """
        return self._in_vain_at <= self._own_due

    @property
    def abandoned(self) -> list[Delivery]:
        """Messages that have failed here, since their I/O thread had ended."""
        return list(self._store_writer.abandoned)

    def serve(self, owners: Sequence[Owner], watch: Callable[[], None]) -> None:
        """Note which connections to answer, and what to call at each sweep."""
        self._store_writer.owners = owners
        self._watch = watch
        self.thread.due = time.monotonic() + (0.0 if self.durable else self._interval)

    # --- orders --------------------------------------------------------------------------------

    def write_ahead(self, delivery: Delivery, done: Latch | None = None) -> Put:
        """Store a message before it is sent, then hand it to the I/O thread.

        :param done: opened once it is stored, or refused
        """
        record = record_of(delivery, delivery.started)
        put = Put(delivery, Entry(record, ahead=True), done=done)
        self._store_writer.order(put)
        return put

    def defer(
        self, delivery: Delivery, now: float, *, before: RowState, fresh: bool = False
    ) -> bool:
        """Store a message, or note in its row what came of the last attempt.

        :returns: whether it is stored already, as in memory it mostly is
        """
        record, delay = record_of(delivery, now), self._delay(delivery, fresh=fresh)
        if delay is not None and (fresh or not (delivery.dead or delivery.unrouted)):
            self._own_due = max(self._own_due, now + delay + MIN_PAUSE)
        if before in ROW_KNOWN:
            new = before is RowState.AHEAD
            told = new and delivery.leased_until < now
            self._store_writer.order(Update(delivery, record, delay, first=new, told=told))
            return False
        entry = Entry(record, delay)
        if self._put_now(delivery, entry, now):
            return True
        self._store_writer.order(Put(delivery, entry))
        return False

    def settle(self, delivery: Delivery) -> None:
        """Delete the row of a message that has found its end."""
        self._store_writer.order(Delete(delivery, delivery.dead, waited=delivery.in_store))

    def withdraw(self, delivery: Delivery, *, waited: bool) -> None:
        """Delete the row of a message, and report that."""
        self._store_writer.order(Delete(delivery, delivery.dead, waited=waited, told=True))

    def holds(self, delivery: Delivery) -> bool | None:
        """Whether its row is this process's; ``None`` where it has none, as far as is known."""
        if self.stored_rows.has_row(delivery):
            return True
        return None if self.stored_rows.claim_of(delivery) is None else False

    def recover(self, owner: Owner, deliveries: Sequence[Delivery], *, crashed: bool) -> None:
        """Report for which of these no order is under way, nor an answer.

        :param crashed: the owner's loop has failed, maybe between a step of a row and the order
            that belongs to it, or while it had the lock
        """
        if crashed:
            with contextlib.suppress(RuntimeError):  # it has the lock no more
                while True:
                    self._lock.release()
            self.thread.order(self._store_writer.settle_counts)
        self.thread.order(partial(self._recover, owner, deliveries))

    def verify(self) -> None:
        """See soon that the rows are still there, and store what has none although it should."""
        self.thread.order(self._verify)

    def rest(self) -> None:
        """Claim nothing any more; what was claimed ahead is due again with the next sweep."""
        self.rests = True
        self.wake()

    def sweep_soon(self) -> None:
        """Send out what is due without waiting for the next sweep."""
        self.hurries = False
        self.thread.order(self.sweep)

    def wake(self) -> None:
        """Look soon for rows that others have brought; from any thread, as often as one likes."""
        # Two threads may both find it unset; then there are two sweeps, which does no harm.
        if not self._woken:
            self._woken = True
            self.thread.order(self.sweep)

    def expect(self, delivery: Delivery, claim: Claim) -> None:
        """Follow a row that becomes visible with another's COMMIT, if it does; from any thread."""
        self._expected.append((delivery, claim))
        self.thread.order(self._note_expected)

    def stop(self) -> None:
        """End the thread once all orders are carried out, and close the store."""
        self.thread.order(self._close)
        self.thread.stop()

    def _put_now(self, delivery: Delivery, entry: Entry, now: float) -> bool:
        """Store a message on its I/O thread, if that can be done without waiting."""
        # Tried, not waited for: amid a sweep, which has the lock, it is ordered like any other.
        if not (self._in_memory and self._lock.acquire(blocking=False)):
            return False
        try:
            stored = self._store_writer.put_now(delivery, entry, now)
            if stored and entry.delay is not None:
                self._gate.leave((delivery,))  # before a sweep may claim it, and let it in again
        finally:
            self._lock.release()
        return stored

    def _recover(self, owner: Owner, deliveries: Sequence[Delivery]) -> None:
        with self._lock:
            self._release_claimed()
            self._store_writer.carry_out()
            pending = {order.delivery for order in self._store_writer.pending()}
        pending.update(self.stored_rows.rowless)
        owed = [each for each in deliveries if each not in pending]
        if owed:  # behind whatever else is on its way to them
            owner.order(partial(owner.order_again, owed))

    def _release_claimed(self) -> None:
        """Release what a sweep that was cut had claimed; of what was sent, the tag decides."""
        epoch, now = wall_clock(), time.monotonic()
        for row in self._claimed:
            delivery = self.stored_rows.holder_of(row.claim)
            delivery = delivery or self.stored_rows.take(row, now, epoch)
            if delivery.attempt is AttemptState.SCHEDULED:
                self._gate.leave((delivery,))
                self._store_writer.order(Update(delivery, row.record, 0.0, first=False))
        self._claimed, self._claiming = [], False
        if isinstance(self._store, MemoryStore):
            held = set(self.stored_rows.claims.values())
            self._store.reclaim(held, self.stored_rows.known_keys())

    def _ring(self) -> None:
        self.thread.order(self._carry_out)

    def _carry_out(self) -> None:
        with self._lock:
            self._store_writer.carry_out()

    def _delay(self, delivery: Delivery, *, fresh: bool) -> float | None:
        """Say when a message is due again; never while its tag is open and may be confirmed."""
        if delivery.in_flight:
            return None
        if delivery.dead:
            return 0.0 if fresh else self._backoff.maximum
        if delivery.attempts == 0:
            return 0.0
        policy, backoff = delivery.policy, self._backoff
        if policy is not None:
            backoff = Backoff(policy.base_delay, policy.max_delay)
        if delivery.unrouted and isinstance(delivery.reason, UnroutableError):
            return backoff.maximum
        return backoff.delay(delivery.attempts - 1)

    # --- the thread: sweeps --------------------------------------------------------------------

    def sweep(self) -> None:
        """Hand what is due back to the sender, as far as connection and window have room."""
        self._woken = False  # before the store is asked: a row that comes after that wakes it again
        now = time.monotonic()
        self.thread.due = now + min(self._interval, max(MIN_PAUSE, self.stored_rows.renew_at - now))
        if self._watch is not None:
            self._watch()
        with self._lock:
            try:
                if self._claiming:
                    self._release_claimed()
                self._renew(now)
                self._store_writer.put_again()
                if self._store_writer.carry_out():
                    self._store_writer.trace()
                    if self.known or not self.asked:
                        self._store_writer.count()
                        self._send_out()
                    else:  # a store that can be claimed from, but not counted, delivers
                        self._send_out()
                        self._store_writer.count()
            except StoreError as error:
                self._store_writer.failed(error)
        self.asked = True
        self._gate.emptied.changed()  # a close() may have waited for this

    def _send_out(self) -> None:
        if self.known and not self.depth.stored:
            self._gate.share(backlog=False)
            return
        ready = {owner: owner.ready() for owner in self._store_writer.owners}
        able = sum(ready.values())
        self._in_vain_at = -math.inf
        if able == 0 or self.rests:
            self._give_back()
            return
        began, epoch = time.monotonic(), wall_clock()
        now = began
        if self._ahead_since is not None:
            if now - self._ahead_since[0] > self._store.lease / 3:
                self._give_back()
            else:  # the leases began then
                now, epoch = self._ahead_since
        room = min(able, self._gate.room())
        if self._ahead_since is not None and not room and not self.stored_rows.rowless:
            # What was claimed ahead waits together: one that was given back would be overtaken.
            self.hurries = True
            self._gate.share(backlog=True)
            return
        # One also where the window is full, and stays so while publishers wait for it: if there is
        # one that is due, a part of the window is left to such.
        limit = max(1, room)
        self._claiming = True
        self._claimed = rows = self._store.claim(limit)
        # After the claim, not before it: one that was committed meanwhile may be among these.
        self._note_expected()
        self._found = len(rows) + (self._found if self._ahead_since is not None else 0)
        if len(rows) < limit:
            self._ahead_since = None  # nothing is left of it
        self.hurries = bool(rows)
        if not rows:
            self._in_vain_at = began
        self._gate.share(backlog=self.hurries)
        taken: list[Delivery] = []
        full = False
        for row in rows:
            if self.stored_rows.regain(row, now):
                continue
            delivery = self.stored_rows.take(row, now, epoch)
            if not delivery.open:
                # it was given back, and its row left to the process that held it
                self._store_writer.order(Delete(delivery, row.record.dead, waited=True))
            elif delivery.in_flight:
                continue  # its row was another process's for a while; its tag decides
            elif not full and self._enter(delivery):
                taken.append(delivery)
            else:
                # Nor those behind it, which would overtake it; but where publishers wait, who take
                # all that becomes free, one that is too large must not stop those that fit.
                full = full or self._gate.spare() > 0
                self.hurries = True
                self._store_writer.order(Update(delivery, row.record, 0.0, first=False))
        self._hand_out(taken, ready)
        self._claimed, self._claiming = [], False
        if full:
            self._give_back()
        else:
            self._claim_ahead(able - len(taken))

    def _note_expected(self) -> None:
        while self._expected:
            self.stored_rows.expect(*self._expected.popleft())

    def _enter(self, delivery: Delivery) -> bool:
        return self._gate.try_enter(delivery) or (
            self._make_room() and self._gate.try_enter(delivery)
        )

    def _make_room(self) -> bool:
        """Free the slot of one that is to be stored and has no row, unless its tag is open.

        Else a full window of such would wait for a full store, and its rows for the window. It is
        remembered without a slot, and stored as soon as the row that takes its place is gone.
        """
        for delivery, put in list(self.stored_rows.rowless.items()):
            if put.entry.delay is not None and self._gate.holds(delivery):
                self._gate.leave((delivery,))
                return True
        return False

    def _claim_ahead(self, able: int) -> None:
        """Have the store claim, while these are sent, what is sent next, if there is a backlog.

        Not while a receipt of this process waits for a row: what became of it could then be told
        only when the row is taken from the store.
        """
        wanted = min(able, self._gate.spare())
        if self._claims_ahead and 0 < wanted <= 2 * self._found and not self.stored_rows.waits:
            since = time.monotonic(), wall_clock()
            if self._store.claim_ahead(wanted):  # type: ignore[attr-defined]
                self._ahead_since, self._found = since, 0

    def _give_back(self) -> None:
        """Let others have what was claimed ahead, as long as nothing can be sent here."""
        if self._ahead_since is not None:
            self._store.give_back()  # type: ignore[attr-defined]
            self._ahead_since = None

    def _hand_out(self, deliveries: Sequence[Delivery], ready: dict[Owner, int]) -> None:
        """Divide messages among the connections that can carry them.

        One that belongs to another connection goes by way of that one's mailbox, behind the answers
        that it may still find there; so no two threads ever have it.
        """
        batches: dict[tuple[Owner, Owner], list[Delivery]] = {}
        for delivery in deliveries:
            home = delivery.owner
            owner = home if home and ready.get(home) else max(ready, key=ready.__getitem__)
            ready[owner] -= 1
            if home is None:
                delivery.give_to(owner)
                home = owner
            batches.setdefault((home, owner), []).append(delivery)
        for (home, owner), batch in batches.items():
            if home is owner:
                owner.order(partial(owner.readmit, batch))
            else:
                home.order(partial(home.pass_on, batch, owner))

    def _renew(self, when: float) -> None:
        """Renew the leases of what is on its way, and see which have been lost."""
        if when >= self.stored_rows.renew_at:
            now = time.monotonic()
            claims = list(self.stored_rows.claims.values())
            lost = self._store.renew(claims) if claims else []
            self.stored_rows.renewed(lost, now)

    def _verify(self) -> None:
        with self._lock:
            try:
                self._renew(math.inf)
                self._store_writer.trace()
            except StoreError as error:
                self._store_writer.failed(error)
            self._store_writer.put_again()

    def _close(self) -> None:
        self.thread.due = None  # a sweep would open the store again
        with self._lock:
            self._store_writer.put_again()
            self._store_writer.carry_out()
            try:
                self._store.close()
            except StoreError as error:
                self._store_writer.failed(error)
