"""The fake broker, seen by pika's own clients and by a bare socket.

Runs on: the test's thread.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest
from pika import frame, spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout

from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage
from tests.stopwatch import in_time

LIMIT = 120.0


class Silent(Behaviour):
    """Never confirms by itself."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Leave it to the test."""


class Connections:
    """Opens pika's clients, and closes what is left of them."""

    def __init__(self) -> None:
        self._opened: list[pika.BlockingConnection] = []

    def open(self, broker: FakeBroker, **options: Any) -> pika.BlockingConnection:
        """A connection, its Connection.Open answered."""
        parameters = pika.URLParameters(broker.url)
        parameters.socket_timeout = parameters.stack_timeout = LIMIT
        for name, value in options.items():
            setattr(parameters, name, value)
        self._opened.append(pika.BlockingConnection(parameters))
        return self._opened[-1]

    def channel(self, broker: FakeBroker) -> BlockingChannel:
        """A channel in confirm mode on a connection of its own."""
        channel = self.open(broker).channel()
        channel.confirm_delivery()
        return channel

    def close(self) -> None:
        """Close what is still open."""
        for connection in self._opened:
            if connection.is_open:
                connection.close()


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Clients; create it after the broker, or close them in the test."""
    connections = Connections()
    yield connections
    connections.close()


class Confirms:
    """A SelectConnection on the test's thread that publishes, and notes what the broker says."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self._bodies = bodies
        self._enough = 0
        self.connection = pika.SelectConnection(
            pika.URLParameters(url), on_open_callback=self._on_open
        )
        self.connection.add_on_close_callback(lambda _, why: self._hear("closed", type(why)))

    def run(self, enough: int) -> list[tuple[Any, ...]]:
        """What was heard, once it is `enough`."""
        self._enough = enough
        limit = self.connection.ioloop.call_later(LIMIT, self.connection.ioloop.stop)
        if len(self.heard) < enough:
            self.connection.ioloop.start()
        self.connection.ioloop.remove_timeout(limit)
        return self.heard

    def close(self) -> None:
        """Close in order, and run to the end."""
        if self.connection.is_open:
            self.connection.close()
            self.run(len(self.heard) + 1)
        self.connection.ioloop.close()

    def _hear(self, *words: Any) -> None:
        self.heard.append(words)
        if len(self.heard) >= self._enough:
            self.connection.ioloop.stop()

    def _on_open(self, connection: pika.SelectConnection) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_return_callback(
            lambda _, method, __, body: self._hear("return", method.reply_code, body)
        )
        channel.confirm_delivery(self._on_confirm, callback=lambda _: self._publish(channel))

    def _publish(self, channel: Any) -> None:
        for body in self._bodies:
            channel.basic_publish("", "q", body, mandatory=True)

    def _on_confirm(self, method: Any) -> None:
        self._hear(
            method.method.NAME.removeprefix("Basic.").lower(),
            method.method.delivery_tag,
            method.method.multiple,
        )


def descriptors() -> list[str]:
    """What this process has open."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def on(broker: FakeBroker) -> FakeConnection:
    """The broker's end of the only connection."""
    [connection] = broker.wait_for_connections(1, LIMIT)
    return connection


def test_pika_publishes_and_is_confirmed(connections: Connections) -> None:
    """A blocking client declares, publishes and closes as with RabbitMQ; all is recorded."""
    with FakeBroker() as broker:
        channel = connections.channel(broker)
        channel.exchange_declare("x", exchange_type="topic", durable=True)
        channel.exchange_declare("x", passive=True)
        assert channel.queue_declare("q", durable=True).method.queue == "q"
        channel.queue_bind("q", "x", "ml.#")
        properties = pika.BasicProperties(message_id="m1", headers={"n": 1}, delivery_mode=2)
        channel.basic_publish("x", "ml.embed", b"body", properties, mandatory=True)
        [message] = broker.wait_for_messages(1, LIMIT)
        assert (message.exchange, message.routing_key, message.body) == ("x", "ml.embed", b"body")
        assert (message.mandatory, message.tag, message.channel) == (True, 1, 1)
        assert message.properties == properties
        assert message.connection is on(broker)
        connections.close()
        assert broker.wait_for_connections(0, LIMIT) == ()


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 400_000])
def test_bodies_of_any_number_of_frames(connections: Connections, size: int) -> None:
    """An empty body, one that fills a frame, and one of several frames are put together."""
    with FakeBroker() as broker:
        body = os.urandom(size)
        connections.channel(broker).basic_publish("", "q", body)
        assert broker.wait_for_messages(1, LIMIT)[0].body == body
        connections.close()


