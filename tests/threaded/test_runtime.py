"""Several connections: who carries a message, and what the producer says of them together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pika import frame

from mlproducer import CircuitState, ConnectionState, Message, MLProducer, Outcome, Settings
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._synchronization import Latch
from mlproducer.errors import NackError, ProducerClosedError
from mlproducer.stores.memory import MemoryStore
from mlproducer.testing.fake_broker import (
    Behaviour,
    FakeBroker,
    FakeConnection,
    ReceivedMessage,
)
from tests.helpers import LIMIT, Background, make_message, wait_until
from tests.threaded.brokers import Holding, Silent, ack
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import Happenings, events_of, io_of

SOON = {"publish_timeout": 0.3, "max_reconnect_attempts": 2}
"""Attempts to connect that are used up in no time."""


def connections_of(messages: list[ReceivedMessage]) -> list[int]:
    """Say how many messages each connection has carried, the most first."""
    carried: dict[int, int] = {}
    for message in messages:
        carried[id(message.connection)] = carried.get(id(message.connection), 0) + 1
    return sorted(carried.values(), reverse=True)


def all_connected(producer: MLProducer) -> bool:
    """Wait until every connection carries messages."""
    producer.start()
    runtime: Any = producer._life.runtime
    engines = runtime.engines
    limit = time.monotonic() + LIMIT
    connected = runtime._connected.wait_for(lambda: all(e.connected for e in engines), limit)
    for engine in [*engines, *engines]:  # what they say to one another when they have connected
        heard = Latch()
        engine.io.order(heard.open)
        assert heard.wait(LIMIT)
    return bool(connected)


def all_gave_up(producer: MLProducer, broker: FakeBroker) -> None:
    """Lose all connections, and wait until none is tried any more."""
    gave_up = events_of(producer, "gave_up")
    broker.stop_listening()
    for connection in broker.connections:
        connection.reset()
    gave_up.wait_until(lambda: len(gave_up.seen) >= producer.settings.connections)
    assert all_idle(producer)


def all_idle(producer: MLProducer) -> bool:
    """Wait until every connection has used up its attempts: a call may have it begin once more."""
    runtime: Any = producer._life.runtime
    return wait_until(lambda: all(each.io.connector.idle for each in runtime.engines))


def test_the_least_burdened_carries(connect: Connect, serve: Serve) -> None:
    """Messages go where the fewest are in flight; the sizes are those of all together."""
    broker = serve(Silent())
    producer = connect(broker, connections=3)
    assert all_connected(producer)
    futures = []
    for number in range(9):
        futures.append(producer.submit(make_message(f"{number}")))
        messages = broker.wait_for_messages(number + 1, LIMIT)
    assert connections_of(messages) == [3, 3, 3]
    status = producer.status()
    assert (status.pending_confirms, status.healthy) == (9, True)
    for message in messages:
        ack(message)
    assert all(future.result(LIMIT).confirmed for future in futures)
    assert producer.flush(LIMIT) == 0


def test_one_window(connect: Connect, serve: Serve) -> None:
    """All connections together hold no more in flight than one would."""
    broker = serve(Silent())
    producer = connect(broker, connections=2, max_in_flight=4)
    assert all_connected(producer)
    for number in range(4):
        producer.submit(make_message(f"{number}"))
    background = Background()
    fifth = background.call(producer.submit, make_message("fifth"))
    messages = broker.wait_for_messages(4, LIMIT)
    assert not fifth.done()
    for message in messages:
        ack(message)
    fifth.result(LIMIT)
    ack(broker.wait_for_messages(5, LIMIT)[-1])
    assert producer.flush(LIMIT) == 0


def test_one_store(connect: Connect) -> None:
    """The memory store is not divided: a large message finds room with many connections too."""
    producer = connect("amqp://guest:guest@127.0.0.1:1/", connections=8, publish_timeout=0.3)
    receipt = producer.publish(Message(body=bytes(12 << 20), routing_key="k"))
    assert receipt.outcome is Outcome.DEFERRED
    assert producer.status().retry_queue_size == 1


def test_one_connection_lost_of_two(connect: Connect, serve: Serve) -> None:
    """What was on it is sent again; meanwhile the other one carries."""
    broker = serve(Silent())
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    first = producer.submit(make_message("first"))
    [message] = broker.wait_for_messages(1, LIMIT)
    message.connection.reset()
    second = producer.submit(make_message("second"))
    copies = broker.wait_for_messages(3, LIMIT)[1:]
    for copy in copies:
        ack(copy)
    assert first.result(LIMIT).attempts == 2
    assert second.result(LIMIT).attempts == 1
    assert producer.status().connection_state is ConnectionState.CONNECTED


@pytest.mark.parametrize("durable", [False, True])
def test_an_outage_that_used_up_the_attempts(
    connect: Connect, serve: Serve, tmp_path: Path, durable: bool
) -> None:
    """One publish wakes every connection, and all that was deferred finds its end."""
    broker = serve()
    store = f"sqlite:///{tmp_path}/store.db" if durable else "memory://"
    producer = connect(broker, connections=3, store_url=store, **SOON)
    assert all_connected(producer)
    all_gave_up(producer, broker)
    receipts = [producer.publish(make_message()) for _ in range(6)]
    futures = [producer.submit(make_message()) for _ in range(6)]
    assert all_idle(producer)
    broker.listen_again()
    producer.publish(make_message("wakes"))
    assert all(receipt.result(LIMIT).confirmed for receipt in receipts)
    assert all(future.result(LIMIT).confirmed for future in futures)
    assert all_connected(producer)
    assert producer.flush(LIMIT) == 0


def test_what_another_connection_deferred(connect: Connect, serve: Serve) -> None:
    """A connection that stays away keeps nothing back: what is due goes out on another one."""
    behaviour = OneOnly()
    broker = serve(behaviour)
    producer = connect(broker, connections=2, publish_timeout=0.3)
    assert all_connected(producer)
    behaviour.full = True
    broker.stop_listening()
    deferred = events_of(producer, "deferred")
    for connection in broker.connections:
        connection.reset()
    receipts = [producer.publish(make_message()) for _ in range(8)]
    assert {receipt.outcome for receipt in receipts} == {Outcome.DEFERRED}
    deferred.wait_until(lambda: len(deferred.seen) == 8)
    broker.listen_again()
    assert all(receipt.result(LIMIT).confirmed for receipt in receipts)


class OneOnly(Behaviour):
    """Lets one connection in, when it is full, and tells the others of the user's limit."""

    def __init__(self) -> None:
        self.full = False
        self._taken = False

    def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
        """Open the first, and refuse those that follow, as RabbitMQ does."""
        if self.full and self._taken:
            text = "NOT_ALLOWED - access to vhost '/' refused: user connection limit (1) is reached"
            connection.close_connection(530, text)
            return
        self._taken = self.full
        super().on_open(connection, virtual_host)


