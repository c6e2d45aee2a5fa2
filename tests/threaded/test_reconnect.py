"""Reconnecting: when, how often, and what ends or revives it; and closing in the midst of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pika import spec

from mlproducer import ConnectionState, MLProducer, Settings
from mlproducer._core.backoff import Backoff
from mlproducer.errors import NotConnectedError, ProducerClosedError
from mlproducer.testing.fake_broker import FakeBroker, FakeConnection
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, Background, make_message, wait_until
from tests.stopwatch import in_time
from tests.threaded.brokers import Holding, ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import Happenings, Moody, events_of, gaps, io_of

INITIAL, MAXIMUM, JITTER = 0.1, 0.4, 0.3
DELAYS: dict[str, Any] = {
    "reconnect_initial_delay": INITIAL,
    "reconnect_max_delay": MAXIMUM,
    "reconnect_jitter": JITTER,
}
SLACK = 1.0
"""Seconds by which a loaded machine may be late."""


class Dropping(Moody):
    """Drops connections, at once or as soon as they could carry messages.

    :ivar came: when each came, and how many there were then
    """

    def __init__(self, when: str = "at once") -> None:
        super().__init__()
        self.when = when
        self.came = Happenings()
        self.broker: FakeBroker | None = None

    def on_connect(self, connection: FakeConnection) -> None:
        """Note it, and drop it or not."""
        there = len(self.broker.connections) if self.broker is not None else 1
        self.came.note((time.monotonic(), there))
        if self.when == "at once":
            connection.close()
        else:
            super().on_connect(connection)

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, and drop it or not."""
        super().on_method(connection, channel, method)
        if self.when == "ready" and isinstance(method, spec.Confirm.Select):
            connection.close()

    def gaps(self) -> list[float]:
        """Seconds between one connection and the next."""
        return gaps([when for when, _ in self.came.seen])


def serve_dropping(serve: Serve, when: str = "at once") -> tuple[FakeBroker, Dropping]:
    """Start a broker that drops."""
    dropping = Dropping(when)
    dropping.broker = serve(dropping)
    return dropping.broker, dropping


# --- the backoff -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "ready"])
def test_the_backoff(connect: Connect, serve: Serve, when: str) -> None:
    """Each delay lies between its step and 30 % more, up to the cap; one attempt at a time (I16).

    A connection that is dropped before it was stable counts as a failure: no hot loop (13).
    """
    broker, dropping = serve_dropping(serve, when)
    producer = connect(broker, **DELAYS, max_reconnect_attempts=5)
    gave_up = events_of(producer, "gave_up")
    producer.start()
    gave_up.wait_for("gave_up")
    assert len(dropping.gaps()) == 4
    for gap, step in zip(dropping.gaps(), [INITIAL, 2 * INITIAL, MAXIMUM, MAXIMUM], strict=True):
        assert step <= gap < step * (1 + JITTER) + SLACK
    assert {there for _, there in dropping.came.seen} == {1}
    assert producer.status().reconnect_attempts == 5
    assert gave_up.seen == ["gave_up"]


def test_the_documented_backoff() -> None:
    """Without settings of one's own: 0.5 s up to 32 s, 30 % jitter, 10 attempts."""
    settings = Settings()
    backoff = Backoff(
        settings.reconnect_initial_delay, settings.reconnect_max_delay, settings.reconnect_jitter
    )
    assert [backoff.delay(n) for n in range(8)] == [0.5, 1, 2, 4, 8, 16, 32, 32]
    assert backoff.delay(9, 1.0) == 32 * 1.3
    assert settings.max_reconnect_attempts == 10


def test_the_count_starts_over_after_a_confirm(connect: Connect, serve: Serve) -> None:
    """A connection that has carried a message was stable: the next loss begins the series again."""
    broker, dropping = serve_dropping(serve)
    producer = connect(broker, **DELAYS, max_reconnect_attempts=100)
    producer.start()
    dropping.came.wait_until(lambda: len(dropping.came.seen) == 4)
    assert producer.status().reconnect_attempts >= 3
    dropping.when = "never"
    assert producer.wait_connected(LIMIT)
    assert producer.status().reconnect_attempts >= 4
    assert producer.publish(make_message()).confirmed
    assert producer.status().reconnect_attempts == 0
    before = len(dropping.came.seen)
    lost_at = time.monotonic()
    broker.connections[0].reset()
    dropping.came.wait_until(lambda: len(dropping.came.seen) > before)
    assert INITIAL <= dropping.came.seen[-1][0] - lost_at < INITIAL * (1 + JITTER) + SLACK


