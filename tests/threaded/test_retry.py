"""Retries: when they come, what they count, and what happens after the last."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlproducer import MLProducer, Outcome, RetryPolicy, Settings
from mlproducer._core.backoff import Backoff
from mlproducer.errors import (
    BrokerBlockedError,
    ConfigurationError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    RetriesExhaustedError,
    UnroutableError,
)
from mlproducer.stores.protocol import Entry, Record
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.testing.fake_broker import (
    Behaviour,
    FakeBroker,
    FakeConnection,
    ReceivedMessage,
)
from tests.helpers import LIMIT, Background, make_envelope, make_message
from tests.stopwatch import in_time
from tests.threaded.brokers import ack
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import LETTERS, Happenings, Moody, events_of, gaps, io_of

BASE, SWEEP = 0.1, 0.01
RETRIES: dict[str, Any] = {
    "max_message_retries": 3,
    "message_retry_base_delay": BASE,
    "message_retry_max_delay": 0.3,
    "retry_sweep_interval": SWEEP,
}
"""The documented retries, ten times as fast, and a cap that is reached."""

LATE = 1.0
"""Seconds by which a loaded machine may be late."""


def cut_off(producer: MLProducer, broker: FakeBroker) -> None:
    """Lose the connection, and let no other be made."""
    gone = events_of(producer, "disconnected")
    broker.stop_listening()
    broker.connections[0].reset()
    gone.wait_for("disconnected")


class FirstIsRefused(Behaviour):
    """Nacks the first message that comes, and confirms all others after a millisecond."""

    refused = False

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Nack, or confirm."""
        if self.refused:
            connection.later(0.001, connection.ack, channel, tag)
        else:
            self.refused = True
            connection.nack(channel, tag)


# --- the schedule ------------------------------------------------------------------------------


def test_the_schedule(connect: Connect, serve: Serve) -> None:
    """1, 2, 4 ... times the base, up to the cap; never early, and late by a sweep at most (I15)."""
    mood = Moody("nack")
    producer = connect(serve(mood), **{**RETRIES, "max_message_retries": 4})
    with pytest.raises(RetriesExhaustedError):
        producer.publish(make_message("m")).result(LIMIT)
    *attempts, letter = mood.times("m")
    assert len(attempts) == 5
    for wait, due in zip(gaps(attempts), [BASE, 2 * BASE, 0.3, 0.3], strict=True):
        assert due <= wait < due + SWEEP + LATE
    assert letter - attempts[-1] < LATE


def test_the_documented_schedule() -> None:
    """Without settings of one's own: 1, 2, 4 s, capped at 10, a sweep each second, 3 retries."""
    settings = Settings()
    backoff = Backoff(settings.message_retry_base_delay, settings.message_retry_max_delay)
    assert [backoff.delay(failures) for failures in range(5)] == [1.0, 2.0, 4.0, 8.0, 10.0]
    assert (settings.retry_sweep_interval, settings.max_message_retries) == (1.0, 3)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_a_window_that_is_always_full(connect: Connect, serve: Serve, window: int) -> None:
    """A retry has its turn although publishers take each slot as soon as it is free."""
    broker, stop = serve(FirstIsRefused()), threading.Event()
    producer = connect(broker, **RETRIES, max_in_flight=window)
    assert producer.wait_connected(LIMIT)
    receipt = producer.publish(make_message("m"))

    def publish_on() -> bool:
        answers = []
        while not stop.is_set():
            answers.append(producer.publish(make_message()).confirmed)
        return all(answers)

    publishers = Background()
    for _ in range(2 * window + 2):
        publishers.call(publish_on)
    try:
        assert isinstance(receipt.reason, NackError)  # its outcome may be the retry's by now
        assert receipt.result(LIMIT).attempts == 2
        broker.wait_for_messages(len(broker.messages) + 10 * window, LIMIT)
    finally:
        stop.set()
        assert all(publishers.gather())


def test_no_retries(connect: Connect, serve: Serve) -> None:
    """With none allowed the first failure is the last, and the message a dead letter at once."""
    mood = Moody("nack")
    producer = connect(serve(mood), **{**RETRIES, "max_message_retries": 0})
    receipt = producer.publish(make_message("m"))
    assert receipt.outcome is Outcome.DEFERRED
    with pytest.raises(RetriesExhaustedError) as caught:
        receipt.result(LIMIT)
    assert caught.value.attempts == 1
    assert [each.exchange == LETTERS for _, each in mood.heard] == [False, True]


