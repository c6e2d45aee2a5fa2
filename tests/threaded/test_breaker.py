"""The circuit breaker of a whole producer: what opens it, how it fails, who probes (103-105)."""

from __future__ import annotations

import statistics
import threading
import time
from functools import partial
from typing import Any

import pytest

from mlproducer import CircuitState, Message, MLProducer, Outcome, Settings
from mlproducer._core import events
from mlproducer.errors import (
    AuthenticationError,
    BrokerBlockedError,
    BrokerRejectedError,
    CircuitOpenError,
    ConfirmTimeoutError,
    ConnectionLostError,
    InvalidMessageError,
    NackError,
    NotConnectedError,
    PublishError,
    UnroutableError,
)
from mlproducer.stores.memory import MemoryStore
from mlproducer.testing.fake_broker import FakeBroker, FakeConnection
from tests.helpers import LIMIT, Background, make_message
from tests.threaded.brokers import ack
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import Happenings, Moody, circuit_of, events_of, gaps, io_of, told

OPEN, HALF_OPEN, CLOSED = CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.CLOSED
THRESHOLD = 10
SHORT = 0.05
LONG: dict[str, Any] = {"circuit_breaker_threshold": THRESHOLD, "circuit_breaker_cooldown": 30.0}
"""The documented breaker."""

TOUCHY: dict[str, Any] = {"circuit_breaker_threshold": 1, "circuit_breaker_cooldown": 0.2}
"""One that opens at the first failure, and soon lets a probe through."""


def started(producer: MLProducer) -> Happenings:
    """Connect, and watch the breaker."""
    assert producer.wait_connected(LIMIT)
    return circuit_of(producer)


def opened(connect: Connect, broker: FakeBroker, mood: Moody) -> tuple[MLProducer, Happenings]:
    """Return a producer whose breaker has just opened, for long; the broker is well again."""
    producer = connect(broker, **{**LONG, "circuit_breaker_threshold": 1})
    moves = started(producer)
    mood.mood = "nack"
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    mood.mood = "ack"
    moves.wait_for(OPEN)
    return producer, moves


# --- what counts -------------------------------------------------------------------------------


def fail_by_loss(producer: MLProducer, broker: FakeBroker, count: int) -> set[type]:
    """Lose some messages with their connection, and let no other be made."""
    futures = [producer.submit(make_message(), retry=False) for _ in range(count)]
    broker.wait_for_messages(count, LIMIT)
    broker.stop_listening()
    broker.connections[0].reset()
    return {type(future.exception(LIMIT)) for future in futures}


def fail(producer: MLProducer, broker: FakeBroker, count: int, timeout: float = LIMIT) -> set[type]:
    """Publish, one by one."""
    kinds = set()
    for _ in range(count):
        with pytest.raises(PublishError) as caught:
            producer.publish(make_message(), timeout=timeout, retry=False)
        kinds.add(caught.type)
    return kinds


KINDS: dict[str, tuple[str, Any, type[PublishError]]] = {
    "nack": ("nack", fail, NackError),
    "timeout": ("silent", partial(fail, timeout=SHORT), ConfirmTimeoutError),
    "lost": ("silent", fail_by_loss, ConnectionLostError),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [THRESHOLD - 1, THRESHOLD])
def test_ten_failures_open_it(connect: Connect, serve: Serve, kind: str, count: int) -> None:
    """Nine failures in a row of a kind that counts do not open it, the tenth does."""
    mood, failing, error = KINDS[kind]
    broker = serve(Moody(mood))
    producer = connect(broker, **LONG)
    moves = started(producer)
    assert failing(producer, broker, count) == {error}
    assert producer.status().consecutive_failures == count
    moves.wait_until(lambda: moves.seen == ([OPEN] if count == THRESHOLD else []))
    assert producer.status().circuit_breaker_open is (count == THRESHOLD)