def test_tags_count_per_channel_from_confirm_select(connections: Connections) -> None:
    """Each confirming channel counts from 1; on a plain one there is no tag and no ack."""
    with FakeBroker() as broker:
        connection = connections.open(broker)
        plain, first, second = (connection.channel() for _ in range(3))
        plain.basic_publish("", "q", b"plain")
        for channel in (first, second):
            channel.confirm_delivery()
            channel.basic_publish("", "q", b"1")
        first.basic_publish("", "q", b"2")
        messages = broker.wait_for_messages(4, LIMIT)
        assert [(m.channel, m.tag) for m in messages] == [(1, 0), (2, 1), (3, 1), (2, 2)]
        connections.close()


def test_a_message_shows_neither_body_nor_properties(connections: Connections) -> None:
    """The record's repr holds no user text."""
    with FakeBroker() as broker:
        properties = pika.BasicProperties(headers={"secret": "word"})
        connections.channel(broker).basic_publish("", "q", b"user text", properties)
        [message] = broker.messages
        assert "user" not in repr(message)
        assert "secret" not in repr(message)
        connections.close()


def test_confirms_as_a_test_gives_them() -> None:
    """Acks out of order, multiple, nacks and double acks reach the client as they were sent."""
    with FakeBroker(Silent()) as broker:
        client = Confirms(broker.url, [b"a", b"b", b"c", b"d"])
        sender = threading.Thread(target=confirm_oddly, args=(broker,))
        sender.start()
        assert client.run(5) == [
            ("ack", 3, False),
            ("nack", 1, False),
            ("ack", 4, True),
            ("ack", 4, False),
            ("ack", 99, False),
        ]
        sender.join(timeout=LIMIT)
        client.close()


def confirm_oddly(broker: FakeBroker) -> None:
    """Out of order, a nack, multiple, double, and one that was never sent."""
    message = broker.wait_for_messages(4, LIMIT)[0]
    connection, channel = message.connection, message.channel
    connection.ack(channel, 3)
    connection.nack(channel, 1)
    connection.ack(channel, 4, multiple=True)
    connection.ack(channel, 4)
    connection.ack(channel, 99)