def ways(producer: MLProducer, policy: Any) -> list[Any]:
    """Publish in each way that takes a policy; return what has their fates."""
    return [
        producer.publish(make_message("a"), retry=policy),
        producer.submit(make_message("b"), retry=policy),
        producer.publish_many([make_message("c")], retry=policy)[0],
        asyncio.run(producer.apublish(make_message("d"), retry=policy)),
    ]


def test_a_policy_of_ones_own(connect: Connect, serve: Serve) -> None:
    """One message may be tried more often, and sooner, than the settings say."""
    mood = Moody("nack")
    producer = connect(serve(mood), **{**RETRIES, "max_message_retries": 0})
    for fate in ways(producer, RetryPolicy(2, 0.05, 0.05)):
        with pytest.raises(RetriesExhaustedError) as caught:
            fate.result(LIMIT)
        assert caught.value.attempts == 3


def test_a_policy_outlives_its_process(serve: Serve, tmp_path: Path) -> None:
    """It is in the row: a process that takes the message over tries it as often."""
    broker = serve()
    broker.stop_listening()
    store = {"store_url": f"sqlite:///{tmp_path}/store.db", "store_lease": 5.0}
    settings = Settings(url=broker.url, **{**QUICK, **RETRIES, **store})
    with MLProducer(settings) as producer:
        receipt = producer.publish(make_message("m"), timeout=0.1, retry=RetryPolicy(6, 0.01, 0.02))
        assert receipt.outcome is Outcome.DEFERRED
        producer.close(0.1)
    mood = Moody("nack")
    other = Settings(url=serve(mood).url, **{**QUICK, **RETRIES, **store})
    with MLProducer(other) as producer:
        letters = events_of(producer, "dead_lettered")
        producer.start()
        letters.wait_for("dead_lettered")
    assert [each.exchange for _, each in mood.heard].count(LETTERS) == 1
    assert len(mood.times("m")) == 7 + 1


@pytest.mark.parametrize("retry", [None, 3, "yes", RetryPolicy(1, 1.0, 60.0)])
def test_a_policy_that_cannot_be_kept(serve: Serve, tmp_path: Path, retry: Any) -> None:
    """What is no policy is refused, and so is one that waits longer than the store can."""
    url = f"sqlite:///{tmp_path}/store.db"
    with MLProducer(Settings(url=serve().url, store_url=url)) as producer:
        with pytest.raises(ConfigurationError):
            producer.publish(make_message(), retry=retry)
        assert producer.publish(make_message(), retry=RetryPolicy(1, 1.0, 30.0)).confirmed


# --- what counts as an attempt -----------------------------------------------------------------


def test_no_attempt_while_disconnected(connect: Connect, serve: Serve) -> None:
    """However long it lasts; and then the sweep comes with the connection, oldest first."""
    mood = Moody()
    broker = serve(mood)
    producer = connect(broker, **{**RETRIES, "max_message_retries": 0}, reconnect_max_delay=0.05)
    assert producer.publish(make_message()).confirmed
    cut_off(producer, broker)
    receipts = [producer.publish(make_message(f"{number}")) for number in range(20)]
    for receipt in receipts:
        assert isinstance(receipt.reason, NotConnectedError)
        assert receipt.attempts == 0
    swept = sweeps_of(producer)
    swept.wait_until(lambda: len(swept.seen) >= 20)
    assert producer.status().retry_queue_size == 20
    broker.listen_again()
    assert [receipt.result(LIMIT).attempts for receipt in receipts] == [1] * 20
    assert mood.ids()[1:] == [f"{number}" for number in range(20)]


def test_the_sweep_comes_with_the_connection(connect: Connect, serve: Serve) -> None:
    """It does not wait for the next second."""
    mood = Moody()
    broker = serve(mood)
    producer = connect(broker, retry_sweep_interval=60.0)
    assert producer.publish(make_message()).confirmed
    cut_off(producer, broker)
    receipt = producer.publish(make_message("m"))
    back = events_of(producer, "connected")
    broker.listen_again()
    back.wait_for("connected")
    with in_time(LATE):
        assert receipt.result(LIMIT).confirmed


