"""When a stored message is due again, by the retry worker itself, without its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest

from mlproducer._core.backoff import Backoff
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_states import AttemptState, RowState
from mlproducer._engine import retry_worker as module
from mlproducer._engine import store_writer
from mlproducer._engine.gate import MAX_BYTES, Gate
from mlproducer._engine.retry_worker import RetryWorker
from mlproducer._engine.store_orders import Delete
from mlproducer._engine.stored_rows import SAFETY, record_of
from mlproducer.errors import BufferFullError, PublishError, StoreError
from mlproducer.message import Fate
from mlproducer.observe.sinks import Fanout
from mlproducer.settings import RetryPolicy
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row
from tests.helpers import make_delivery
from tests.pure.witnesses import Clock

STEP = 0.25
LEASE = 30.0


class Owner:
    """Takes what the retry worker says, and has room for everything."""

    def __init__(self) -> None:
        self.readmitted: list[Delivery] = []
        self.refused: list[Delivery] = []

    def order(self, method: partial[None]) -> bool:
        """Do it at once."""
        method()
        return True

    able = 1000

    def ready(self) -> int:
        """Many, unless it was told otherwise."""
        return self.able

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Note them."""
        self.readmitted += deliveries

    def stored(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored."""

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored, and are sent."""
        self.readmit(deliveries)

    def not_stored(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """Note them."""
        self.refused += [delivery for delivery, _ in refusals]


class ClaimsAhead(MemoryStore):
    """A store that can be told to claim what is wanted next."""

    durable = True  # others may want the rows
    lease = LEASE
    ahead: Sequence[Row] = ()

    def claim_ahead(self, limit: int) -> bool:
        """Claim it now."""
        if self.ahead:
            return False
        self.ahead = super().claim(limit)
        return True

    def claim(self, limit: int) -> list[Row]:
        """Return that first."""
        claimed, self.ahead = list(self.ahead[:limit]), self.ahead[limit:]
        return claimed or super().claim(limit)

    def give_back(self) -> None:
        """Release it."""
        self.release([Change(row.claim, row.record, 0.0) for row in self.ahead])
        self.ahead = ()


class Counted(MemoryStore):
    """A store that notes how often it was counted; during its first put something is ordered."""

    durable = True
    asked = 0
    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store, while something else is ordered."""
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return super().put(entries, patience)

    def depth(self) -> Depth:
        """Note it."""
        self.asked += 1
        return super().depth()


class Bench:
    """A retry worker with a fake clock."""

    def __init__(self, rows: int = 10, kind: type[MemoryStore] = MemoryStore) -> None:
        self.clock = Clock()
        self.owner = Owner()
        self.store = kind(rows, clock=self.clock.monotonic)
        self.retry_worker = RetryWorker(
            self.store, Gate(10), Backoff(1.0, 10.0), 1.0, Fanout([]).emit
        )
        self.retry_worker.serve([self.owner], lambda: None)  # type: ignore[list-item]

    def keep(self, delivery: Delivery, attempts: int = 1, *, fresh: bool = False) -> None:
        """Have it stored."""
        self.order(delivery, attempts, fresh=fresh)
        self.work()

    def order(self, delivery: Delivery, attempts: int = 1, *, fresh: bool = False) -> None:
        """Order that it is stored."""
        delivery.attempts = attempts
        before, delivery.row = delivery.row, RowState.HELD
        self.retry_worker.defer(delivery, self.clock.now, before=before, fresh=fresh)

    def work(self) -> None:
        """Let the thread carry out its orders."""
        while self.retry_worker.thread._orders:
            self.retry_worker.thread._orders.popleft()()

    def wait_for(self, delivery: Delivery, limit: float = 20.0) -> float | None:
        """Sweep all the time, and say how long it took until it went out."""
        begun = self.clock.now
        while self.clock.now - begun < limit:
            self.retry_worker.sweep()
            if delivery in self.owner.readmitted:
                return self.clock.now - begun
            self.clock.now += STEP
        return None


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A retry worker on a fake clock."""
    bench = Bench()
    monkeypatch.setattr(module, "time", bench.clock)
    return bench


@pytest.mark.parametrize(("most", "asked"), [(10, 1), (1, 2)])
def test_rows_are_counted_once_for_orders_that_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, most: int, asked: int
) -> None:
    """The depth is known meanwhile too; but what is stored between two counts has a limit."""
    monkeypatch.setattr(store_writer, "MOST_UNCOUNTED", most)
    bench, second = Bench(kind=Counted), make_delivery()
    assert isinstance(bench.store, Counted)
    bench.store.meanwhile = partial(bench.order, second)
    bench.keep(make_delivery())
    assert bench.store.asked == asked
    assert bench.retry_worker.depth == Depth(waiting=2)
    assert not bench.retry_worker.thread._orders


def test_memory_takes_a_message_once() -> None:
    """One whose publisher has left may be ordered although it has a row, or is to get one."""
    bench, delivery = Bench(), make_delivery()
    delivery.stop_waiting(Fate())
    delivery.row = RowState.WRITING
    bench.keep(delivery)  # of a row that was refused, so this one makes its own
    assert delivery in bench.retry_worker.stored_rows.rowless
    for _ in range(2):
        delivery.row = RowState.NONE
        bench.keep(delivery)
        bench.retry_worker.sweep()
        assert bench.retry_worker.depth == Depth(1)


def test_memory_names_a_message_that_is_too_large_for_it() -> None:
    """It is not full then, and there would be no room however long its publisher waited."""
    entry = Entry(record_of(make_delivery(), 1.0), 0.0)
    size = entry.record.envelope.size
    with pytest.raises(BufferFullError, match=f"a message of {size} bytes is larger than"):
        MemoryStore(max_bytes=size - 1).put([entry], 0.0)
    store = MemoryStore(max_bytes=size)
    store.put([entry], 0.0)
    with pytest.raises(BufferFullError, match="is full"):
        store.put([entry], 0.0)


@pytest.mark.parametrize(
    ("attempts", "due"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (9, 10.0)]
)
def test_due(bench: Bench, attempts: int, due: float) -> None:
    """After an attempt 1, 2, 4 ... s, 10 at the most; at once where nothing was sent (I15)."""
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, attempts)
    assert bench.wait_for(delivery) == due