def test_return_comes_before_the_ack_with_the_whole_body() -> None:
    """return_ sends method, header and all body frames back; the ack follows."""

    class Unroutable(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            connection.return_(channel, message)
            super().on_publish(connection, channel, tag, message)

    body = os.urandom(300_000)
    with FakeBroker(Unroutable()) as broker:
        client = Confirms(broker.url, [body, b""])
        assert client.run(4) == [
            ("return", 312, body),
            ("ack", 1, False),
            ("return", 312, b""),
            ("ack", 2, False),
        ]
        client.close()


def test_later_delays_and_keeps_heartbeats_and_others_going() -> None:
    """A late ack comes after its time, and does not hold up one that is due at once."""

    class FirstIsLate(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            connection.later(0.2 if tag == 1 else 0.0, connection.ack, channel, tag)

    with FakeBroker(FirstIsLate()) as broker:
        start = time.monotonic()
        client = Confirms(broker.url, [b"a", b"b"])
        assert client.run(2) == [("ack", 2, False), ("ack", 1, False)]
        assert time.monotonic() - start >= 0.2
        client.close()


def test_later_drops_what_is_for_a_client_that_has_gone(connections: Connections) -> None:
    """A timer of a connection that has ended does nothing, and so do its methods."""
    with FakeBroker() as broker:
        client = connections.open(broker)
        connection = on(broker)
        called = threading.Event()
        connection.later(0.02, called.set)
        connection.reset()
        connection.ack(1, 1)
        connection.close_connection(320, "CONNECTION_FORCED")
        assert not called.wait(0.1)
        assert not connection.is_open
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            client.process_data_events(time_limit=LIMIT)


def test_held_start_is_a_handshake_that_never_comes(connections: Connections) -> None:
    """A behaviour that does not answer the protocol header leaves the client waiting."""

    class HoldsStart(Behaviour):
        def on_connect(self, connection: FakeConnection) -> None:
            """Say nothing."""

    with FakeBroker(HoldsStart()) as broker:
        with pytest.raises(AMQPConnectorStackTimeout):
            connections.open(broker, stack_timeout=0.3)
        assert broker.accepted == 1


def test_a_server_that_is_no_amqp(connections: Connections) -> None:
    """A behaviour may answer with anything, and end."""

    class Web(Behaviour):
        def on_connect(self, connection: FakeConnection) -> None:
            connection.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    with FakeBroker(Web()) as broker, pytest.raises(pika.exceptions.AMQPConnectionError):
        connections.open(broker)


@pytest.mark.parametrize(
    ("hook", "code", "error"),
    [
        ("on_start_ok", 403, pika.exceptions.ProbableAuthenticationError),
        ("on_open", 530, pika.exceptions.ProbableAccessDeniedError),
    ],
)
def test_refusals_in_the_handshake(
    connections: Connections, hook: str, code: int, error: type[Exception]
) -> None:
    """Credentials and virtual host are refused with a code, as RabbitMQ does it."""
    behaviour = Behaviour()
    refuse = lambda connection, _: connection.close_connection(code, "REFUSED")  # noqa: E731
    setattr(behaviour, hook, refuse)
    with FakeBroker(behaviour) as broker, pytest.raises(error, match=str(code)):
        connections.open(broker)


def test_capabilities_are_announced(connections: Connections) -> None:
    """The client sees the capabilities of the behaviour, by default those of RabbitMQ."""

    class NoConfirms(Behaviour):
        capabilities = {"basic.nack": True}  # noqa: RUF012

    with FakeBroker() as broker:
        assert connections.open(broker).publisher_confirms_supported
        connections.close()
    with FakeBroker(NoConfirms()) as broker:
        assert not connections.open(broker).publisher_confirms_supported
        assert connections.open(broker).basic_nack_supported
        connections.close()


def test_a_method_that_is_not_answered(connections: Connections) -> None:
    """on_method may hold one reply and give the rest; the selected channel counts all the same."""

    class HoldsSelectOk(Behaviour):
        def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
            if not isinstance(method, spec.Confirm.Select):
                super().on_method(connection, channel, method)
            else:
                connection.later(0.05, super().on_method, connection, channel, method)

    with FakeBroker(HoldsSelectOk()) as broker:
        connections.channel(broker).basic_publish("", "q", b"")
        assert broker.wait_for_messages(1, LIMIT)[0].tag == 1
        connections.close()


def test_close_channel_ends_one_channel(connections: Connections) -> None:
    """404 on a publish closes its channel, ignores what follows on it, and spares the others."""

    class Missing(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            if message.exchange == "missing":
                connection.close_channel(channel, 404, "NOT_FOUND - no exchange")
            else:
                super().on_publish(connection, channel, tag, message)

    with FakeBroker(Missing()) as broker:
        connection = connections.open(broker)
        good, bad = connection.channel(), connection.channel()
        for channel in (good, bad):
            channel.confirm_delivery()
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="404"):
            bad.basic_publish("missing", "q", b"")
        good.basic_publish("", "q", b"")
        again = connection.channel(channel_number=bad.channel_number)
        again.confirm_delivery()
        again.basic_publish("", "q", b"")
        assert [m.tag for m in broker.messages] == [1, 1, 1]
        connections.close()


def test_close_connection_ends_in_order(connections: Connections) -> None:
    """close_connection carries code and text, and the client's CloseOk ends the connection."""
    with FakeBroker() as broker:
        connection = connections.open(broker)
        on(broker).close_connection(320, "CONNECTION_FORCED - shutdown")
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="320"):
            connection.process_data_events(time_limit=LIMIT)
        broker.wait_for_connections(0, LIMIT)


def test_block_stops_reading_until_unblock(connections: Connections) -> None:
    """Blocked and Unblocked reach the client; in between nothing is read, afterwards all is."""
    with FakeBroker() as broker:
        connection = connections.open(broker)
        channel = connection.channel()
        heard: list[str] = []
        connection.add_on_connection_blocked_callback(
            lambda _, frame: heard.append(frame.method.reason)
        )
        connection.add_on_connection_unblocked_callback(lambda _, __: heard.append("unblocked"))
        on(broker).block("low on disk")
        connection.process_data_events(time_limit=LIMIT)
        assert heard == ["low on disk"]
        channel.basic_publish("", "q", b"waits")
        with pytest.raises(TimeoutError, match="0 messages"):
            broker.wait_for_messages(1, 0.1)
        on(broker).unblock()
        broker.wait_for_messages(1, LIMIT)
        connection.process_data_events(time_limit=LIMIT)
        assert heard == ["low on disk", "unblocked"]
        connections.close()


def test_block_may_go_on_reading(connections: Connections) -> None:
    """With keep_reading a test sees what a client writes in spite of Blocked."""
    with FakeBroker() as broker:
        channel = connections.open(broker).channel()
        on(broker).block(keep_reading=True)
        channel.basic_publish("", "q", b"unruly")
        assert broker.wait_for_messages(1, LIMIT)[0].body == b"unruly"
        connections.close()


HOSTILE: dict[str, Callable[[FakeConnection], None]] = {
    "wrong end octet": lambda c: c.send_frame(spec.FRAME_METHOD, 1, bytes(8), end=0),
    "unknown frame type": lambda c: c.send_frame(99, 0),
    "garbage": lambda c: c.send_raw(b"\xff" * 64),
    "unknown method": lambda c: c.send_frame(spec.FRAME_METHOD, 1, b"\x00\x63\x00\x63"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_reach_the_client(connections: Connections, name: str) -> None:
    """Each of them is fatal to pika, so it has arrived as it was meant; the broker lives on."""
    with FakeBroker() as broker:
        connection = connections.open(broker)
        connection.channel()
        HOSTILE[name](on(broker))
        if name == "garbage":
            on(broker).close()
        with pytest.raises((pika.exceptions.AMQPError, KeyError)):
            connection.process_data_events(time_limit=LIMIT)
        for left in broker.connections:
            left.reset()
        connections.open(broker).close()


def test_frames_are_sent_byte_for_byte() -> None:
    """A false length, a channel that is not open, a wrong end: the bytes are those asked for."""
    with FakeBroker() as broker, socket.create_connection(("127.0.0.1", broker.port)) as client:
        client.settimeout(LIMIT)
        connection = on(broker)
        connection.send_frame(1, 77, b"ab", length=1 << 31)
        assert client.recv(100) == b"\x01\x00\x4d\x80\x00\x00\x00ab\xce"
        connection.send_frame(8, 0, end=0x00)
        assert client.recv(100) == b"\x08\x00\x00\x00\x00\x00\x00\x00"
        connection.send_method(3, spec.Basic.Cancel("tag", nowait=True))
        cancel = frame.decode_frame(client.recv(100))[1]
        assert (cancel.channel_number, cancel.method.consumer_tag) == (3, "tag")
        connection.send_method(3, spec.Channel.Flow(active=False))
        assert frame.decode_frame(client.recv(100))[1].method.active is False
        connection.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_the_client_is_held_to_the_protocol() -> None:
    """Another protocol gets the AMQP header and the end."""
    with FakeBroker() as broker, socket.create_connection(("127.0.0.1", broker.port)) as client:
        client.settimeout(LIMIT)
        client.sendall(b"GET / HT")
        assert client.recv(100) == b"AMQP\x00\x00\x09\x01"
        assert client.recv(100) == b""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame.Method(5, spec.Confirm.Select()).marshal(), 504),
        (frame.Body(1, bytes(131_072)).marshal(), 501),
        (frame.Body(1, b"too early").marshal(), 501),
        (b"\x01\x00\x01\x00\x00\x00\x01\x00\x00", 501),
        (frame.Method(1, spec.Basic.Get(queue="q")).marshal(), 540),
        (frame.Method(0, spec.Channel.Open()).marshal(), 503),
    ],
    ids=["closed channel", "frame too large", "sequence", "frame end", "not known", "channel 0"],
)
def test_wrong_frames_from_the_client_close_the_connection(
    connections: Connections, sent: bytes, code: int
) -> None:
    """What RabbitMQ answers with a connection error is answered so here, too."""
    with FakeBroker() as broker:
        connection = connections.open(broker)
        connection.channel()
        connection._impl._output_marshaled_frames([sent])
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match=str(code)):
            connection.process_data_events(time_limit=LIMIT)


