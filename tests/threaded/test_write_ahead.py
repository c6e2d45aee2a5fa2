"""A durable store behind the producer: what it has when, and what publishers hear of its faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlproducer import MLProducer, Outcome, Settings
from mlproducer.errors import (
    CircuitOpenError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    StoreError,
)
from mlproducer.stores import open_store
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Change, Claim, Entry, Record
from mlproducer.testing.fake_broker import Behaviour, FakeBroker
from tests.helpers import LIMIT, Background, make_envelope, make_message
from tests.stopwatch import in_time
from tests.threaded.brokers import Silent, ack, nack
from tests.threaded.conftest import CLOSE_TIMEOUT, QUICK, Serve


class Lasting(MemoryStore):
    """Passes for durable, since it outlives its producers; hangs and fails when it is told to."""

    durable = True
    lease = 30.0

    def __init__(self, *, write_ahead: bool = True) -> None:
        super().__init__()
        self.write_ahead = write_ahead
        self.broken = False
        self.may_write = threading.Event()
        self.may_write.set()
        self.deleted = 0

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store, once it may; what is not wanted any more by then is left out."""
        assert self.may_write.wait(LIMIT)
        if self.broken:
            raise StoreError("the store is broken")
        return super().put(entries, patience)

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note, unless it is broken."""
        if self.broken:
            raise StoreError("the store is broken")
        return super().release(changes)

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete, unless it is broken."""
        if self.broken:
            raise StoreError("the store is broken")
        self.deleted += len(claims)
        super().done(claims)


def produce(broker: FakeBroker | str, store: Lasting, **settings: Any) -> MLProducer:
    """Make a producer with a store."""
    url = broker if isinstance(broker, str) else broker.url
    return MLProducer(Settings(url=url, **{**QUICK, **settings}), store=store)


def rows(store: Lasting) -> int:
    """Count all rows, also those stored ahead."""
    return len(store._slots)


def test_stored_before_it_is_sent(serve: Serve) -> None:
    """The broker sees nothing that has no row; the row goes with the confirm."""
    broker, store = serve(Silent()), Lasting()
    with produce(broker, store) as producer:
        future = producer.submit(make_message("m"))
        [message] = broker.wait_for_messages(1, LIMIT)
        assert rows(store) == 1
        assert producer.status().retry_queue_size == 0
        ack(message)
        assert future.result(LIMIT).attempts == 1
        assert producer.flush(LIMIT) == 0
    assert rows(store) == 0


def test_many_ahead(serve: Serve) -> None:
    """publish_many goes the same way, and leaves nothing behind."""
    store = Lasting()
    with produce(serve(Behaviour()), store) as producer:
        results = producer.publish_many([make_message() for _ in range(3000)])
        assert all(result.confirmed for result in results)  # type: ignore[union-attr]
    assert (rows(store), store.deleted) == (0, 3000)


def test_the_store_refuses(serve: Serve) -> None:
    """What cannot be stored ahead is the publisher's, and is not sent."""
    broker, store = serve(Behaviour()), Lasting()
    store.broken = True
    with produce(broker, store) as producer:
        with pytest.raises(StoreError, match="the store is broken") as caught:
            producer.publish(make_message("m"))
        assert (caught.value.message_id, caught.value.possibly_sent) == ("m", False)
        with pytest.raises(StoreError, match="the store is broken"):
            producer.submit(make_message("n"))
        store.broken = False
        assert producer.publish(make_message("after")).confirmed
    assert [each.properties.message_id for each in broker.messages] == ["after"]


class OwnError(StoreError):
    """A store's own error, which takes other arguments than ours."""

    def __init__(self, row: int = 7) -> None:
        super().__init__(f"row {row} is damaged")


def test_a_store_with_errors_of_its_own(serve: Serve) -> None:
    """Publishers are told at once, and in our words: it is none of the documented errors."""

    class Damaged(Lasting):
        def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
            list(entries)
            raise OwnError

    with produce(serve(Behaviour()), Damaged()) as producer:
        for publish in (producer.publish, producer.submit):
            with pytest.raises(StoreError, match="row 7 is damaged") as caught:
                publish(make_message("m"))
            assert (type(caught.value), caught.value.message_id) == (StoreError, "m")


def test_a_store_that_hangs(serve: Serve) -> None:
    """The deadline holds; what the store does late leaves no row, and sends nothing."""
    broker, store = serve(Behaviour()), Lasting()
    with produce(broker, store) as producer:
        assert producer.publish(make_message("before")).confirmed
        store.may_write.clear()
        with in_time(0.55), pytest.raises(StoreError, match="not answered in time: memory"):
            producer.publish(make_message("m"), timeout=0.3)
        store.may_write.set()
        assert producer.publish(make_message("after")).confirmed
    assert [each.properties.message_id for each in broker.messages] == ["before", "after"]
    assert rows(store) == 0


def test_a_future_is_handed_out_once_it_is_stored(serve: Serve) -> None:
    """Not before, and not at all where the store does not answer in time."""
    broker, store = serve(Behaviour()), Lasting()
    with produce(broker, store, publish_timeout=1.0) as producer:
        assert producer.submit(make_message("before")).result(LIMIT).confirmed
        store.may_write.clear()
        with pytest.raises(StoreError, match="not answered in time"):
            producer.submit(make_message("m"))
        background = Background()
        waiting = background.call(producer.submit, make_message("n"))
        store.may_write.set()
        assert waiting.result(LIMIT).result(LIMIT).confirmed
    assert [each.properties.message_id for each in broker.messages] == ["before", "n"]
    assert rows(store) == 0