@pytest.mark.parametrize(("attempts", "due"), [(0, 0.0), (1, 0.5), (2, 1.0), (4, 3.0), (9, 3.0)])
def test_due_by_its_own_policy(bench: Bench, attempts: int, due: float) -> None:
    """A message with a policy of its own waits as that says."""
    delivery = make_delivery()
    delivery.policy = RetryPolicy(5, 0.5, 3.0)
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, attempts)
    assert bench.wait_for(delivery) == due


def test_not_due_while_its_tag_is_open(bench: Bench) -> None:
    """What may still be confirmed is not sent again, until its channel is lost (I11)."""
    delivery = make_delivery()
    delivery.attempt = AttemptState.IN_FLIGHT
    bench.keep(delivery)
    assert bench.wait_for(delivery) is None
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery)
    assert bench.wait_for(delivery) == 1.0


def test_a_letter_is_due_at_once_and_then_seldom(bench: Bench) -> None:
    """A dead letter that was not taken waits for the longest delay (102)."""
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    delivery.dead = True
    bench.keep(delivery, 4, fresh=True)
    assert bench.retry_worker.depth == Depth(0, 1)
    assert bench.wait_for(delivery) == 0.0
    bench.owner.readmitted.clear()
    bench.keep(delivery, 4)
    assert bench.wait_for(delivery) == 10.0
    bench.retry_worker.settle(delivery)
    bench.work()
    assert (bench.retry_worker.depth, bench.store.depth()) == (Depth(), Depth())