def test_a_second_connection_that_is_refused(connect: Connect, serve: Serve) -> None:
    """One is enough to be connected, and nothing of a burst at the start is refused."""
    behaviour = OneOnly()
    behaviour.full = True
    producer = connect(serve(behaviour), connections=2)
    background, barrier = Background(), threading.Barrier(16)

    def publish() -> Outcome:
        barrier.wait(LIMIT)
        return producer.publish(make_message()).outcome

    for _ in range(16):
        background.call(publish)
    assert set(background.gather()) == {Outcome.CONFIRMED}
    assert producer.wait_connected(LIMIT)
    assert producer.is_healthy()
    assert producer.publish_many([make_message() for _ in range(50)])[-1].confirmed  # type: ignore[union-attr]


class FailsOnOne(Behaviour):
    """Nacks what comes on one connection, and keeps silent on all once it is told to."""

    def __init__(self) -> None:
        self.bad: FakeConnection | None = None
        self.silent = False

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Nack there, and ack elsewhere."""
        self.bad = self.bad or connection
        if self.silent:
            return
        if connection is self.bad:
            connection.nack(channel, tag)
        else:
            connection.ack(channel, tag)


def test_a_half_open_breaker_beside_a_healthy_connection(connect: Connect, serve: Serve) -> None:
    """It takes one message, the probe; all others go to the healthy one, and none is refused."""
    behaviour = FailsOnOne()
    broker = serve(behaviour)
    producer = connect(
        broker, connections=2, circuit_breaker_threshold=1, circuit_breaker_cooldown=0.2
    )
    assert all_connected(producer)
    moves = Happenings()
    for engine in producer._life.runtime.engines:  # type: ignore[union-attr]
        watch_circuit(engine, moves)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    moves.wait_for(CircuitState.OPEN)
    assert producer.is_healthy()
    assert producer.publish(make_message(), retry=False).confirmed
    moves.wait_for(CircuitState.OPEN, CircuitState.HALF_OPEN)
    behaviour.silent = True
    background, barrier = Background(), threading.Barrier(30)

    def publish() -> bool:
        barrier.wait(LIMIT)
        return producer.publish(make_message(), timeout=LIMIT, retry=False).confirmed

    for _ in range(30):
        background.call(publish)
    messages = broker.wait_for_messages(32, LIMIT)[2:]
    assert connections_of(messages) == [29, 1]
    for message in messages:
        ack(message)
    assert background.gather() == [True] * 30


def watch_circuit(engine: Any, moves: Happenings) -> None:
    """Note the moves of one connection's breaker."""
    emit = engine.io._emit

    def tell(event: events.Event) -> None:
        emit(event)
        if isinstance(event, events.CircuitChanged):
            moves.note(event.state)

    engine.io._emit = tell


