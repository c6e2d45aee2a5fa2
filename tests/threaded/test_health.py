"""The health check: who is given up, who is alive, when it asks and when it keeps still."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any, Literal

import pytest
from pika import spec

from mlproducer import Message, MLProducer
from mlproducer._core import events
from mlproducer._engine import health, io_thread
from mlproducer._engine.pika_adapters import Traffic
from mlproducer._engine.threads import TimerThread
from mlproducer.errors import ConfirmTimeoutError, PublishError
from mlproducer.settings import topology_of
from mlproducer.testing.fake_broker import FakeConnection
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, Background, make_message, wait_until
from tests.stopwatch import Stopwatch, in_time
from tests.threaded.brokers import ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import Happenings, Moody, events_of, io_of, told

OFTEN, NEVER = 0.02, 3600.0


class Patient(Moody):
    """A broker that answers questions as the test wants.

    :ivar numb: connections that answer no question
    :ivar fault: a reply code with which passive declares are refused
    :ivar depth: messages in each queue
    :ivar hold: keep answers about queues back
    """

    def __init__(self, mood: str = "ack") -> None:
        super().__init__(mood)
        self.numb: set[FakeConnection] = set()
        self.fault = 0
        self.depth = 0
        self.hold = False
        self.held: list[tuple[FakeConnection, int, Any]] = []

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, or not."""
        passive = getattr(method, "passive", False)
        if connection in self.numb:
            return
        if passive and self.fault:
            self.asked.release()
            connection.close_channel(channel, self.fault, "because")
        elif passive and isinstance(method, spec.Queue.Declare):
            self.held.append((connection, channel, method))
            if not self.hold:
                self.answer_held()
        else:
            super().on_method(connection, channel, method)

    def answer_held(self) -> None:
        """Say how much is in the queues that were asked for."""
        while self.held:
            connection, channel, method = self.held.pop(0)
            connection.send_method(channel, spec.Queue.DeclareOk(method.queue, self.depth, 0))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """Shorten the time that a broker has for its answer."""
    monkeypatch.setattr(health, "ANSWER_LIMIT", 0.2)
    return 0.2


def queues(producer: MLProducer) -> tuple[str, ...]:
    """The queues whose depth is read."""
    return tuple(queue.name for queue in topology_of(producer.settings).queues)


# --- silence -----------------------------------------------------------------------------------


def test_a_silent_broker_is_given_up(connect: Connect, serve: Serve) -> None:
    """A confirm timeout asks at once; 5 s without an answer, and it goes elsewhere (22)."""
    patient = Patient("silent")
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.wait_connected(LIMIT)
    lost = told(
        producer, events.Disconnected, lambda event: (watch.wall(), watch.own(), event.loss.text)
    )
    patient.numb.add(broker.connections[0])
    watch = Stopwatch()
    receipt = producer.publish(make_message("m"), timeout=0.1)
    assert isinstance(receipt.reason, ConfirmTimeoutError)
    patient.mood = "ack"
    assert receipt.result(LIMIT + 2.0).attempts == 2
    [(after, own, why)] = lost.seen
    assert after >= 5.1
    assert own < 6.5
    assert "no answer to the health check" in why
    assert len(patient.times("m")) == 2


@pytest.mark.parametrize("direction", ["c2s", "s2c", "both"])
def test_a_path_dead_in_one_direction(
    connect: Connect, serve: Serve, impatient: float, direction: Literal["c2s", "s2c", "both"]
) -> None:
    """Without traffic the interval's check finds it, and a new connection takes over (23, 25)."""
    broker = serve(Moody())
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url), health_check_interval=0.1)
        assert producer.wait_connected(LIMIT)
        lost = events_of(producer, "disconnected", "connected")
        proxy.hole(direction)
        lost.wait_until(lambda: "disconnected" in lost.seen)
        proxy.heal()
        lost.wait_until(lambda: "connected" in lost.seen)
        assert producer.publish(make_message()).result(LIMIT).confirmed  # a late answer loses it
        producer.close(0.1)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux says it")
def test_what_the_kernel_says_of_a_connection(connect: Connect, serve: Serve) -> None:
    """How much the other host has taken, and how much waits, here and in pika's buffer."""
    with Proxy(("127.0.0.1", serve(Patient()).port)) as proxy:
        producer = connect(proxy.url("amqp://guest:guest@localhost/"))
        assert producer.wait_connected(LIMIT)
        connection: Any = io_of(producer).connector.connection
        assert wait_until(lambda: connection.traffic().waiting == 0)
        before = connection.traffic()
        proxy.stall("c2s")
        size = 16 * 1024 * 1024  # more than the kernel and the proxy hold
        future = producer.submit(Message(body=bytes(size), exchange="e", routing_key="k"))
        assert wait_until(lambda: connection.traffic().waiting > 0)
        proxy.resume()
        assert future.result(LIMIT).confirmed
        assert wait_until(lambda: connection.traffic().waiting == 0)
        after = connection.traffic()
        assert after.taken >= before.taken + size
        assert after.received > before.received