def test_what_the_store_refuses(bench: Bench) -> None:
    """It is held until the I/O thread has heard of it, is not put again, and leaves nothing."""
    bench.store._max_rows = 0
    delivery = make_delivery()
    delivery.attempt, delivery.dead = AttemptState.QUEUED, True
    bench.keep(delivery)
    assert bench.owner.refused == [delivery]
    bench.store._max_rows = 10
    bench.keep(delivery)
    assert bench.store.depth() == Depth()
    assert bench.retry_worker.stored_rows.deliveries() == []


class Failing(ClaimsAhead):
    """Stores, and fails after that in a way that no store should."""

    failures = 0

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store them; the answer may be lost."""
        claims = super().put(entries, patience)
        if self.failures:
            self.failures -= 1
            raise MemoryError
        return claims


@pytest.mark.parametrize("failures", [1, 2])
def test_a_put_of_which_nothing_is_known(failures: int) -> None:
    """It is made once more; a message that is given back then may be sent: its row may be there."""
    bench, delivery = Bench(kind=Failing), make_delivery()
    bench.store.failures = failures  # type: ignore[attr-defined]
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery)
    assert bench.owner.refused == ([delivery] if failures == 2 else [])
    assert bench.retry_worker.stored_rows.deliveries() == ([] if failures == 2 else [delivery])
    assert delivery.doubt is Doubt.POSSIBLE


@pytest.mark.parametrize("relied_on", [True, False])
def test_taken_while_it_is_stored_ahead(bench: Bench, relied_on: bool) -> None:
    """The I/O thread took it since its time was up; it is sent if its publisher relies on that."""
    delivery = make_delivery()
    bench.retry_worker.write_ahead(delivery)
    assert delivery.claim()
    if relied_on:
        delivery.stop_waiting(Fate())
    bench.work()
    assert bench.owner.readmitted == ([delivery] if relied_on else [])
    assert bench.store.depth() == Depth(ahead=int(relied_on))


def test_a_row_that_is_not_there_counts_for_none(bench: Bench) -> None:
    """What ends before it was stored is not subtracted from others."""
    delivery, other = make_delivery(), make_delivery()
    delivery.attempt = other.attempt = AttemptState.QUEUED
    bench.keep(other)
    delivery.row = RowState.HELD
    bench.retry_worker.settle(delivery)
    assert bench.retry_worker.depth == Depth(1)
    bench.work()
    assert bench.retry_worker.depth == Depth(1)


def test_no_sweep_after_the_store_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is due while the thread is told to end would open the store again."""
    done: list[str] = []
    monkeypatch.setattr(bench.store, "close", lambda: done.append("close"))
    monkeypatch.setattr(bench.store, "depth", lambda: done.append("depth") or Depth())
    bench.retry_worker.thread.due = 0.0
    bench.retry_worker.stop()
    bench.retry_worker.thread.run()
    assert done == ["close"]


class Divided(Delete):
    """An end whose count is read while another thread orders the end of another message."""

    meanwhile: Callable[[], None]

    @property
    def change(self) -> int:
        """Say by how much it changes the number, after the other thread has said so."""
        if not hasattr(self, "read"):
            self.read = True
            run_thread(self.meanwhile)
        return -1


def run_thread(target: Callable[[], None]) -> None:
    """Have something done on a thread of its own."""
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def test_orders_that_two_connections_give_at_once(bench: Bench) -> None:
    """Both count: a sum that both add to would keep one, and never be right again."""
    deliveries = one, other = make_delivery(), make_delivery()
    for delivery in deliveries:
        delivery.attempt = AttemptState.QUEUED
        bench.keep(delivery)
    assert bench.retry_worker.depth == Depth(2)
    end = Divided(one, dead=False, waited=True)
    end.meanwhile = partial(bench.retry_worker.settle, other)
    bench.retry_worker._store_writer.order(end)
    assert bench.retry_worker.depth == Depth()
    bench.work()
    assert bench.retry_worker.depth == bench.store.depth() == Depth()