def test_a_failed_attempt_is_one_failure(connect: Connect, serve: Serve) -> None:
    """However many messages it fails, and those that come until the next attempt."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, **LONG, reconnect_initial_delay=30.0, reconnect_max_delay=30.0)
    waiting = [producer.submit(make_message(), retry=False) for _ in range(THRESHOLD + 2)]
    assert {type(each.exception(LIMIT)) for each in waiting} == {NotConnectedError}
    assert fail(producer, broker, THRESHOLD + 2) == {NotConnectedError}
    assert producer.status().consecutive_failures == 1
    assert producer.status().circuit_state is CLOSED
    errors = told(producer, events.ConnectFailed, lambda event: event.loss.kind)
    producer.reconnect()
    errors.wait_until(lambda: len(errors.seen) == 1)
    assert fail(producer, broker, 1) == {NotConnectedError}
    assert producer.status().consecutive_failures == 2


def test_ten_failed_attempts_open_it(connect: Connect, serve: Serve) -> None:
    """A broker that is not there is one that fails, though no message is tried on it."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, **LONG)
    producer.start()
    moves = circuit_of(producer)
    moves.wait_for(OPEN)
    # It opens while the tenth attempt ends, a moment before that is counted.
    assert producer.status().reconnect_attempts in (THRESHOLD - 1, THRESHOLD)
    with pytest.raises(CircuitOpenError):
        producer.publish(make_message())
    broker.listen_again()
    moves.wait_for(OPEN, HALF_OPEN)
    assert producer.publish(make_message()).confirmed


def test_switched_off(connect: Connect, serve: Serve) -> None:
    """With a threshold of 0 no number of failures opens it."""
    broker = serve(Moody("nack"))
    producer = connect(broker, **{**LONG, "circuit_breaker_threshold": 0})
    moves = started(producer)
    assert fail(producer, broker, 3 * THRESHOLD) == {NackError}
    assert producer.status().consecutive_failures == 3 * THRESHOLD
    assert moves.seen == []


def test_by_the_share_of_attempts(connect: Connect, serve: Serve) -> None:
    """Adaptive, it opens where every second message fails, which are never ten in a row."""
    mood = Moody()
    broker = serve(mood)
    producer = connect(broker, **LONG, circuit_breaker_mode="adaptive")
    moves = started(producer)
    for _ in range(10):
        mood.mood = "ack"
        producer.publish(make_message(), retry=False)
        assert moves.seen == []
        mood.mood = "nack"
        fail(producer, broker, 1)
    moves.wait_until(lambda: moves.seen == [OPEN])


class Refusing(Moody):
    """Knows no user."""

    def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
        """Close, as RabbitMQ does."""
        connection.close_connection(403, "ACCESS_REFUSED - Login was refused")


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Moody("return"), UnroutableError),
        (Moody("close"), BrokerRejectedError),
        (Refusing(), AuthenticationError),
        (Moody("block"), BrokerBlockedError),
    ],
)
def test_what_does_not_count(
    connect: Connect, serve: Serve, behaviour: Moody, error: type[PublishError]
) -> None:
    """What says nothing of the broker's health never opens it, however often it comes."""
    broker = serve(behaviour)
    producer = connect(broker, **LONG)
    producer.start()
    if behaviour.mood == "block":
        blocked = events_of(producer, "blocked")
        assert producer.wait_connected(LIMIT)
        broker.connections[0].block()
        blocked.wait_for("blocked")
    timeout = SHORT if error is BrokerBlockedError else LIMIT
    for _ in range(THRESHOLD + 2):
        with pytest.raises(error):
            producer.publish(make_message(), timeout=timeout, retry=False)
    assert producer.status().circuit_state is CLOSED
    assert producer.status().consecutive_failures == 0


def test_validation_does_not_count(connect: Connect, serve: Serve) -> None:
    """A message that AMQP cannot carry is its publisher's fault."""
    producer = connect(serve(Moody()), **LONG)
    for _ in range(THRESHOLD + 2):
        with pytest.raises(InvalidMessageError):
            producer.publish(Message(body=b"", routing_key="k" * 256))
    assert producer.status().consecutive_failures == 0
    assert producer.publish(make_message()).confirmed


def test_a_success_in_between(connect: Connect, serve: Serve) -> None:
    """Only failures in a row count."""
    mood = Moody()
    broker = serve(mood)
    producer = connect(broker, **LONG)
    moves = started(producer)
    for each, count in (("nack", 9), ("ack", 1), ("nack", 9)):
        mood.mood = each
        producer.publish_many([make_message() for _ in range(count)], retry=False)
    assert producer.status().consecutive_failures == 9
    assert moves.seen == []


# --- open --------------------------------------------------------------------------------------


