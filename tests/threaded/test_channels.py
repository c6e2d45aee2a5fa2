"""Brokers that allow few channels, close them at once, or end the connection over a declaration."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pika import spec

from mlproducer import Message, MLProducer, Topology
from mlproducer._core import events
from mlproducer.errors import RetriesExhaustedError, UnroutableError
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, make_message
from tests.threaded.brokers import ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import LETTERS, Happenings, told

FULL_STEP = 0.3
"""Seconds that a set-up has in these tests; a timer of it that is left over goes off meanwhile."""


def confirmed(producer: MLProducer) -> bool:
    """Publish, and return whether that was confirmed at once."""
    return bool(producer.publish(make_message(), timeout=LIMIT).confirmed)


# --- few channels ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["active", "passive", "off"])
def test_one_channel_is_enough(
    connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """A broker with ``channel_max`` 1: no health check, which is said once, and no reconnect."""

    class One(Behaviour):
        channel_max = 1

    broker = serve(One())
    producer = connect(broker, declare_topology=mode, health_check_interval=0.05)
    faults = health_faults(producer)
    with caplog.at_level(logging.ERROR, "mlproducer"):
        assert confirmed(producer)
        faults.wait_until(lambda: len(faults.seen) >= 1)
        lost = told(producer, events.ChannelLost, lambda event: event.loss.reply_code)
        broker.connections[0].close_channel(1, 404, "NOT_FOUND")
        lost.wait_for(404)
        assert confirmed(producer)  # on another channel, after that one
    assert broker.accepted == 1
    [line] = [each for each in caplog.messages if "health check" in each]
    assert "no second channel" in line


def health_faults(producer: MLProducer) -> Happenings:
    """Watch what the health checks find amiss."""
    producer.start()
    return told(producer, events.HealthFault, lambda event: (event.target, event.loss.text))


def test_a_probe_that_costs_the_connection(connect: Connect, serve: Serve) -> None:
    """A user whose limit is one channel: RabbitMQ ends the connection over a second; once only."""

    class Limited(Behaviour):
        def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
            if isinstance(method, spec.Channel.Open) and channel > 1:
                connection.close_connection(530, "NOT_ALLOWED - limit (1)")
            else:
                super().on_method(connection, channel, method)

    broker = serve(Limited())
    producer = connect(broker, health_check_interval=0.05)
    faults = health_faults(producer)
    assert producer.publish(make_message()).result(LIMIT).confirmed  # perhaps sent again
    faults.wait_until(lambda: len(faults.seen) == 1)
    broker.wait_for_connections(1, LIMIT)
    assert producer.wait_connected(LIMIT)
    assert confirmed(producer)
    checked = checks_of(producer)
    checked.wait_until(lambda: len(checked.seen) >= 3)
    assert broker.accepted == 2
    assert len(faults.seen) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_connection_that_ends_during_a_probe(connect: Connect, serve: Serve, times: int) -> None:
    """Once it may be by chance, over a message say; twice without an answer it is the probe."""

    class Ends(Behaviour):
        left = times

        def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
            if isinstance(method, spec.Exchange.Declare) and method.passive and self.left:
                self.left -= 1
                connection.close_connection(541, "INTERNAL_ERROR")
            else:
                super().on_method(connection, channel, method)

    broker = serve(Ends())
    producer = connect(broker, health_check_interval=0.05)
    faults = health_faults(producer)
    checked = told(producer, events.HealthChecked, lambda event: event.alive)
    if times == 1:
        checked.wait_for(True, True)
        assert faults.seen == []
    else:
        faults.wait_until(lambda: len(faults.seen) == 1)
    assert producer.publish(make_message()).result(LIMIT).confirmed  # perhaps sent again
    assert broker.accepted == 1 + times


def checks_of(producer: MLProducer) -> Happenings:
    """Watch the health thread ask."""
    engine: Any = producer._life.runtime.engines[0]  # type: ignore[union-attr]
    seen, checks = Happenings(), engine.io._health
    probe = checks._probe

    def note(reply: Any) -> None:
        probe(reply)
        seen.note("asked")

    checks._probe = note
    return seen


# --- channels that are closed at once ----------------------------------------------------------


class ClosesChannels(Behaviour):
    """Answers Confirm.Select by closing the channel.

    :ivar times: how often it does
    """

    def __init__(self, times: int, *, after: bool = False) -> None:
        self.selects = 0
        self.satisfied = threading.Event()
        self._times = times
        self._after = after

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, or close, or both."""
        closes = isinstance(method, spec.Confirm.Select) and self.selects < self._times
        self.selects += isinstance(method, spec.Confirm.Select)
        if self.selects > self._times:
            self.satisfied.set()
        if not closes or self._after:
            super().on_method(connection, channel, method)
        if closes:
            connection.close_channel(channel, 541, "INTERNAL_ERROR")


