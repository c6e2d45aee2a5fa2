"""The moments at which a message changes hands: the store is slow, fails, or loses what it held.

Returning means that the message is ours, raising that it is the publisher's, also where the store
answers after the deadline, or the I/O thread is held up.

Runs on: pytest's main thread, the producers' threads.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlproducer import MLProducer, Outcome, Settings
from mlproducer._engine import io_thread
from mlproducer.errors import (
    ConfirmTimeoutError,
    NotConnectedError,
    PublishError,
    RetriesExhaustedError,
    StoreError,
)
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, Background, make_message
from tests.threaded.brokers import Silent, ack, nack
from tests.threaded.conftest import QUICK, Connect, Serve


class Odd(MemoryStore):
    """Passes for durable, and does what a test has put in its way.

    :ivar before: is called with each put's entries, before they are stored
    :ivar stored: is called after each put that has stored something
    :ivar ending: is called before each deletion
    :ivar failing: calls that fail, once each
    :ivar failed: is set once one has
    :ivar elsewhere: how rows ended that another process has deleted, by key
    """

    durable = True
    name = "odd"

    def __init__(self, *, ahead: bool = False, lease: float = 30.0) -> None:
        super().__init__()
        self.write_ahead = ahead
        self.lease = lease
        self.before: Callable[[list[Entry]], object] = len
        self.stored: Callable[[], object] = lambda: None
        self.claimed: Callable[[], object] = lambda: None
        self.ending: Callable[[], object] = lambda: None
        self.failing: set[str] = set()
        self.failed = threading.Event()
        self.elsewhere: dict[int, RowFate] = {}

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store, and let the test know."""
        new = list(entries)
        if new:
            self.before(new)
        claims = super().put(new, patience)
        if new:
            self.stored()
        return claims

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete, once the test lets it."""
        self.ending()
        super().done(claims)

    def depth(self) -> Depth:
        """Count, or fail."""
        self._fail("depth")
        return super().depth()

    def claim(self, limit: int) -> list[Row]:
        """Claim, and let the test know."""
        rows = super().claim(limit)
        if rows:
            self.claimed()
        return rows

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note, or fail."""
        self._fail("release")
        return super().release(changes)

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Say what became of rows, also in another process."""
        fates = super().trace(claims)
        return [
            self.elsewhere.get(claim.key, fate) for claim, fate in zip(claims, fates, strict=True)
        ]

    def empty(self) -> None:
        """Lose everything."""
        self._slots.clear()
        self._bytes = self._dead = self._ahead = 0

    def take_over(self) -> list[int]:
        """Have another process claim everything."""
        for slot in self._slots.values():
            slot.token, slot.due = slot.token + 1, None
        return list(self._slots)

    def deliver_elsewhere(self, keys: Iterable[int], fate: RowFate) -> None:
        """Have the other process come to an end with rows."""
        for key in keys:
            self.elsewhere[key] = fate
            self._count(self._slots.pop(key), -1)

    def _fail(self, call: str) -> None:
        if call in self.failing:
            self.failing.remove(call)
            self.failed.set()
            raise StoreError(f"{call} failed")


@pytest.fixture
def hurried_store(no_hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the limit within which a store has to speak; the I/O thread has the time it needs."""
    monkeypatch.setattr(io_thread, "STORE_LIMIT", 0.1)


def produce(broker: FakeBroker, store: Odd, **settings: Any) -> MLProducer:
    """Make a producer with a store."""
    return MLProducer(Settings(url=broker.url, **{**QUICK, **settings}), store=store)


def ids(broker: FakeBroker) -> list[str | None]:
    """Return what the broker has got, in order."""
    return [each.properties.message_id for each in broker.messages]


@contextmanager
def away(broker: FakeBroker) -> Iterator[None]:
    """Let no attempt connect for a while."""
    broker.stop_listening()
    yield
    broker.listen_again()


# --- the store answers, and then fails ---------------------------------------------------------


def test_stored_though_it_cannot_be_counted(serve: Serve) -> None:
    """A count that fails after the put changes nothing of what was stored."""
    broker, store = serve(), Odd()
    store.stored = lambda: store.failing.add("depth")
    with produce(broker, store) as producer:
        with away(broker):
            receipt = producer.publish(make_message("m"))
        assert (receipt.outcome, receipt.durable) == (Outcome.DEFERRED, True)
        assert receipt.result(LIMIT).confirmed
    assert ids(broker) == ["m"]