def test_no_attempt_while_blocked(connect: Connect, serve: Serve) -> None:
    """What waits for the end of the alarm uses up nothing, and goes out when it ends."""
    mood = Moody()
    broker = serve(mood)
    producer = connect(broker, **{**RETRIES, "max_message_retries": 0})
    flow = events_of(producer, "blocked")
    assert producer.publish(make_message()).confirmed
    broker.connections[0].block(keep_reading=True)
    flow.wait_for("blocked")
    receipt = producer.publish(make_message("m"), timeout=0.02)
    assert isinstance(receipt.reason, BrokerBlockedError)
    swept = sweeps_of(producer)
    swept.wait_until(lambda: len(swept.seen) >= 20)
    assert mood.times("m") == []
    broker.connections[0].unblock()
    assert receipt.result(LIMIT).attempts == 1


def test_no_attempt_while_the_breaker_is_open(connect: Connect, serve: Serve) -> None:
    """Sweeps that the breaker refuses cost nothing."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(
        broker,
        **{**RETRIES, "max_message_retries": 1, "message_retry_base_delay": 0.001},
        circuit_breaker_threshold=1,
        circuit_breaker_cooldown=0.4,
    )
    receipt = producer.publish(make_message("m"))
    mood.mood = "ack"
    swept = sweeps_of(producer)
    swept.wait_until(lambda: len(swept.seen) >= 10)
    assert len(mood.times("m")) == 1
    assert receipt.result(LIMIT).attempts == 2


# --- dead letters ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["publish", "submit"])
def test_after_the_last_retry(connect: Connect, serve: Serve, way: str) -> None:
    """A dead letter with the documented headers, and an error with reason and attempts."""
    mood = Moody("return")
    broker = serve(mood)
    producer = connect(broker, **{**RETRIES, "message_retry_base_delay": 0.01})
    events = events_of(producer, "dead_lettered", "deferred", "confirmed")
    if way == "publish":
        result = producer.publish(make_message("m", body=b"precious")).result
    else:
        result = producer.submit(make_message("m", body=b"precious")).result
    with pytest.raises(RetriesExhaustedError) as caught:
        result(LIMIT)
    error = caught.value
    assert isinstance(error, RetriesExhaustedError)
    assert (error.message_id, error.attempts) == ("m", 4)
    assert isinstance(error.reason, UnroutableError)
    assert error.reason.reply_code == 312
    events.wait_until(lambda: "dead_lettered" in events.seen)
    check_letter(mood.heard[-1][1])
    assert mood.ids() == ["m"] * 5
    assert producer.flush(LIMIT) == 0
    status = producer.status()
    assert (status.dead_letters, status.retry_queue_size) == (0, 0)


def check_letter(letter: ReceivedMessage) -> None:
    """Check what is documented of a dead letter."""
    headers = dict(letter.properties.headers)
    assert (letter.exchange, letter.routing_key, letter.body) == (LETTERS, "k", b"precious")
    assert letter.mandatory
    assert letter.properties.delivery_mode == 2
    assert headers.pop("x-death-reason").startswith("UnroutableError")
    assert headers.pop("x-first-failed-at").endswith("+00:00")
    assert headers == {
        "x-attempts": 4,
        "x-original-exchange": "bookmarkai.ml",
        "x-original-routing-key": "k",
    }


@pytest.mark.parametrize("fate", ["nack", "return", "close", "silent"])
def test_a_letter_that_cannot_be_delivered(connect: Connect, serve: Serve, fate: str) -> None:
    """It stays in the store as dead, is never a letter of a letter, and is tried again (102)."""
    mood = Moody("nack", letters=fate)
    broker = serve(mood)
    producer = connect(
        broker,
        **{**RETRIES, "max_message_retries": 0, "message_retry_max_delay": 0.05},
        confirm_give_up=0.1,
    )
    receipt = producer.publish(make_message("m"))
    broker.wait_for_messages(3, LIMIT)
    status = producer.status()
    assert (status.dead_letters, status.retry_queue_size) == (1, 0)
    with pytest.raises(TimeoutError):
        receipt.result(0)
    mood.letters = "ack"
    with pytest.raises(RetriesExhaustedError) as caught:
        receipt.result(LIMIT)
    assert caught.value.attempts == 1
    assert producer.status().dead_letters == 0
    assert all(each.exchange == LETTERS for _, each in mood.heard[1:])
    assert all(len(each.properties.headers) == 5 for _, each in mood.heard[1:])


def test_a_letter_outlives_the_connection(connect: Connect, serve: Serve) -> None:
    """With no broker it waits as dead, and goes out with the next connection."""
    mood = Moody("nack", letters="silent")
    broker = serve(mood)
    producer = connect(broker, **{**RETRIES, "max_message_retries": 0})
    future = producer.submit(make_message("m"))
    broker.wait_for_messages(2, LIMIT)
    cut_off(producer, broker)
    assert producer.status().dead_letters == 1
    assert not future.done()
    mood.letters = "ack"
    broker.listen_again()
    with pytest.raises(RetriesExhaustedError):
        future.result(LIMIT)
    assert len(mood.times("m")) == 3


def test_a_late_ack_of_the_last_attempt(connect: Connect, serve: Serve) -> None:
    """While its tag is open the last attempt is not over: no letter, and a late ack confirms."""
    mood = Moody("silent")
    broker = serve(mood)
    producer = connect(broker, **{**RETRIES, "max_message_retries": 0})
    assert producer.wait_connected(LIMIT)
    receipt = producer.publish(make_message("m"), timeout=0.02)
    swept = sweeps_of(producer)
    swept.wait_until(lambda: len(swept.seen) >= 20)
    [message] = broker.messages
    ack(message)
    assert receipt.result(LIMIT).confirmed
    assert len(broker.messages) == 1


# --- give-up, and the end ----------------------------------------------------------------------


def test_confirm_give_up(connect: Connect, serve: Serve) -> None:
    """The channel is replaced, all that was on it is sent once more under its own id (54)."""

    class Forgetful(Moody):
        first: FakeConnection | None = None

        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            self.first = self.first or connection
            self.mood = "silent" if connection is self.first else "ack"
            super().on_publish(connection, channel, tag, message)

    mood = Forgetful()
    broker = serve(mood)
    producer = connect(broker, **RETRIES, confirm_give_up=0.2)
    futures = [producer.submit(make_message(f"{number}")) for number in range(10)]
    assert [future.result(LIMIT).attempts for future in futures] == [2] * 10
    assert sorted(mood.ids()) == sorted([f"{number}" for number in range(10)] * 2)
    assert all(later - earlier >= 0.2 for earlier, later in map(mood.times, map(str, range(10))))
    assert broker.accepted == 2


def test_close_with_retries_left(connect: Connect, serve: Serve) -> None:
    """What waits for a retry, and a dead letter that was not taken, are abandoned by their ids."""
    mood = Moody("nack", letters="nack")
    producer = connect(serve(mood), **{**RETRIES, "message_retry_base_delay": 60.0})
    waiting = producer.publish(make_message("waiting"))
    assert isinstance(waiting.reason, NackError)
    report = producer.close(0.1)
    assert (report.confirmed, report.stored, report.abandoned) == (0, 0, ("waiting",))
    with pytest.raises(ProducerClosedError) as caught:
        waiting.result(0)
    assert caught.value.possibly_sent


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{}/s.db"])
def test_close_drains_retries(connect: Connect, serve: Serve, store: str, tmp_path: Path) -> None:
    """What is due within the timeout is sent again, and counted as confirmed."""
    mood = Moody("nack")
    producer = connect(serve(mood), **RETRIES, store_url=store.format(tmp_path))
    receipts = [producer.publish(make_message()) for _ in range(5)]
    mood.mood = "ack"
    report = producer.close(LIMIT)
    assert (report.confirmed, report.abandoned) == (5, ())
    assert all(receipt.confirmed for receipt in receipts)


@pytest.mark.parametrize("held_by", ["another process", "a missing exchange"])
def test_close_leaves_what_waits_for_others(
    connect: Connect, serve: Serve, held_by: str, tmp_path: Path
) -> None:
    """Rows that nothing here can deliver do not hold up the end of each process of the store.

    They are another process's, or dead letters that the broker does not take.
    """
    mood = Moody("nack", letters="nack")
    path = tmp_path / "s.db"
    with closing(SQLiteStore(path)) as store:
        if held_by == "another process":
            store.put([Entry(Record(make_envelope("its")), None)], LIMIT)
        producer = connect(serve(mood), **RETRIES, store_url=f"sqlite:///{path}")
        if held_by == "a missing exchange":
            dead = producer.publish(make_message("dead"), retry=RetryPolicy(0, BASE, BASE))
            assert isinstance(dead.reason, NackError)
        mood.mood = "ack"
        assert producer.publish(make_message("own")).confirmed
        with in_time(LIMIT / 3):
            report = producer.close(LIMIT)
        assert (report.stored, report.abandoned) == (1, ())


def sweeps_of(producer: MLProducer) -> Happenings:
    """Watch the retry thread's sweeps."""
    seen = Happenings()
    retry_worker = io_of(producer)._retry_worker
    sweep = retry_worker.thread._job

    def note() -> None:
        sweep()
        seen.note(time.monotonic())

    retry_worker.thread._job = note
    return seen