@pytest.mark.parametrize("retry", [True, False])
def test_open_fails_fast(connect: Connect, serve: Serve, retry: bool) -> None:
    """It raises in no time, with the time to wait, even while the I/O thread does nothing (104)."""
    mood = Moody()
    broker = serve(mood)
    producer, _ = opened(connect, broker, mood)
    go_on = threading.Event()
    io_of(producer).order(partial(go_on.wait, LIMIT))
    message, took = make_message(), []
    for _ in range(1000):
        begun = time.perf_counter()
        with pytest.raises(CircuitOpenError) as caught:
            producer.publish(message, retry=retry)
        took.append(time.perf_counter() - begun)
    go_on.set()
    error = caught.value
    assert isinstance(error, CircuitOpenError)
    assert 0.0 < error.retry_after <= 30.0
    assert (error.attempts, error.possibly_sent) == (0, False)
    assert statistics.median(took) < 0.0005  # also while coverage looks on
    with pytest.raises(CircuitOpenError):
        producer.submit(message, retry=retry)
    assert [type(each) for each in producer.publish_many([message])] == [CircuitOpenError]
    assert len(mood.heard) == 1
    assert not producer.is_healthy()


def test_open_with_a_durable_store(serve: Serve) -> None:
    """What survives the process is deferred at once, and delivered after the cooldown."""

    class Durable(MemoryStore):
        durable = True

    mood = Moody("nack")
    broker = serve(mood)
    settings = Settings(url=broker.url, **{**QUICK, **TOUCHY})
    with MLProducer(settings, store=Durable()) as producer:
        moves = started(producer)
        with pytest.raises(NackError):
            producer.publish(make_message(), retry=False)
        mood.mood = "ack"
        moves.wait_until(lambda: moves.seen == [OPEN])
        receipt = producer.publish(make_message("kept"))
        assert receipt.outcome is Outcome.DEFERRED
        assert isinstance(receipt.reason, CircuitOpenError)
        assert receipt.durable
        with pytest.raises(CircuitOpenError):
            producer.publish(make_message(), retry=False)
        assert receipt.result(LIMIT).attempts == 1
        assert producer.status().circuit_state is CLOSED


# --- half-open ---------------------------------------------------------------------------------


def test_half_open_without_traffic(connect: Connect, serve: Serve) -> None:
    """The breaker thread ends the cooldown, when it is over and no sooner."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY)
    moves = started(producer)
    begun = time.monotonic()
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    moves.wait_for(OPEN, HALF_OPEN)
    assert time.monotonic() - begun >= 0.2
    assert len(mood.heard) == 1
    assert producer.is_healthy()


def test_a_stored_message_can_be_the_probe(connect: Connect, serve: Serve) -> None:
    """What waits for a retry goes out after the cooldown; the sweeps before cost it nothing."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY, max_message_retries=1, retry_sweep_interval=0.01)
    moves = started(producer)
    begun = time.monotonic()
    receipt = producer.publish(make_message("kept"))
    mood.mood = "ack"
    assert receipt.result(LIMIT).attempts == 2
    moves.wait_for(OPEN, HALF_OPEN, CLOSED)
    assert mood.times("kept")[1] - begun >= 0.2


def test_one_probe_among_a_hundred_threads(connect: Connect, serve: Serve) -> None:
    """Half-open, one message is sent, and all others are refused until it has closed it (104)."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY)
    moves = started(producer)
    with pytest.raises(NackError):
        producer.publish(make_message("first"), retry=False)
    moves.wait_for(OPEN, HALF_OPEN)
    mood.mood = "silent"
    barrier = threading.Barrier(100)
    refused = Happenings()

    def publish() -> bool:
        barrier.wait(LIMIT)
        try:
            return producer.publish(make_message(), timeout=LIMIT, retry=False).confirmed
        except CircuitOpenError:
            refused.note(CircuitOpenError)
            return False

    background = Background()
    for _ in range(100):
        background.call(publish)
    refused.wait_until(lambda: len(refused.seen) == 99)
    [_, probe] = broker.wait_for_messages(2, LIMIT)
    ack(probe)
    assert background.gather().count(True) == 1
    assert len(broker.messages) == 2
    moves.wait_for(OPEN, HALF_OPEN, CLOSED)


def test_a_failing_probe_opens_it_again(connect: Connect, serve: Serve) -> None:
    """For another cooldown; and the next one decides again."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY, message_retry_base_delay=0.001)
    moves = started(producer)
    receipt = producer.publish(make_message("kept"))
    moves.wait_for(OPEN, HALF_OPEN, OPEN, HALF_OPEN, OPEN)
    mood.mood = "ack"
    assert receipt.result(LIMIT).attempts >= 4
    moves.wait_until(lambda: moves.seen[-1] is CLOSED)
    assert min(gaps(mood.times("kept"))) >= 0.2