@pytest.mark.usefixtures("hurried_store")
def test_a_put_that_is_answered_too_late(serve: Serve) -> None:
    """What was raised because of it leaves no row, and is not sent when the broker is back.

    It leaves a doubt where the store has read it: another process may have it by then.
    """
    broker, store = serve(), Odd()
    told = threading.Event()
    store.before = lambda _entries: told.wait(LIMIT)
    with produce(broker, store) as producer:
        with away(broker):
            for name, possibly_sent in (("m", True), ("behind", False)):
                with pytest.raises(StoreError, match="not answered in time") as caught:
                    producer.publish(make_message(name), timeout=0.2)
                assert caught.value.possibly_sent is possibly_sent
            gc.collect()
            store.before = len
            told.set()
            assert not producer.publish(make_message("after")).confirmed
        assert producer.flush(LIMIT) == 0
    assert ids(broker) == ["after"]
    assert not store._slots


@pytest.mark.usefixtures("hurried_store")
def test_a_row_that_another_process_claims_before_this_one_hears_of_it(serve: Serve) -> None:
    """It is stored, claimed and delivered, and only then its publisher would be told."""
    broker, store = serve(), Odd()
    told = threading.Event()

    def deliver() -> None:
        store.deliver_elsewhere(store.take_over(), RowFate.CONFIRMED)
        assert told.wait(LIMIT)

    store.stored = deliver
    with produce(broker, store) as producer, away(broker):
        with pytest.raises(StoreError, match="not answered in time") as caught:
            producer.publish(make_message("m"), timeout=0.2)
        assert caught.value.possibly_sent
        store.stored = lambda: None
        told.set()


def test_a_put_that_failed_leaves_no_doubt(serve: Serve) -> None:
    """The store has read it, and has said that it is not stored."""
    broker, store = serve(), Odd()

    def fail(_entries: list[Entry]) -> None:
        raise StoreError("the disk is full")

    store.before = fail
    with produce(broker, store) as producer, away(broker):
        with pytest.raises(StoreError, match="the disk is full") as caught:
            producer.publish(make_message("m"), timeout=0.2)
        assert not caught.value.possibly_sent


def test_what_another_process_has_is_not_given_back_as_never_sent(serve: Serve) -> None:
    """The lease was over before the row was withdrawn, and so the other one sends the message."""
    broker, store = serve(), Odd(ahead=True)
    store.stored = store.take_over
    with produce(broker, store) as producer, away(broker):
        with pytest.raises(NotConnectedError) as caught:
            producer.publish(make_message("m"), retry=False)
        assert (caught.value.attempts, caught.value.possibly_sent) == (0, True)


@pytest.mark.parametrize("fate", [RowFate.CONFIRMED, RowFate.DEAD_LETTERED])
def test_what_another_process_has_ended_is_not_given_back(serve: Serve, fate: RowFate) -> None:
    """Its publisher is told how it ended."""
    broker, store = serve(), Odd(ahead=True)
    store.stored = lambda: store.deliver_elsewhere(store.take_over(), fate)
    with produce(broker, store) as producer, away(broker):
        if fate is RowFate.CONFIRMED:
            assert producer.publish(make_message("m"), retry=False).confirmed
        else:
            with pytest.raises(RetriesExhaustedError):
                producer.publish(make_message("m"), retry=False)


@pytest.mark.usefixtures("hurried_store")
def test_a_deletion_that_is_not_answered_leaves_a_doubt(serve: Serve) -> None:
    """What is still in the store when it is given back is sent by others, if the lease runs out."""
    broker, store = serve(), Odd(ahead=True)
    told = threading.Event()
    store.ending = partial(told.wait, LIMIT)
    with produce(broker, store) as producer:
        with away(broker):
            with pytest.raises(NotConnectedError) as caught:
                producer.publish(make_message("m"), timeout=1.0, retry=False)
            assert (caught.value.attempts, caught.value.possibly_sent) == (0, True)
            told.set()
        assert producer.publish(make_message("after")).result(LIMIT).confirmed
    assert ids(broker) == ["after"]
    assert not store._slots