@pytest.mark.parametrize("after", [False, True])
def test_one_closed_channel_costs_no_connection(
    connect: Connect, serve: Serve, after: bool
) -> None:
    """The next channel is opened on the same connection, which no old timer ends later."""
    behaviour = ClosesChannels(1, after=after)
    broker = serve(behaviour)
    producer = connect(broker, connection_timeout=FULL_STEP)
    producer.start()
    assert behaviour.satisfied.wait(LIMIT)
    until = time.monotonic() + 3 * FULL_STEP
    while time.monotonic() < until:
        assert confirmed(producer)
        threading.Event().wait(FULL_STEP / 10)
    assert broker.accepted == 1


@pytest.mark.parametrize("after", [False, True])
def test_each_channel_closed_is_a_failure(connect: Connect, serve: Serve, after: bool) -> None:
    """A broker that closes each channel is tried again with the backoff, not in a hot loop."""
    behaviour = ClosesChannels(1_000_000, after=after)
    broker = serve(behaviour)
    producer = connect(
        broker,
        max_reconnect_attempts=4,
        reconnect_initial_delay=0.01,
        reconnect_max_delay=0.02,
    )
    gave_up = threading.Event()
    producer.on("gave_up", gave_up.set)
    producer.start()
    assert gave_up.wait(LIMIT)
    assert broker.accepted == 4
    assert behaviour.selects == 8
    assert not producer.is_healthy()


# --- declarations that cost the connection -----------------------------------------------------


class EndsOver(Behaviour):
    """Ends the connection over a declaration, as some brokers that are not RabbitMQ do."""

    def __init__(self, code: int, refuses: Callable[[Any], bool]) -> None:
        self._code = code
        self._refuses = refuses

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, or end."""
        if self._refuses(method):
            connection.close_connection(self._code, "NOT_IMPLEMENTED")
        else:
            super().on_method(connection, channel, method)


@pytest.mark.parametrize("code", [540, 541])
def test_a_declaration_that_ends_the_connection_is_skipped(
    connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """It is reported, left out on the next connection, and publishing goes on."""
    broker = serve(EndsOver(code, lambda m: getattr(m, "queue", "") == "ml.embed"))
    producer = connect(broker, declare_topology="active", max_reconnect_attempts=3)
    with caplog.at_level(logging.ERROR, "mlproducer"):
        assert confirmed(producer)
    assert broker.accepted == 3  # its declaration, then its binding
    assert producer.status().reconnect_attempts == 0
    faults = [each for each in caplog.messages if each.startswith("cannot declare")]
    assert len(faults) == 2
    assert all("target=ml.embed" in each and f"code={code}" in each for each in faults)


def test_every_declaration_ends_the_connection(connect: Connect, serve: Serve) -> None:
    """However many they are, they are no failed attempts, and publishing begins in the end."""

    def refuses(method: Any) -> bool:
        return isinstance(method, (spec.Exchange.Declare, spec.Queue.Declare, spec.Queue.Bind))

    broker = serve(EndsOver(540, refuses))
    producer = connect(
        broker,
        declare_topology="active",
        max_reconnect_attempts=1,
        reconnect_initial_delay=0.01,
        health_check_interval=60.0,
    )
    assert confirmed(producer)


def test_a_shutdown_during_a_declaration_accuses_none(connect: Connect, serve: Serve) -> None:
    """CONNECTION_FORCED is no answer to the declaration that was under way."""
    seen: list[str] = []

    class StopsOnce(Behaviour):
        def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
            if isinstance(method, spec.Queue.Declare):
                seen.append(method.queue)
                if len(seen) == 1:
                    connection.close_connection(320, "CONNECTION_FORCED - shutdown")
                    return
            super().on_method(connection, channel, method)

    producer = connect(serve(StopsOnce()), declare_topology="active")
    assert producer.wait_connected(LIMIT)
    assert confirmed(producer)
    assert seen[0] == seen[1]


def test_a_probe_that_the_broker_does_not_implement(connect: Connect, serve: Serve) -> None:
    """A passive declare that ends the connection is not asked again and again."""
    broker = serve(EndsOver(540, lambda m: getattr(m, "passive", False)))
    producer = connect(broker, health_check_interval=0.05)
    faults = health_faults(producer)
    faults.wait_until(lambda: len(faults.seen) == 1)
    assert producer.wait_connected(LIMIT)
    checked = checks_of(producer)
    checked.wait_until(lambda: len(checked.seen) >= 3)
    assert confirmed(producer)
    assert broker.accepted == 2


# --- an exchange that delivers later -----------------------------------------------------------


class Returns(Behaviour):
    """Returns every message, and acks it, as the delayed message plugin does."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Return and ack."""
        connection.return_(channel, message)
        connection.ack(channel, tag)