def test_a_health_check_is_no_probe(connect: Connect, serve: Serve) -> None:
    """However many checks are answered, and however often it is asked how things stand."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY, health_check_interval=0.02)
    moves = started(producer)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    moves.wait_for(OPEN, HALF_OPEN)
    for _ in range(5):
        assert mood.asked.acquire(timeout=LIMIT)
        assert producer.status().circuit_state is HALF_OPEN
    assert moves.seen == [OPEN, HALF_OPEN]
    mood.mood = "ack"
    assert producer.publish(make_message()).confirmed
    assert producer.status().circuit_state is CLOSED


def test_a_probe_that_nobody_waits_for(connect: Connect, serve: Serve) -> None:
    """A submit() that is never confirmed keeps the breaker shut for no longer than a publish()."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY, publish_timeout=1.5)
    moves = started(producer)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    moves.wait_for(OPEN, HALF_OPEN)
    mood.mood = "silent"
    probe = producer.submit(make_message("probe"))
    broker.wait_for_messages(2, LIMIT)
    mood.mood = "ack"
    with pytest.raises(CircuitOpenError) as caught:
        producer.publish(make_message())
    assert isinstance(caught.value, CircuitOpenError)
    assert 0.0 < caught.value.retry_after <= 1.5
    moves.wait_for(OPEN, HALF_OPEN, OPEN, HALF_OPEN)
    assert producer.publish(make_message()).confirmed
    assert not probe.done()


def test_late_confirms_close_it(connect: Connect, serve: Serve) -> None:
    """After a stall in which all time out, nothing is left to send, and the confirms come."""
    broker = serve(Moody("silent"))
    producer = connect(broker, **LONG)
    moves = started(producer)
    background = Background()
    for _ in range(12):
        background.call(producer.publish, make_message(), timeout=0.3)
    assert {receipt.outcome for receipt in background.gather()} == {Outcome.DEFERRED}
    moves.wait_for(OPEN)
    for message in broker.wait_for_messages(12, LIMIT):
        ack(message)
    moves.wait_for(OPEN, CLOSED)
    assert producer.flush(LIMIT) == 0


def test_a_timer_that_is_early(connect: Connect, serve: Serve) -> None:
    """Woken a moment before the end of the cooldown, the breaker is woken again at its end."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **TOUCHY)
    moves = started(producer)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    cooldown = io_of(producer)._cooldown
    cooldown.order(cooldown._job)
    moves.wait_for(OPEN, HALF_OPEN)


def test_a_status_moves_nothing(connect: Connect, serve: Serve) -> None:
    """Asked after the end of a cooldown, it leaves the move to the breaker thread."""
    mood = Moody("nack")
    broker = serve(mood)
    producer = connect(broker, **{**TOUCHY, "circuit_breaker_cooldown": 0.05})
    moves = started(producer)
    io_of(producer)._cooldown.stop()
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    over = threading.Event()
    broker.connections[0].later(0.06, over.set)
    assert over.wait(LIMIT)
    for _ in range(100):
        assert producer.status().circuit_breaker_open
        assert not producer.is_healthy()
    with pytest.raises(CircuitOpenError) as caught:
        producer.publish(make_message())
    assert isinstance(caught.value, CircuitOpenError)
    assert caught.value.retry_after > 0.0
    assert moves.seen == [OPEN]


def test_a_new_connection_half_opens_it(connect: Connect, serve: Serve) -> None:
    """It ends the cooldown at once, and does not close it: the next message decides."""
    mood = Moody()
    broker = serve(mood)
    producer, moves = opened(connect, broker, mood)
    told = events_of(producer, "circuit_opened", "circuit_closed")
    broker.connections[0].reset()
    moves.wait_for(OPEN, HALF_OPEN)
    mood.mood = "nack"
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    moves.wait_for(OPEN, HALF_OPEN, OPEN)
    mood.mood = "ack"
    broker.connections[0].reset()
    moves.wait_for(OPEN, HALF_OPEN, OPEN, HALF_OPEN)
    assert producer.publish(make_message()).confirmed
    told.wait_for("circuit_opened", "circuit_closed")