def test_heartbeats_keep_a_quiet_client_and_drop_a_dead_one(connections: Connections) -> None:
    """At 1 s a client that answers lives past 2 s, and one that is silent is dropped."""
    with FakeBroker() as broker:
        living = connections.open(broker, heartbeat=1)
        dead = connections.open(broker, heartbeat=1)
        start = time.monotonic()
        while len(broker.connections) == 2 and time.monotonic() - start < LIMIT:
            living.process_data_events(time_limit=0.25)
        assert time.monotonic() - start > 2.0
        assert len(broker.connections) == 1
        assert living.is_open
        living.close()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            dead.process_data_events(time_limit=LIMIT)


def test_stop_listening_refuses_and_listen_again_accepts(connections: Connections) -> None:
    """While it does not listen, live connections work and new ones are refused."""
    with FakeBroker() as broker:
        channel = connections.channel(broker)
        broker.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", broker.port), timeout=LIMIT)
        channel.basic_publish("", "q", b"")
        broker.listen_again()
        connections.open(broker)
        assert (len(broker.connections), broker.accepted) == (2, 2)
        connections.close()


def test_a_hook_that_raises_is_not_lost(connections: Connections) -> None:
    """Its connection ends with 541, the broker goes on, and close() raises the error once."""

    class Broken(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            raise LookupError("in the test's hook")

    broker = FakeBroker(Broken())
    channel = connections.channel(broker)
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="541"):
        channel.basic_publish("", "q", b"")
    connections.open(broker).close()
    with pytest.raises(LookupError, match="in the test's hook"):
        broker.close()
    broker.close()


def test_many_connections_and_a_burst(connections: Connections) -> None:
    """Fifty clients at once, and a burst of 2,000 publishes acked in order."""
    with FakeBroker() as broker:
        for _ in range(50):
            connections.open(broker)
        assert len(broker.wait_for_connections(50, LIMIT)) == 50
        client = Confirms(broker.url, [b"x" * 100] * 2_000)
        assert client.run(2_000) == [("ack", tag, False) for tag in range(1, 2_001)]
        client.close()
        connections.close()


def test_close_ends_the_thread_and_every_descriptor() -> None:
    """close() is quick with clients in every state, and leaves no thread and no descriptor."""
    before = descriptors()
    broker = FakeBroker(Silent())
    clients = [socket.create_connection(("127.0.0.1", broker.port)) for _ in range(5)]
    broker.wait_for_connections(5, LIMIT)
    first, second, *_ = broker.connections
    first.send_raw(bytes(32 << 20))  # more than the client's buffers take
    second.block()
    with in_time(2.0):
        broker.close()
        broker.close()
    assert not [t for t in threading.enumerate() if t.name == "mlproducer-fake-broker"]
    for client in clients:
        client.close()
    assert descriptors() == before