def test_what_waits_goes_where_it_can(connect: Connect, serve: Serve) -> None:
    """What the broker's alarm holds up on all connections goes out on the first that it frees."""
    broker = serve()
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    blocked = events_of(producer, "blocked")
    for connection in broker.connections:
        connection.block()
    blocked.wait_for("blocked", "blocked")
    futures = [producer.submit(make_message()) for _ in range(10)]
    broker.connections[0].unblock()
    assert all(future.result(LIMIT).attempts == 1 for future in futures)


def test_what_was_handed_over_is_not_taken_back(connect: Connect, serve: Serve) -> None:
    """A loop that fails amid a burst puts back what it had in hand, and nothing of another's."""
    broker = serve()
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    first, second = [engine.io for engine in producer._life.runtime.engines]  # type: ignore[union-attr]
    take, accept = first._take, first.sender.accept
    go_on, failed, restarted = Latch(), Latch(), Latch()
    foreign: list[Any] = []

    def note_and_accept(deliveries: Any, now: float) -> None:
        foreign.extend(each for each in deliveries if each.owner is not first)
        accept(deliveries, now)

    def give_and_fail(deliveries: Any) -> None:
        first._take = take
        for delivery in deliveries:
            delivery.owner = second
            assert second.io_loop.mailbox.put(delivery)
        failed.open()
        raise ValueError("bug")

    first._take = give_and_fail
    first.sender.accept = note_and_accept
    second.order(lambda: go_on.wait(LIMIT))
    futures = [producer.submit(make_message(f"m{number}")) for number in range(20)]
    assert failed.wait(LIMIT)
    first.order(restarted.open)
    assert restarted.wait(LIMIT)
    go_on.open()
    assert all(future.result(LIMIT).confirmed for future in futures)
    assert producer.flush(LIMIT) == 0
    assert len(broker.messages) == 20
    assert foreign == []


def test_close_of_several(connect: Connect, serve: Serve) -> None:
    """One report for all: what was confirmed meanwhile, and what was abandoned on each."""
    broker = serve(Silent())
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    futures = [producer.submit(make_message(name)) for name in ("a", "b", "c", "d")]
    broker.wait_for_messages(4, LIMIT)
    report = producer.close(0.2)
    assert (report.confirmed, sorted(report.abandoned)) == (0, ["a", "b", "c", "d"])
    assert all(future.exception(0) for future in futures)
    assert producer.status().connection_state is ConnectionState.CLOSED