def test_confirms_over_a_slow_link_are_not_overdue(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other host goes on taking what waits, its channel is not replaced."""
    monkeypatch.setattr(io_thread, "TICK", 0.02)
    broker = serve(Patient("silent"))
    producer = connect(broker, health_check_interval=NEVER, confirm_give_up=0.05)
    assert producer.wait_connected(LIMIT)
    connection: Any = io_of(producer).connector.connection
    looks: list[Traffic] = []
    moving = threading.Event()
    moving.set()

    def traffic() -> Traffic:
        looks.append(Traffic(0, len(looks) + 1 if moving.is_set() else 0, 1))
        return looks[-1]

    connection.traffic = traffic
    producer.submit(make_message())
    assert wait_until(lambda: len(looks) > 10)
    assert broker.accepted == 1
    moving.clear()
    broker.wait_for_messages(2, LIMIT)


def test_a_freeze_that_ends_in_time(connect: Connect, serve: Serve) -> None:
    """An answer that comes late, but within the limit, saves the connection: no duplicate (21)."""
    patient = Patient()
    broker = serve(patient)
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url), health_check_interval=NEVER)
        assert producer.publish(make_message()).confirmed
        checked = told(producer, events.HealthChecked, lambda event: event.alive)
        proxy.stall()
        receipt = producer.publish(make_message("m"), timeout=0.1)
        assert isinstance(receipt.reason, ConfirmTimeoutError)
        proxy.resume()
        checked.wait_for(True)
        assert receipt.result(LIMIT).attempts == 1
        producer.close(0.1)
    assert broker.accepted == 1
    assert len(patient.times("m")) == 1


# --- any answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [403, 404])
def test_a_fault_is_reported_and_alive(connect: Connect, serve: Serve, code: int) -> None:
    """What is missing or forbidden does not cost the connection, however often it is found."""
    patient = Patient()
    patient.fault = code
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.wait_connected(LIMIT)
    faults = told(producer, events.HealthFault, lambda event: (event.target, event.loss.reply_code))
    checked = told(producer, events.HealthChecked, lambda event: event.alive)
    for number in range(1, 6):
        io_of(producer)._health.check_soon()
        checked.wait_until(lambda number=number: len(checked.seen) == number)
    assert set(faults.seen) == {(producer.settings.exchange, code)}
    assert set(checked.seen) == {True}
    assert producer.publish(make_message()).confirmed
    assert broker.accepted == 1


def test_reads_the_depth_of_the_queues(connect: Connect, serve: Serve) -> None:
    """Each check reads how much waits in each queue, on a channel that it closes again."""
    patient = Patient()
    patient.depth = 7
    producer = connect(serve(patient), health_check_interval=OFTEN)
    assert producer.wait_connected(LIMIT)
    depths = told(producer, events.QueueDepth, lambda event: (event.queue, event.messages))
    names = queues(producer)
    # A check that does not get through before the next one is due leaves the rest to it.
    each = [(name, 7) for name in names]
    depths.wait_until(lambda: depths.seen[-len(each) :] == each)


# --- a broker that answers, and does not confirm ----------------------------------------------


def test_not_confirming(connect: Connect, serve: Serve) -> None:
    """Three confirm timeouts without a confirm are not healthy, though the probe is answered."""
    patient = Patient("silent")
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.wait_connected(LIMIT)
    for number in range(3):
        assert producer.status().confirming, number
        assert producer.is_healthy()
        producer.publish(make_message(), timeout=0.05)
    assert not producer.status().confirming
    assert not producer.is_healthy()
    assert patient.asked.acquire(timeout=LIMIT)
    confirmed = told(producer, events.Confirmed, lambda _event: None)
    ack(broker.messages[0])
    confirmed.wait_until(lambda: len(confirmed.seen) == 1)
    assert producer.is_healthy()


@pytest.mark.parametrize("retry", [True, False])
def test_not_confirming_and_lost(connect: Connect, serve: Serve, retry: bool) -> None:
    """A new connection alone is no confirm, unless nothing is left to be confirmed on it."""
    broker = serve(Patient("silent"))
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.wait_connected(LIMIT)

    def unconfirmed() -> bool:  # the second and third in a row, or more that were not even sent
        with contextlib.suppress(PublishError):
            producer.publish(make_message(), timeout=0.05, retry=retry)
        return not producer.is_healthy()

    assert wait_until(unconfirmed)
    connected = events_of(producer, "connected")
    broker.connections[0].reset()
    connected.wait_for("connected")
    assert producer.status().confirming is not retry


# --- when it asks ------------------------------------------------------------------------------


def test_a_confirm_timeout_asks_at_once(connect: Connect, serve: Serve) -> None:
    """Not a confirm that comes in time; one that is late, and without waiting for the interval."""
    patient = Patient()
    producer = connect(serve(patient), health_check_interval=NEVER)
    assert producer.publish(make_message()).confirmed
    assert not patient.asked.acquire(blocking=False)
    patient.mood = "silent"
    with in_time(1.0):
        producer.publish(make_message(), timeout=0.05)
        assert patient.asked.acquire(timeout=LIMIT)


def test_a_submit_that_waits_does_not_ask(connect: Connect, serve: Serve) -> None:
    """It has no timeout of its own."""
    patient = Patient("silent")
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER, publish_timeout=0.05)
    producer.submit(make_message())
    broker.wait_for_messages(1, LIMIT)
    assert not patient.asked.acquire(timeout=0.2)


def test_muted_while_blocked(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker under an alarm does not read; it is not asked, and not given up (32)."""
    patient = Patient()
    broker = serve(patient)
    producer = connect(broker, health_check_interval=OFTEN)
    flow = events_of(producer, "blocked", "unblocked", "disconnected")
    assert producer.wait_connected(LIMIT)
    assert patient.asked.acquire(timeout=LIMIT)
    broker.connections[0].block()
    flow.wait_for("blocked")
    with monkeypatch.context() as impatient:
        impatient.setattr(health, "ANSWER_LIMIT", 0.1)
        checks = probes_of(producer)
        checks.wait_until(lambda: checks.seen and checks.seen[-1] - checks.seen[0] > 1.0)
    broker.connections[0].unblock()
    flow.wait_for("blocked", "unblocked")
    assert producer.publish(make_message()).confirmed
    assert broker.accepted == 1


def test_blocked_while_it_asks(connect: Connect, serve: Serve) -> None:
    """An alarm that comes between question and answer ends the check without a verdict."""
    patient = Patient()
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.publish(make_message()).confirmed
    checked = told(producer, events.HealthChecked, lambda event: event.alive)
    flow = events_of(producer, "blocked", "unblocked", "disconnected")
    [connection] = broker.connections
    patient.numb.add(connection)
    patient.mood = "silent"
    producer.publish(make_message(), timeout=0.01)
    connection.block()
    flow.wait_for("blocked")
    checks = probes_of(producer)
    patient.numb.clear()
    connection.unblock()
    flow.wait_for("blocked", "unblocked")
    io_of(producer)._health.check_soon()
    checks.wait_until(lambda: len(checks.seen) == 1)
    checked.wait_for(True)
    assert set(checked.seen) == {True}
    assert broker.accepted == 1


def test_overlapping_checks(connect: Connect, serve: Serve) -> None:
    """A check that still reads queues is not disturbed by the next; each reads its own."""
    patient = Patient("silent")
    patient.hold = True
    broker = serve(patient)
    producer = connect(broker, health_check_interval=NEVER)
    assert producer.wait_connected(LIMIT)
    depths = told(producer, events.QueueDepth, lambda event: event.queue)
    crashed = told(producer, events.LoopFailed, lambda event: event.error)
    for _ in range(2):
        producer.publish(make_message(), timeout=0.5)
        assert patient.asked.acquire(timeout=LIMIT)
    io_of(producer)._health.check_soon()
    assert patient.asked.acquire(timeout=LIMIT)
    patient.hold = False
    patient.answer_held()
    names = queues(producer)
    depths.wait_until(lambda: len(depths.seen) == 3 * len(names))
    assert sorted(depths.seen) == sorted(3 * names)
    assert crashed.seen == []
    assert broker.accepted == 1


def probes_of(producer: MLProducer) -> Happenings:
    """Watch when the health thread asks the I/O thread for a check."""
    asked = Happenings()
    checks = io_of(producer)._health
    probe = checks._probe

    def note(reply: Any) -> None:
        probe(reply)
        asked.note(time.monotonic())

    checks._probe = note
    return asked


def test_a_check_that_is_due_at_once_is_not_slept_over() -> None:
    """Before Python 3.13 a queue of the standard library may, once in a thousand times.

    The thread of such a check was never heard of again.
    """

    def wait() -> int:
        for _ in range(20_000):
            checks: list[None] = []
            thread = TimerThread(lambda checks=checks: checks.append(None))  # type: ignore[misc]
            thread.due = time.monotonic() + 5e-6
            while not checks:
                assert not thread.step(after_order=False)
        return 20_000

    background = Background()
    background.call(wait)
    assert background.gather() == [20_000]