@pytest.mark.parametrize("mode", ["active", "off"])
def test_a_return_of_a_delayed_message_is_no_failure(
    connect: Connect, serve: Serve, mode: str
) -> None:
    """The plugin's exchange takes the message and returns it; it goes out once."""
    topology = Topology(exchange="later", exchange_type="x-delayed-message")
    broker = serve(Returns())
    producer = connect(broker, declare_topology=mode, topology=topology)
    later = Message(body=b"x", routing_key="k", exchange="later", headers={"x-delay": 5000})
    assert producer.publish(later).confirmed
    assert len(broker.messages) == 1
    at_once = Message(body=b"x", routing_key="k", exchange="later")
    with pytest.raises(UnroutableError):  # without a delay it routes like any other exchange
        producer.publish(at_once, retry=False)
    elsewhere = Message(body=b"x", routing_key="k", exchange="other", headers={"x-delay": 5000})
    with pytest.raises(UnroutableError):
        producer.publish(elsewhere, retry=False)


# --- dead letters that the broker does not take ------------------------------------------------


class RefusesLetters(Behaviour):
    """Nacks what is doomed, and closes the channel over dead letters.

    :ivar code: with which it does; 0: it takes them
    :ivar poison: the one letter that it refuses; ``None``: all
    """

    def __init__(self, code: int, poison: bytes | None = None) -> None:
        self.code = code
        self.letters: list[bytes] = []
        self.refused = Happenings()
        self._poison = poison

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Ack, nack, or close."""
        letter = message.exchange == LETTERS
        if letter and self.code and self._poison in (None, message.body):
            connection.close_channel(channel, self.code, "refused")
            self.refused.note(message.body)
        elif message.body.startswith(b"doomed") and not letter:
            connection.nack(channel, tag)
        else:
            self.letters += [message.body] if letter else []
            connection.later(0.005, connection.ack, channel, tag)  # so that others are in flight


LETTERED: dict[str, Any] = {"max_message_retries": 0}


@pytest.mark.parametrize("code", [403, 404])
def test_letters_that_are_refused_hit_no_other_message(
    connect: Connect, serve: Serve, code: int
) -> None:
    """Their exchange is closed to us: others arrive once, whatever becomes of the letters."""
    behaviour = RefusesLetters(code)
    broker = serve(behaviour)
    producer = connect(broker, **LETTERED)
    assert producer.wait_connected(LIMIT)
    doomed = [producer.submit(make_message(body=b"doomed")) for _ in range(5)]
    count = 0
    while len(behaviour.refused.seen) < 3:
        futures = [producer.submit(make_message(f"m{count + n}")) for n in range(50)]
        assert all(future.result(LIMIT).attempts == 1 for future in futures)
        count += 50
    arrived = [each.properties.message_id for each in broker.messages if each.body == b"body"]
    assert len(arrived) == len(set(arrived)) == count
    assert not any(future.done() for future in doomed)
    assert producer.status().dead_letters == 5
    behaviour.code = 0
    for future in doomed:
        with pytest.raises(RetriesExhaustedError):
            future.result(LIMIT)
    assert len(behaviour.letters) == 5
    assert broker.accepted == 1
    assert confirmed(producer)


class AcksTooMuch(RefusesLetters):
    """Acks the first letter by a tag that was never sent, and those that come after it rightly."""

    def __init__(self) -> None:
        super().__init__(0)
        self.first: ReceivedMessage | None = None

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Ack up to a tag beyond the last, and then another message."""
        if message.exchange == LETTERS and self.first is None:
            self.first = message
            connection.ack(channel, tag + 1, multiple=True)
            self.refused.note(message.body)
        else:
            super().on_publish(connection, channel, tag, message)