def test_submit_and_a_put_that_takes_as_long_as_it_may(serve: Serve) -> None:
    """Whether it raises or gives a future, that is what comes of the message."""
    broker, store = serve(), Odd(ahead=True)
    limit, futures, refused = 0.02, {}, {}
    offsets = iter(range(10_000))

    def take_about_that_long(_entries: list[Entry]) -> None:
        end = time.monotonic() + limit - 0.001 + next(offsets) % 40 * 0.0003
        while time.monotonic() < end:
            pass

    with produce(broker, store, publish_timeout=limit) as producer:
        assert producer.wait_connected(LIMIT)
        store.before = take_about_that_long
        for number in range(60):
            try:
                futures[f"{number}"] = producer.submit(make_message(f"{number}"))
            except StoreError as error:
                refused[f"{number}"] = error
        assert all(each.result(LIMIT).confirmed for each in futures.values())
        assert producer.flush(LIMIT) == 0
    assert refused, "none was late"
    assert set(ids(broker)) == set(futures)
    assert not store._slots


def test_a_put_that_fails_after_the_deadline(serve: Serve) -> None:
    """Written ahead, nothing is promised before the row is there (and nothing is sent)."""
    broker, store = serve(), Odd(ahead=True)
    told = threading.Event()

    def fail_late(_entries: list[Entry]) -> None:
        assert told.wait(LIMIT)
        raise StoreError("the disk is full")

    with produce(broker, store) as producer:
        assert producer.wait_connected(LIMIT)
        store.before = fail_late
        with pytest.raises(StoreError) as caught:
            producer.publish(make_message("m"), timeout=0.2)
        assert not caught.value.possibly_sent
        told.set()
        store.before = len
        assert producer.publish(make_message("after")).confirmed
    assert ids(broker) == ["after"]


def test_a_release_that_fails(serve: Serve) -> None:
    """What was claimed in that sweep is sent; what found no room waits, and is sent later."""
    silent = Silent()
    broker, store = serve(silent), Odd()
    producer = produce(broker, store, max_in_flight=4, publish_timeout=0.3)

    def fill() -> None:
        store.claimed = lambda: None
        store.failing.add("release")
        background = Background()
        for number in range(3):  # the fourth slot is one of those that retries have
            background.call(producer.submit, make_message(f"filler{number}")).result(LIMIT)

    with producer:
        with away(broker):
            receipts = [producer.publish(make_message(f"stored{number}")) for number in range(4)]
            store.claimed = fill
        assert store.failed.wait(LIMIT)  # a confirm before that makes room
        for number in range(7):
            ack(broker.wait_for_messages(number + 1, LIMIT)[number])
        assert all(receipt.result(LIMIT).confirmed for receipt in receipts)
        assert producer.flush(LIMIT) == 0


# --- a claim that is lost ----------------------------------------------------------------------


@contextmanager
def waiting_ahead(serve: Serve, count: int = 3) -> Iterator[tuple[Any, ...]]:
    """Have messages wait, written ahead, for a broker that blocks."""
    broker, store = serve(), Odd(ahead=True, lease=0.6)
    with produce(broker, store, publish_timeout=LIMIT) as producer:
        blocked = threading.Event()
        producer.on("blocked", blocked.set)
        assert producer.publish(make_message("first")).confirmed
        broker.connections[0].block()
        assert blocked.wait(LIMIT)
        futures = [producer.submit(make_message(f"{number}")) for number in range(count)]
        background = Background()
        call = background.call(producer.publish, make_message("called"))
        deadline = time.monotonic() + LIMIT
        while len(store._slots) < count + 1 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        yield broker, store, producer, futures, call


def test_rows_that_are_gone(serve: Serve) -> None:
    """A store that starts over empty loses nothing of which a copy is here."""
    with waiting_ahead(serve) as (broker, store, producer, futures, call):
        store.empty()
        deadline = time.monotonic() + LIMIT
        while len(store._slots) < 4 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert len(store._slots) == 4, "they are put again from memory"
        broker.connections[0].unblock()
        assert all(future.result(LIMIT).confirmed for future in futures)
        assert call.result(LIMIT).result(LIMIT).confirmed
        assert producer.flush(LIMIT) == 0
    assert sorted(filter(None, ids(broker))) == ["0", "1", "2", "called", "first"]