def test_close_counts_what_is_confirmed_anywhere(connect: Connect, serve: Serve) -> None:
    """The report counts confirms of all connections from the moment of the close."""
    broker = serve(Silent())
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    for number in range(6):
        producer.submit(make_message())
        broker.wait_for_messages(number + 1, LIMIT)
    messages = broker.wait_for_messages(6, LIMIT)
    assert connections_of(messages) == [3, 3]
    runtime: Any = producer._life.runtime
    wait = runtime._wait_until_quiet

    def settle_and_wait(deadline: float) -> None:
        for message in messages:
            ack(message)
        wait(deadline)

    runtime._wait_until_quiet = settle_and_wait
    assert producer.close(LIMIT).confirmed == 6


def test_a_store_of_ones_own(serve: Serve) -> None:
    """It serves several connections, since one thread uses it for all of them."""
    broker = serve(Silent())
    store = MemoryStore()
    settings = Settings(url=broker.url, connections=2, **QUICK)
    with MLProducer(settings, store=store) as producer:
        assert all_connected(producer)
        receipt = producer.publish(make_message(), timeout=0.1)
        assert receipt.outcome is Outcome.DEFERRED
        ack(broker.messages[0])
        assert receipt.result(LIMIT).confirmed


def test_threads(connect: Connect, serve: Serve) -> None:
    """The store has one thread for all connections; each connection has its own to write on."""
    producer = connect(serve(), connections=2)
    assert all_connected(producer)
    names = [each.name for each in threading.enumerate() if each.name.startswith("mlproducer-")]
    assert sum("-io" in name for name in names) == 2
    assert [name for name in names if "-retry" in name] == ["mlproducer-retry"]


def let_die(engine: Any) -> Callable[[], None]:
    """Have the I/O thread of an engine end for good at the call that is returned, which waits."""
    io, thread = engine.io, engine._threads["io"]
    attach, never = io.connector.attach, io.io_loop._never

    def fail(_loop: Any = None) -> None:
        raise ValueError("bug")

    def die(_pause: float) -> None:
        io.connector.attach, io.io_loop._never = attach, never
        raise SystemExit

    def kill() -> None:
        io.order(fail)
        thread.join(LIMIT)

    io.connector.attach = fail
    io.io_loop._never = SimpleNamespace(wait=die)
    return kill


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_store_outlives_an_io_thread(connect: Connect, serve: Serve) -> None:
    """Where one connection's thread has died, another carries, and the dead one is replaced."""
    broker = serve()
    producer = connect(broker, connections=2)
    assert all_connected(producer)
    engines: Any = producer._life.runtime.engines  # type: ignore[union-attr]
    thread, kill = engines[0]._threads["io"], let_die(engines[0])
    lost = producer.submit(make_message())
    kill()
    assert all(producer.publish(make_message()).confirmed for _ in range(20))
    assert lost.result(LIMIT).confirmed
    assert all_connected(producer)
    assert engines[0]._threads["io"] is not thread


def test_a_loop_that_fails_amid_what_comes_in(connect: Connect, serve: Serve) -> None:
    """Its socket is closed, although there is more to read of it before its end."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    io, stands, sent = io_of(producer), threading.Event(), threading.Event()
    sock = io.connector.connection._services.plain

    def fail() -> None:
        stands.set()
        assert sent.wait(LIMIT)
        raise ValueError("bug")

    io.order(fail)
    assert stands.wait(LIMIT)
    [connection] = broker.connections
    connection.send_raw(frame.Heartbeat().marshal())
    connection.later(0.0, sent.set)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert sock.fileno() == -1


class SlowToReopen(Silent):
    """Confirms nothing, and opens no second channel for publishing on one connection."""

    def __init__(self) -> None:
        self.slow: FakeConnection | None = None
        self.asked = Latch()

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Whatever was asked for, but for a channel on that connection."""
        if connection is self.slow and method.NAME == "Channel.Open":
            self.asked.open()
        else:
            super().on_method(connection, channel, method)