def test_a_slot_is_free_before_a_sweep_may_take_it_again(bench: Bench) -> None:
    """What is due at once may be claimed as soon as the store is: it must not lose its new slot."""
    gate, seen = bench.retry_worker._gate, []

    class Watching(Gate):
        def leave(self, deliveries: Iterable[Delivery]) -> None:
            seen.append(bench.retry_worker._lock._is_owned())
            super().leave(deliveries)

    gate.__class__ = Watching
    delivery = make_delivery()
    assert gate.enter(delivery, 0.0)
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, 0)
    assert (seen, len(gate)) == ([True], 0)


def test_a_store_that_fails_before_it_looks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told whose messages it was given, also where it has not taken one."""

    def fail(_entries: object, _patience: float) -> list[Claim]:
        raise StoreError("locked")

    monkeypatch.setattr(bench.store, "put", fail)
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery)
    assert bench.owner.refused == [delivery]
    assert not bench.retry_worker.known


def test_the_window_is_whole_again(bench: Bench) -> None:
    """Once the backlog is gone, nothing is kept for it any more."""
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, 0)
    assert bench.wait_for(delivery) == 0.0
    assert bench.retry_worker._gate._reserved > 0
    bench.retry_worker.settle(delivery)
    bench.work()
    bench.retry_worker.sweep()
    assert bench.retry_worker._gate._reserved == 0


def test_a_row_counts_the_attempts_that_use_up_retries() -> None:
    """Another process does not take those by another message's fault for retries."""
    delivery = make_delivery("m")
    delivery.attempts, delivery.innocent = 9, 8
    assert record_of(delivery, 0.0).attempts == 1
    delivery.dead = True
    assert record_of(delivery, 0.0).attempts == 9


# --- claiming ahead ------------------------------------------------------------------------------