@pytest.mark.parametrize("fate", [RowFate.CONFIRMED, RowFate.DEAD_LETTERED])
def test_rows_that_another_process_has_taken_over(serve: Serve, fate: RowFate) -> None:
    """They are not sent here; a call says at once that they are safe, and their fate is learned."""
    with waiting_ahead(serve) as (broker, store, producer, futures, call):
        keys = store.take_over()
        receipt = call.result(LIMIT)
        assert (receipt.outcome, receipt.durable) == (Outcome.DEFERRED, True)
        broker.connections[0].unblock()
        assert not any(future.done() for future in futures)
        store.deliver_elsewhere(keys, fate)
        for each in (*futures, receipt):
            if fate is RowFate.CONFIRMED:
                assert each.result(LIMIT).confirmed
            else:
                with pytest.raises(PublishError):
                    each.result(LIMIT)
        assert producer.flush(LIMIT) == 0
    assert ids(broker) == ["first"]


def test_close_knows_what_another_process_has(serve: Serve) -> None:
    """Every future is done after close(): what is in the store is DEFERRED and durable."""
    with waiting_ahead(serve) as (_broker, store, producer, futures, call):
        store.take_over()
        assert not call.result(LIMIT).confirmed
        report = producer.close(0.2)
        assert report.abandoned == ()
        assert [future.result(0).durable for future in futures] == [True] * 3


def test_a_row_that_vanished_may_have_been_claimed_before(serve: Serve) -> None:
    """Its publisher gets the message back with the doubt that another process delivers it."""
    broker, store = serve(), Odd()
    with produce(broker, store) as producer, away(broker):
        receipt = producer.publish(make_message("m"))
        assert receipt.outcome is Outcome.DEFERRED
        store.take_over()
        store.empty()
        with pytest.raises(StoreError, match="by no doing of ours") as caught:
            receipt.result(LIMIT)
        assert (caught.value.attempts, caught.value.possibly_sent) == (0, True)


def test_a_row_that_vanished_while_it_waited(serve: Serve) -> None:
    """Only the store held it: its receipt says that it is lost."""
    broker, store = serve(), Odd()
    with produce(broker, store) as producer:
        broker.stop_listening()
        receipt = producer.publish(make_message("m"))
        assert receipt.durable
        store.empty()
        with pytest.raises(StoreError, match="gone from the store"):
            receipt.result(LIMIT)
        assert producer.flush(LIMIT) == 0


def test_retry_false_is_never_deferred(serve: Serve) -> None:
    """Also where its lease ended while the broker blocked: it is raised, and not sent."""
    broker, store = serve(), Odd(ahead=True, lease=0.3)
    with produce(broker, store) as producer:
        blocked = threading.Event()
        producer.on("blocked", blocked.set)
        assert producer.publish(make_message("first")).confirmed
        broker.connections[0].block()
        assert blocked.wait(LIMIT)
        background = Background()
        call = background.call(producer.publish, make_message("m"), timeout=LIMIT, retry=False)
        deadline = time.monotonic() + LIMIT
        while not store._slots and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        renewed, frozen = store.renew, threading.Event()

        def freeze(claims: Sequence[Claim]) -> list[Claim]:
            assert frozen.wait(LIMIT)
            return renewed(claims)

        store.renew = freeze  # type: ignore[method-assign]
        threading.Event().wait(0.5)  # past the lease, which is what is waited for
        broker.connections[0].unblock()
        threading.Event().wait(0.1)
        frozen.set()
        assert isinstance(call.exception(LIMIT), StoreError)
        assert producer.flush(LIMIT) == 0
    assert ids(broker) == ["first"]


# --- the I/O thread is held up -----------------------------------------------------------------


class Slow(logging.Handler):
    """Holds up the thread that logs a line that begins with a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word
        self.held, self.free = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Hold it up until it is let go."""
        if record.getMessage().startswith(self.word):
            self.held.set()
            self.free.wait(LIMIT)