def test_suspects_stay_where_they_are(connect: Connect, serve: Serve) -> None:
    """A connection whose channel was closed hands what was in flight there to no other."""
    behaviour = SlowToReopen()
    broker = serve(behaviour)
    producer = connect(broker, connections=2, declare_topology="off")
    assert all_connected(producer)
    for name in "abcd":
        producer.submit(make_message(name))
    first = {each.properties.message_id: each for each in broker.wait_for_messages(4, LIMIT)}
    suspects = [name for name in "abcd" if first[name].connection is first["a"].connection]
    others = [name for name in "abcd" if name not in suspects]
    assert len(suspects) == 2
    behaviour.slow = first["a"].connection
    behaviour.slow.close_channel(first["a"].channel, 404, "NOT_FOUND")
    assert behaviour.asked.wait(LIMIT)
    busy = first[others[0]]
    busy.connection.close_channel(busy.channel, 404, "NOT_FOUND")
    for count in (5, 6):  # of the other connection, whose new channel lets the first one know
        ack(broker.wait_for_messages(count, LIMIT)[-1])
    all_connected(producer)
    producer.submit(make_message("e"))
    later = [each.properties.message_id for each in broker.wait_for_messages(7, LIMIT)[4:]]
    assert later == [*others, "e"]


@pytest.mark.parametrize("way", ["accepted", "waiting"])
def test_a_deadline_while_a_message_is_handed_over(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The other connection hears of the deadline before it has the message, and keeps it then."""
    producer = connect(serve(Holding("start", times=2)), connections=2, connection_timeout=LIMIT)
    crashes: list[BaseException] = []
    producer.start()
    runtime: Any = producer._life.runtime
    one, two = (engine.io for engine in runtime.engines)
    emit = two._emit

    def listen(event: Any) -> None:
        crashes.extend([event.error] if isinstance(event, events.LoopFailed) else [])
        emit(event)

    monkeypatch.setattr(two, "_emit", listen)
    put, asked = two.io_loop.mailbox.put, threading.Event()

    def put_late(item: Any) -> Any:
        order = getattr(item, "func", None)
        if isinstance(item, Delivery) or order == two.readmit:
            asked.wait(LIMIT)
        done = put(item)
        if order == two.expire:
            asked.set()
        return done

    put_first = one.io_loop.mailbox.put

    def put_and_note(item: Any) -> Any:
        done = put_first(item)
        if getattr(item, "func", None) == one.expire:  # its thread was slow to take the message
            asked.set()
        return done

    monkeypatch.setattr(two.io_loop.mailbox, "put", put_late)
    monkeypatch.setattr(one.io_loop.mailbox, "put", put_and_note)
    if way == "accepted":
        monkeypatch.setattr(one, "peer", lambda _mine=None: two)
    background = Background()
    call = background.call(producer.publish, make_message("m"), timeout=0.3)
    if way == "waiting":
        assert wait_until(lambda: bool(one.sender.waiting) or call.done())
        one.order(lambda: one.pass_on(one.sender.release(suspects=False), two))
    receipt = call.result(LIMIT)
    assert (receipt.outcome, str(receipt.reason)) == (Outcome.DEFERRED, "not connected in time")
    assert crashes == []
    background.gather()


def test_a_loop_that_fails_while_it_closes(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one goes on with that: the thread, and what it has, stayed for good."""
    producer = connect(serve())
    assert all_connected(producer)
    io = io_of(producer)
    close, thread = io.connector.close, producer._life.runtime.engines[0]._threads["io"]  # type: ignore[union-attr]
    failures: list[BaseException] = [SystemExit(), MemoryError()]

    def fail() -> None:
        close()
        if failures:
            raise failures.pop()

    monkeypatch.setattr(io.connector, "close", fail)
    producer.close(0.0)
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert not failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_dead_thread_has_not_read(connect: Connect) -> None:
    """A close settles it, and counts it among what is lost."""
    producer = connect("amqp://127.0.0.1:1")
    producer.start()
    engine: Any = producer._life.runtime.engines[0]  # type: ignore[union-attr]
    engine._closing = True  # or a sweep starts another thread
    let_die(engine)()
    future = producer.submit(make_message("m"))
    assert producer.close(0.1).abandoned == ("m",)
    engine.io.io_loop._loop.close()
    assert isinstance(future.exception(0), ProducerClosedError)