def test_a_wait_for_the_window_is_none_for_the_store(serve: Serve) -> None:
    """submit() may wait longer for the window than the store has time: that begins afterwards."""
    broker, store = serve(Silent()), Lasting()
    with produce(broker, store, max_in_flight=1, publish_timeout=0.5) as producer:
        producer.submit(make_message("first"))
        [first] = broker.wait_for_messages(1, LIMIT)
        background = Background()
        second = background.call(producer.submit, make_message("second"), timeout=LIMIT)
        with pytest.raises(TimeoutError):
            broker.wait_for_messages(2, 0.7)  # longer than publish_timeout
        ack(first)
        background.gather()
        ack(broker.wait_for_messages(2, LIMIT)[1])
        assert second.result(0).result(LIMIT).confirmed


def test_a_healthy_broker_does_not_need_the_store(serve: Serve) -> None:
    """Without write-ahead a store that is away is not noticed, until it is needed."""
    broker, store = serve(Silent()), Lasting(write_ahead=False)
    store.broken = True
    with produce(broker, store) as producer:
        background = Background()
        fine = background.call(producer.publish, make_message("fine"))
        ack(broker.wait_for_messages(1, LIMIT)[0])
        assert fine.result(LIMIT).confirmed
        needy = background.call(producer.publish, make_message("needy"))
        nack(broker.wait_for_messages(2, LIMIT)[1])
        error = needy.exception(LIMIT)
        assert isinstance(error, StoreError)
        assert (error.attempts, error.possibly_sent) == (1, True)
        store.broken = False


def test_no_broker_and_a_durable_store(serve: Serve) -> None:
    """Deferred at once and durably, breaker or not; another producer delivers it, oldest first."""
    store = Lasting(write_ahead=False)
    away = "amqp://guest:guest@127.0.0.1:1/"
    seldom = {"reconnect_initial_delay": 60.0, "reconnect_max_delay": 60.0}
    with produce(away, store, circuit_breaker_threshold=3, **seldom) as producer:
        reasons = set()
        opened = threading.Event()
        producer.on("circuit_opened", opened.set)
        deadline = time.monotonic() + LIMIT
        for number in range(8):
            while number == 4 and not opened.wait(0.05):
                assert time.monotonic() < deadline
                producer.reconnect()  # another attempt, which fails
            receipt = producer.publish(make_message(f"{number}"))
            assert (receipt.outcome, receipt.durable) == (Outcome.DEFERRED, True)
            reasons.add(type(receipt.reason))
        assert reasons == {NotConnectedError, CircuitOpenError}
        assert producer.status().retry_queue_size == 8
        report = producer.close(CLOSE_TIMEOUT)
        assert (report.stored, report.abandoned) == (8, ())
        with pytest.raises(TimeoutError):
            receipt.result(None)
    broker = serve(Behaviour())
    with produce(broker, store) as producer:
        producer.start()
        assert producer.flush(LIMIT) == 0
    ids = [each.properties.message_id for each in broker.messages]
    assert ids == [f"{number}" for number in range(8)]
    assert rows(store) == 0


def test_close_stores_what_is_left(serve: Serve) -> None:
    """In flight or waiting: it is stored, and its future is answered DEFERRED and durable."""
    broker, store = serve(Silent()), Lasting(write_ahead=False)
    producer = produce(broker, store)
    future = producer.submit(make_message("m"))
    given = producer.submit(make_message("given"), retry=False)
    broker.wait_for_messages(2, LIMIT)
    report = producer.close(0.1)
    assert (report.stored, report.abandoned) == (1, ("given",))
    receipt = future.result(0)
    assert (receipt.outcome, receipt.durable) == (Outcome.DEFERRED, True)
    assert isinstance(given.exception(0), ProducerClosedError)
    assert [slot.record.envelope.message_id for slot in store._slots.values()] == ["m"]


def test_given_back_once_its_row_is_gone(serve: Serve) -> None:
    """With retry=False the error comes after the deletion: nothing is sent later."""
    broker, store = serve(Silent()), Lasting()
    with produce(broker, store) as producer:
        background = Background()
        call = background.call(producer.publish, make_message("m"), retry=False)
        [message] = broker.wait_for_messages(1, LIMIT)
        assert rows(store) == 1
        nack(message)
        assert isinstance(call.exception(LIMIT), NackError)
        assert rows(store) == 0


def test_deletions_wait_for_the_store(serve: Serve) -> None:
    """A row that cannot be deleted is deleted later, and its message is not sent again."""
    broker, store = serve(Silent()), Lasting()
    with produce(broker, store) as producer:
        future = producer.submit(make_message("m"))
        [message] = broker.wait_for_messages(1, LIMIT)
        store.broken = True
        ack(message)
        assert future.result(LIMIT).confirmed
        store.broken = False
        assert producer.flush(LIMIT) == 0
    assert rows(store) == 0
    assert len(broker.messages) == 1


def test_flush_alone_delivers_what_another_process_left(serve: Serve, tmp_path: Path) -> None:
    """In a process that has published nothing, it starts the producer and waits for all rows."""
    broker = serve()
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with closing(open_store(Settings(store_url=url))) as store:
        names = [f"m{number}" for number in range(20)]
        store.put([Entry(Record(make_envelope(name)), 0.0) for name in names], LIMIT)
    with closing(MLProducer(Settings(url=broker.url, store_url=url, **QUICK))) as producer:
        assert producer.flush(LIMIT) == 0
        assert len(broker.messages) == len(names)
    with closing(open_store(Settings(store_url=url))) as store:
        assert store.depth().total == 0
    assert MLProducer(Settings(url=broker.url)).flush(LIMIT) == 0  # nothing to start for