@pytest.fixture
def slow() -> Iterator[Slow]:
    """Hold up the I/O thread when the broker blocks."""
    logger, handler = logging.getLogger("mlproducer"), Slow("blocked")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    handler.free.set()
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.hurry
def test_what_was_raised_is_not_written_afterwards(serve: Serve, slow: Slow) -> None:
    """A publisher that gives up takes its message back first; it is counted as given back."""
    broker, registry = serve(), CollectorRegistry()
    producer = MLProducer(Settings(url=broker.url, **QUICK), registry=registry)
    with producer:
        assert producer.publish(make_message("first")).confirmed
        broker.connections[0].block(keep_reading=True)
        assert slow.held.wait(LIMIT)
        for retry in (True, False):
            with pytest.raises(ConfirmTimeoutError) as caught:
                producer.publish(make_message("m"), timeout=0.05, retry=retry)
            assert (caught.value.attempts, caught.value.possibly_sent) == (0, False)
        slow.free.set()
        broker.connections[0].unblock()
        assert producer.flush(LIMIT) == 0
        labels = {"task_type": "raw", "status": "rejected"}
        assert registry.get_sample_value("ml_producer_tasks_sent_total", labels) == 2
    assert ids(broker) == ["first"]


# --- what is counted ---------------------------------------------------------------------------


def test_flush_and_a_store_that_cannot_be_read(serve: Serve) -> None:
    """What is unknown is not nothing: it is waited for, and at least one is left."""
    broker, store = serve(), Odd()
    with produce(broker, store) as producer:
        for _ in range(2):
            store.depth = _refuse  # type: ignore[method-assign]
            assert producer.publish(make_message()).confirmed
            assert producer.flush(0.2) >= 1
        del store.depth
        assert producer.flush(LIMIT) == 0


def _refuse() -> Depth:
    raise StoreError("it cannot be read")


def test_a_confirm_that_overtakes_the_put(serve: Serve) -> None:
    """A row that is not there yet is not subtracted from those that are."""

    class Late(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            if message.properties.message_id == "waits":
                connection.nack(channel, tag)

    broker, store = serve(Late()), Odd()
    seen = set()
    delays = {"message_retry_base_delay": 8.0, "message_retry_max_delay": 8.0}
    with produce(broker, store, **delays) as producer:
        assert not producer.publish(make_message("waits")).confirmed

        def confirm_first(_entries: list[Entry]) -> None:
            message = broker.wait_for_messages(2, LIMIT)[1]
            ack(message)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                seen.add(producer.status().retry_queue_size)

        store.before = confirm_first
        assert producer.publish(make_message("late"), timeout=0.1).confirmed
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            seen.add(producer.status().retry_queue_size)
        assert 0 not in seen
        assert producer.status().retry_queue_size == 1
        producer.close(0.0)


def test_flush_waits_for_other_processes_too(connect: Connect, serve: Serve, tmp_path: Any) -> None:
    """It speaks of the whole store: also of rows that another one wrote, and holds."""
    url = f"sqlite:///{tmp_path}/s.db?write_ahead=1"
    broker = serve(Silent())
    other, mine = connect(broker, store_url=url), connect(serve(), store_url=url)
    future = other.submit(make_message("m"))
    [message] = broker.wait_for_messages(1, LIMIT)
    assert mine.publish(make_message()).confirmed
    assert mine.flush(0.2) == 1
    assert mine.status().retry_queue_size == 0  # it is in flight, in a living process
    ack(message)
    assert future.result(LIMIT).confirmed
    assert mine.flush(LIMIT) == 0


def test_a_nack_while_the_row_is_gone(serve: Serve) -> None:
    """A retry that is to be noted in a row that the store has lost makes a new one."""
    broker, store = serve(Silent()), Odd(ahead=True, lease=LIMIT)
    with produce(broker, store) as producer:
        future = producer.submit(make_message("m"))
        [first] = broker.wait_for_messages(1, LIMIT)
        store.empty()
        nack(first)
        ack(broker.wait_for_messages(2, LIMIT)[1])
        assert future.result(LIMIT).attempts == 2
        assert producer.flush(LIMIT) == 0
    assert not store._slots