def test_a_confirm_of_what_was_never_sent_settles_no_letter(connect: Connect, serve: Serve) -> None:
    """As with any other message: it is a dead letter until its own confirm comes."""
    behaviour = AcksTooMuch()
    producer = connect(serve(behaviour), **LETTERED)
    doomed = producer.submit(make_message(body=b"doomed"))
    behaviour.refused.wait_for(b"doomed")
    assert confirmed(producer)  # whose ack came behind the other
    assert not doomed.done()
    assert producer.status().dead_letters == 1
    assert behaviour.first is not None
    ack(behaviour.first)
    with pytest.raises(RetriesExhaustedError):
        doomed.result(LIMIT)


def test_one_letter_that_is_refused_hits_no_other_letter(connect: Connect, serve: Serve) -> None:
    """It alone stays, and is tried again; the others arrive."""
    behaviour = RefusesLetters(406, poison=b"doomed 3")
    broker = serve(behaviour)
    producer = connect(broker, **LETTERED)
    futures = [producer.submit(make_message(body=b"doomed %d" % n)) for n in range(10)]
    for n, future in enumerate(futures):
        if n != 3:
            with pytest.raises(RetriesExhaustedError):
                future.result(LIMIT)
    behaviour.refused.wait_until(lambda: len(behaviour.refused.seen) >= 3)
    assert not futures[3].done()
    assert set(behaviour.letters) == {b"doomed %d" % n for n in range(10) if n != 3}
    behaviour.code = 0
    with pytest.raises(RetriesExhaustedError):
        futures[3].result(LIMIT)
    assert broker.accepted == 1


def test_letters_where_there_is_one_channel(connect: Connect, serve: Serve) -> None:
    """They go with all others where the broker allows no channel of their own."""

    class One(RefusesLetters):
        channel_max = 1

    behaviour = One(0)
    broker = serve(behaviour)
    producer = connect(broker, **LETTERED, confirm_give_up=0.5)
    assert producer.wait_connected(LIMIT)
    for body in (b"doomed 1", b"doomed 2"):
        future = producer.submit(make_message(body=body))
        with pytest.raises(RetriesExhaustedError):
            future.result(LIMIT)
        assert confirmed(producer)
    assert behaviour.letters == [b"doomed 1", b"doomed 2"]
    assert broker.accepted <= 2


class AcksInBursts(RefusesLetters):
    """Acks with ``multiple``, rarely, and letters even later."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Ack ten at once, nack what is doomed."""
        if message.exchange == LETTERS:
            self.letters.append(message.body)
            connection.later(0.05, connection.ack, channel, tag)
        elif message.body.startswith(b"doomed"):
            connection.nack(channel, tag)
        else:
            connection.later(0.01, lambda: connection.ack(channel, tag, multiple=tag % 10 == 0))


def test_confirms_of_both_channels_meet_the_right_messages(connect: Connect, serve: Serve) -> None:
    """Acks of several, nacks and letters' acks, all mixed: each message has its own end."""
    behaviour = AcksInBursts(0)
    producer = connect(serve(behaviour), **LETTERED)
    ends: dict[bytes, Any] = {}
    for n in range(2000):
        body = b"doomed %d" % n if n % 7 == 0 else b"good %d" % n
        ends[body] = producer.submit(make_message(body=body))
    for body, future in ends.items():
        if body.startswith(b"good"):
            assert future.result(LIMIT).attempts == 1
        else:
            assert isinstance(future.exception(LIMIT), RetriesExhaustedError)
    assert set(behaviour.letters) == {body for body in ends if body.startswith(b"doomed")}
    assert len(behaviour.letters) == len(set(behaviour.letters))