@pytest.fixture
def backlog(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A retry worker whose window has room for 10 of the 30 rows that another process left."""
    bench = Bench(30, ClaimsAhead)
    monkeypatch.setattr(module, "time", bench.clock)
    entries = [Entry(record_of(make_delivery(), 0.0), 0.0) for _ in range(30)]
    bench.store.put(entries, 1.0)
    return bench


def test_half_a_window_is_claimed_ahead(backlog: Bench) -> None:
    """It goes out when there is room, before anything else, and in the order of the rows."""
    assert isinstance(backlog.store, ClaimsAhead)
    sent = backlog.owner.readmitted
    for known, ahead in [(10, 5), (15, 5), (20, 5)]:
        backlog.retry_worker.sweep()
        assert (len(sent), len(backlog.store.ahead)) == (known, ahead)
        backlog.retry_worker._gate.leave(sent)
    keys = [backlog.retry_worker.stored_rows.claims[delivery].key for delivery in sent]
    assert keys == sorted(keys)


def test_what_was_claimed_ahead_waits_for_room(backlog: Bench) -> None:
    """No more of it is taken than can go out."""
    assert isinstance(backlog.store, ClaimsAhead)
    sent = backlog.owner.readmitted
    backlog.retry_worker.sweep()
    backlog.retry_worker._gate.leave(sent[:2])
    backlog.retry_worker.sweep()
    assert (len(sent), len(backlog.store.ahead)) == (12, 3)


def test_more_is_claimed_ahead_though_little_of_it_was_left(backlog: Bench) -> None:
    """What the store returned says whether there is a backlog, not what there was room for."""
    assert isinstance(backlog.store, ClaimsAhead)
    worker, sent = backlog.retry_worker, backlog.owner.readmitted
    worker.sweep()
    for left, known, ahead in [(slice(0, 4), 14, 1), (slice(4, 10), 15, 5)]:
        worker._gate.leave(sent[left])
        worker.sweep()
        assert (len(sent), len(backlog.store.ahead)) == (known, ahead)


def test_what_was_claimed_ahead_is_not_overtaken(backlog: Bench) -> None:
    """Neither by what is behind it, where a sweep finds the window full, nor where it is large."""
    worker, sent = backlog.retry_worker, backlog.owner.readmitted
    worker.sweep()
    worker.sweep()
    worker._gate.leave(sent[:2])
    worker._gate._bytes = MAX_BYTES  # those inside are large
    worker.sweep()
    assert len(sent) == 10
    while len(sent) < 30:
        worker._gate.leave(list(sent))
        worker.sweep()
    keys = [worker.stored_rows.claims[delivery].key for delivery in sent]
    assert keys == sorted(keys)


def test_what_was_claimed_ahead_is_given_back(backlog: Bench) -> None:
    """To others, where nothing can be sent here."""
    assert isinstance(backlog.store, ClaimsAhead)
    backlog.retry_worker.sweep()
    backlog.owner.able = 0
    backlog.retry_worker.sweep()
    assert backlog.store.ahead == ()
    assert len(backlog.store.claim(30)) == 20


@pytest.mark.parametrize(("waited", "begins"), [(LEASE / 4, 0.0), (LEASE / 2, LEASE / 2)])
def test_a_lease_begins_when_its_row_was_claimed(
    backlog: Bench, waited: float, begins: float
) -> None:
    """What was claimed ahead a third of a lease ago is claimed once more."""
    worker, sent, begun = backlog.retry_worker, backlog.owner.readmitted, backlog.clock.now
    worker.sweep()
    worker._gate.leave(sent)
    backlog.clock.now += waited
    worker.sweep()
    assert sent[10].leased_until == begun + begins + LEASE * SAFETY


def test_nothing_is_claimed_ahead_for_a_few(backlog: Bench) -> None:
    """Where less than a quarter of the window was due, there is no backlog."""
    assert isinstance(backlog.store, ClaimsAhead)
    backlog.store.claim(28)
    backlog.retry_worker.sweep()
    assert len(backlog.owner.readmitted) == 2
    assert backlog.store.ahead == ()


class Uncountable(MemoryStore):
    """A store with too many rows to be counted in time."""

    def depth(self) -> Depth:
        """Give up."""
        raise StoreError("it did not answer in time")


def test_a_store_that_cannot_be_counted_delivers() -> None:
    """A backlog that is too large to be counted would else be there for ever."""
    bench = Bench(kind=Uncountable)
    bench.retry_worker.asked = False
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, 0)
    bench.retry_worker.sweep()
    assert not bench.retry_worker.known
    bench.retry_worker.sweep()
    assert bench.owner.readmitted == [delivery]


def test_one_that_rests_claims_nothing() -> None:
    """What is due stays due, for another process."""
    bench = Bench()
    delivery = make_delivery()
    delivery.attempt = AttemptState.QUEUED
    bench.keep(delivery, 0)
    bench.retry_worker.rest()
    bench.work()
    assert bench.owner.readmitted == []
    assert len(bench.store.claim(10)) == 1


class CommitsMeanwhile(MemoryStore):
    """A store in which a row of an outbox is committed while another call claims rows."""

    durable = True

    def meanwhile(self, claim: Claim) -> None:
        """Tell whose row that is; a test replaces it."""

    def claim(self, limit: int) -> list[Row]:
        """Claim, and tell."""
        (claim,) = self.put([Entry(record_of(make_delivery(), 0.0), 0.0)], 1.0)
        self.meanwhile(claim)
        return super().claim(limit)


def test_a_row_that_is_committed_during_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its receipt's, though the row is claimed before the order to expect it is carried out.

    Otherwise the receipt would learn its fate from the store, a sweep later.
    """
    bench = Bench(10, CommitsMeanwhile)
    monkeypatch.setattr(module, "time", bench.clock)
    bench.store.put([Entry(record_of(make_delivery(), 0.0), 0.0)], 1.0)
    expected = make_delivery()
    follow = partial(bench.retry_worker.expect, expected)
    monkeypatch.setattr(bench.store, "meanwhile", follow)
    bench.retry_worker.sweep()
    assert expected in bench.owner.readmitted
    assert len(bench.owner.readmitted) == 2