class AsksForTheStatus(logging.Handler):
    """Notes, at each line of a producer's log, what its status is then."""

    def __init__(self, producer: MLProducer) -> None:
        super().__init__()
        self.producer = producer
        self.states: list[tuple[str, ConnectionState]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Ask."""
        self.states.append((record.getMessage(), self.producer.status().connection_state))


@pytest.mark.parametrize("attempts", [1, 1000])
def test_the_status_at_an_event(connect: Connect, serve: Serve, attempts: int) -> None:
    """A loss is in the status when it is told, however soon a callback asks for it."""
    broker = serve()
    producer = connect(broker, max_reconnect_attempts=attempts)
    assert producer.wait_connected(LIMIT)
    logger, asks = logging.getLogger("mlproducer"), AsksForTheStatus(producer)
    logger.addHandler(asks)
    try:
        seen = events_of(producer, "disconnected", "gave_up")
        broker.connections[0].reset()
        seen.wait_until(lambda: bool(seen.seen))
    finally:
        logger.removeHandler(asks)
    assert seen.seen[0] == "disconnected"
    [state] = [state for line, state in asks.states if line.startswith("disconnected")]
    assert state is ConnectionState.DISCONNECTED


def test_brokers_in_turn(connect: Connect, serve: Serve) -> None:
    """An attempt tries every broker of the list; only when all have failed, it has."""
    brokers = [serve_dropping(serve) for _ in range(3)]
    url = ",".join(broker.url for broker, _ in brokers)
    producer = connect(url, **DELAYS, max_reconnect_attempts=2)
    gave_up = events_of(producer, "gave_up")
    producer.start()
    gave_up.wait_for("gave_up")
    assert [len(dropping.came.seen) for _, dropping in brokers] == [2, 2, 2]
    assert producer.status().reconnect_attempts == 2
    _, survivor = brokers[1]
    survivor.when = "never"
    assert producer.publish(make_message()).result(LIMIT).confirmed
    assert producer.status().broker == f"127.0.0.1:{brokers[1][0].port}"


# --- the end of the attempts, and their beginning ----------------------------------------------

REVIVALS: dict[str, Callable[[MLProducer], object]] = {
    "publish": lambda producer: producer.publish(make_message()),
    "submit": lambda producer: producer.submit(make_message()),
    "reconnect": lambda producer: producer.reconnect(),
    "flush": lambda producer: producer.flush(0.01),
}


@pytest.mark.parametrize("way", REVIVALS)
def test_gave_up_and_revived(connect: Connect, serve: Serve, way: str) -> None:
    """After ten attempts nothing is tried until a call; then the series begins again (19)."""
    broker, dropping = serve_dropping(serve)
    producer = connect(
        broker,
        reconnect_initial_delay=0.01,
        reconnect_max_delay=0.02,
        max_reconnect_attempts=10,
    )
    gave_up = events_of(producer, "gave_up", "connected")
    producer.start()
    gave_up.wait_for("gave_up")
    assert len(dropping.came.seen) == 10
    assert not producer.is_healthy()
    assert producer.status().connection_state is ConnectionState.DISCONNECTED
    assert not producer.wait_connected(0.2)
    assert len(dropping.came.seen) == 10
    REVIVALS[way](producer)
    gave_up.wait_for("gave_up", "gave_up")
    assert len(dropping.came.seen) == 20
    dropping.when = "never"
    REVIVALS[way](producer)
    gave_up.wait_for("gave_up", "gave_up", "connected")
    assert producer.flush(LIMIT) == 0


def test_reconnect_while_attempts_remain(connect: Connect, serve: Serve) -> None:
    """It does not wait for the delay that is due."""
    broker, dropping = serve_dropping(serve)
    producer = connect(broker, reconnect_initial_delay=30.0, reconnect_max_delay=30.0)
    with pytest.raises(NotConnectedError):
        producer.publish(make_message(), retry=False)
    assert producer.status().connection_state is ConnectionState.DISCONNECTED
    dropping.when = "never"
    with in_time(2.0):
        producer.reconnect()
        assert producer.wait_connected(LIMIT)
    assert len(dropping.came.seen) == 2


def test_no_reconnect_while_blocked(connect: Connect, serve: Serve) -> None:
    """Neither an order, nor a late confirm, nor an overdue one costs a blocked connection (32)."""
    mood = Moody("silent")
    broker = serve(mood)
    producer = connect(broker, confirm_give_up=1.0)
    flow = events_of(producer, "blocked", "unblocked", "disconnected")
    receipt = producer.publish(make_message("m"), timeout=0.01)
    [message] = broker.wait_for_messages(1, LIMIT)
    broker.connections[0].block()
    flow.wait_for("blocked")
    looked = looks_of(producer)
    producer.reconnect()
    producer.publish(make_message("other"), timeout=0.01)
    looked.wait_until(lambda: looked.seen.count(True) >= 1)
    assert producer.status().connection_state is ConnectionState.CONNECTED
    mood.mood = "ack"
    broker.connections[0].unblock()
    flow.wait_for("blocked", "unblocked")
    ack(message)
    assert receipt.result(LIMIT).attempts == 1
    assert producer.flush(LIMIT) == 0
    assert broker.accepted == 1


def looks_of(producer: MLProducer) -> Happenings:
    """Watch the I/O thread's looks at what is overdue."""
    seen = Happenings()
    sender = io_of(producer).sender
    overdue = sender.overdue

    def note(now: float, limit: float) -> bool:
        found = bool(overdue(now, limit))
        seen.note(found)
        return found

    sender.overdue = note
    return seen


# --- closing -----------------------------------------------------------------------------------


@contextmanager
def connecting(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker that accepts, and answers only later."""
    silent = Holding("start", times=1000)
    broker = serve(silent)
    producer = connect(broker, connection_timeout=0.3)
    producer.start()
    broker.wait_for_connections(1, LIMIT)
    yield producer, silent.hold_no_more


@contextmanager
def away(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker that comes later."""
    broker = serve(Moody())
    broker.stop_listening()
    yield connect(broker), broker.listen_again


@contextmanager
def blocked(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker under an alarm."""
    broker = serve(Moody())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    flow = events_of(producer, "blocked")
    [connection] = broker.connections
    connection.block()
    flow.wait_for("blocked")
    yield producer, connection.unblock


@contextmanager
def frozen(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker that does nothing for a while."""
    with Proxy(("127.0.0.1", serve(Moody()).port)) as proxy:
        producer = connect(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
        assert producer.wait_connected(LIMIT)
        proxy.stall()
        yield producer, proxy.resume


@contextmanager
def nacking(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker that refuses for a while, so that all waits for a retry."""
    mood = Moody("nack")
    yield connect(serve(mood)), lambda: setattr(mood, "mood", "ack")


@contextmanager
def broken(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """The same, behind a breaker that opens over it."""
    mood = Moody("nack")
    settings = {"circuit_breaker_threshold": 5, "circuit_breaker_cooldown": 0.3}
    yield connect(serve(mood), **settings), lambda: setattr(mood, "mood", "ack")


@contextmanager
def gave_up(connect: Connect, serve: Serve) -> Iterator[tuple[MLProducer, Callable[[], None]]]:
    """A broker that is not tried any more."""
    broker = serve(Moody())
    broker.stop_listening()
    producer = connect(broker, max_reconnect_attempts=1)
    told = events_of(producer, "gave_up")
    producer.start()
    told.wait_for("gave_up")
    yield producer, broker.listen_again


STATES = [connecting, away, blocked, frozen, nacking, broken, gave_up]


@pytest.mark.parametrize("state", STATES)
def test_close_drains_from_any_state(connect: Connect, serve: Serve, state: Any) -> None:
    """If all is well again within the timeout, everything is confirmed, and counted (81)."""
    with state(connect, serve) as (producer, heal):
        futures = [producer.submit(make_message()) for _ in range(5)]
        background = Background()
        reports = [background.call(producer.close, LIMIT) for _ in range(3)]
        runtime: Any = producer._life.runtime
        assert wait_until(lambda: runtime._confirmed_before)  # it counts what is confirmed later
        heal()
        background.gather(LIMIT + 1.0)
        assert all(future.result(0).confirmed for future in futures)
        for report in reports:
            assert (report.result(0).confirmed, report.result(0).abandoned) == (5, ())


@pytest.mark.parametrize("state", [connecting, away, blocked, frozen, nacking, broken])
def test_close_gives_up_in_any_state(connect: Connect, serve: Serve, state: Any) -> None:
    """If it is not, all that lived in memory is named, each future is told, and it ends in time."""
    with state(connect, serve) as (producer, _):
        futures = [producer.submit(make_message()) for _ in range(5)]
        with in_time(0.55):
            report = producer.close(0.05)
        assert report.confirmed == 0
        assert sorted(report.abandoned) == sorted(future.message_id for future in futures)
        for future in futures:
            assert isinstance(future.exception(0), ProducerClosedError)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("mlproducer-io")]
