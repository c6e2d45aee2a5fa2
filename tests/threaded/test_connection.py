"""Connections that begin badly, end badly, or carry nonsense."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from pika import frame, spec

from mlproducer import ConnectionState, MLProducer
from mlproducer._core import events
from mlproducer._core.states import LINK_MOVES, ConnectionEvent
from mlproducer._engine import connection
from mlproducer._engine.connector import Connector
from mlproducer.errors import AuthenticationError, BrokerRejectedError, NotConnectedError
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, make_message, wait_until
from tests.pure.refusals import tells_nothing
from tests.stopwatch import in_time
from tests.threaded.brokers import FirstIsLost, Holding, Silent, SlowToDeclare, ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import told

LEGAL = {(state, target) for state, row in LINK_MOVES.items() for target in row.values()}


class States:
    """Every state that the connection of the test's only producer goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = [ConnectionState.DISCONNECTED]
        step = Connector._step

        def noted(connector: Connector, event: ConnectionEvent) -> None:
            step(connector, event)
            self.seen.append(connector.state)

        monkeypatch.setattr(Connector, "_step", noted)

    def check(self) -> None:
        """Only legal moves were made (I18)."""
        assert set(itertools.pairwise(self.seen)) <= LEGAL, self.seen


def lives(producer: MLProducer) -> None:
    """Assert that messages get through, on a loop that never failed."""
    assert producer.wait_connected(LIMIT)
    assert producer.publish(make_message(), timeout=LIMIT).result(LIMIT).confirmed


@pytest.fixture
def no_crash(caplog: pytest.LogCaptureFixture) -> Any:
    """Fail where the I/O loop failed meanwhile; what it went through is in its log."""
    yield
    messages = [each.getMessage() for each in caplog.get_records("call")]
    assert not any("the I/O loop failed" in each for each in messages)


pytestmark = pytest.mark.usefixtures("no_crash")


# --- the handshake -----------------------------------------------------------------------------


def handshake_sizes(connect: Connect, serve: Serve) -> list[int]:
    """Byte counts at which something new has arrived from the broker until it is connected."""
    broker = serve()
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url), declare_topology="active")
        assert producer.wait_connected(LIMIT)
        total = proxy.passed("s2c")
        producer.close(0.2)
    return [0, 1, 7, 8, *range(20, total, 40), total - 1]


def test_cut_anywhere_in_the_handshake(connect: Connect, serve: Serve) -> None:
    """A reset after any number of bytes is a loss, no refusal; the next attempt gets in (4, 17)."""
    sizes = handshake_sizes(connect, serve)
    broker = serve()
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        for size in sizes:
            proxy.cut_after(size, "s2c")
            producer = connect(proxy.url(broker.url), declare_topology="active")
            producer.start()
            failed = told(producer, events.ConnectFailed, lambda _event: None)
            failed.wait_until(functools.partial(bool, failed.seen))
            with pytest.raises(NotConnectedError) as caught:
                producer.publish(make_message(), timeout=0.2, retry=False)
            assert not caught.value.possibly_sent
            assert caught.value.address == f"127.0.0.1:{proxy.port}"
            proxy.heal()
            lives(producer)
            producer.close(0.2)


@pytest.mark.parametrize(
    "step", ["start", "tune", "open", "Channel.Open", "Confirm.Select", "Exchange.Declare"]
)
@pytest.mark.parametrize("cut", ["reset", "close", "timeout"])
def test_lost_at_each_step(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, step: str, cut: str
) -> None:
    """Reset, FIN or silence at each step: only legal moves, and the next attempt gets in."""
    behaviour = Holding(step)
    broker = serve(behaviour)
    # The next attempt, on a busy machine, takes a while, too.
    limit = 1.0 if cut == "timeout" else LIMIT
    producer = connect(broker, declare_topology="active", connection_timeout=limit)
    states = States(monkeypatch)
    producer.start()
    assert behaviour.reached.wait(LIMIT)
    [connection] = broker.connections
    if cut != "timeout":
        getattr(connection, cut)()
    lives(producer)
    assert not connection.is_open
    assert broker.accepted == 2
    producer.close(0.2)
    states.check()
    assert states.seen[-1] is ConnectionState.CLOSED


def test_nothing_is_published_before_confirm_mode(connect: Connect, serve: Serve) -> None:
    """No message is written before SelectOk, however long it takes (17)."""
    select_ok = threading.Event()

    class SlowSelectOk(Behaviour):
        connection: FakeConnection
        channel = 0

        def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
            if isinstance(method, spec.Confirm.Select):
                self.connection, self.channel = connection, channel
                select_ok.set()
            else:
                super().on_method(connection, channel, method)

    behaviour = SlowSelectOk()
    broker = serve(behaviour)
    producer = connect(broker)
    future = producer.submit(make_message())
    assert select_ok.wait(LIMIT)
    with pytest.raises(TimeoutError):
        broker.wait_for_messages(1, 0.2)
    behaviour.connection.send_method(behaviour.channel, spec.Confirm.SelectOk())
    assert future.result(LIMIT).confirmed
    assert broker.messages[0].tag == 1


@pytest.mark.parametrize("missing", ["publisher_confirms", "basic.nack"])
def test_broker_without_confirms(connect: Connect, serve: Serve, missing: str) -> None:
    """Nothing is ever published unconfirmed: such a broker is refused, and it is said why (10)."""

    class Old(Behaviour):
        capabilities = {**Behaviour.capabilities, missing: False}  # noqa: RUF012

    broker = serve(Old())
    producer = connect(broker)
    with pytest.raises(NotConnectedError, match="no publisher confirms"):
        producer.publish(make_message(), retry=False)
    assert broker.messages == []


@pytest.mark.parametrize(
    ("code", "text"), [(403, "ACCESS_REFUSED - Login was refused"), (530, "NOT_ALLOWED - vhost")]
)
def test_refused(connect: Connect, serve: Serve, code: int, text: str) -> None:
    """A refusal with a code is one, and is raised at once without the password (5, 6)."""

    class Refuses(Behaviour):
        def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
            if code == 403:
                connection.close_connection(code, text)
            else:
                super().on_start_ok(connection, start_ok)

        def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
            connection.close_connection(code, text)

    broker = serve(Refuses())
    url = broker.url.replace("guest:guest", "user:canary-8c1f")
    producer = connect(url)
    with pytest.raises(AuthenticationError, match=str(code)) as caught:
        producer.publish(make_message())
    tells_nothing(caught.value)
    error = caught.value
    assert (error.address, error.kind) == (f"127.0.0.1:{broker.port}", "authentication")
    assert (error.reply_code, error.reply_text) == (code, text)
    assert not error.possibly_sent


def test_reset_during_the_handshake_is_no_refusal(connect: Connect, serve: Serve) -> None:
    """What pika calls an authentication error is one only where the broker says so (4)."""

    class Drops(Behaviour):
        def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
            connection.reset()

    producer = connect(serve(Drops()))
    with pytest.raises(NotConnectedError, match="lost during the handshake"):
        producer.publish(make_message(), retry=False)


# --- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close", "320"])
def test_lost_while_connected(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """RST, FIN, or a broker that shuts down: what was in flight goes out again, with tag 1 (12)."""
    broker = serve(FirstIsLost())
    producer = connect(broker)
    states = States(monkeypatch)
    futures = [producer.submit(make_message(f"{number}")) for number in range(5)]
    [first, *_] = broker.wait_for_messages(5, LIMIT)
    if how == "320":
        first.connection.close_connection(320, "CONNECTION_FORCED - shutdown")
    else:
        getattr(first.connection, how)()
    assert all(future.result(LIMIT).attempts == 2 for future in futures)
    again = broker.messages[5:]
    assert [message.tag for message in again] == [1, 2, 3, 4, 5]
    assert {message.properties.message_id for message in again} == set("01234")
    producer.close(0.2)
    states.check()


@pytest.mark.parametrize("cut_at", [1, 30, 60, 90, 200_000, 330_000])
def test_cut_inside_a_message(connect: Connect, serve: Serve, cut_at: int) -> None:
    """A cut between or inside the frames of one message: it arrives whole on the next (15)."""
    broker = serve()
    body = bytes(range(256)) * 1400  # three frames
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url))
        assert producer.wait_connected(LIMIT)
        before = proxy.passed("c2s")
        proxy.cut_after(before + cut_at, "c2s")
        future = producer.submit(make_message("m", body=body))
        proxy.wait_for_accepted(2, LIMIT)
        proxy.heal()
        assert future.result(LIMIT).confirmed
        producer.close(0.5)
    assert [(each.properties.message_id, each.body == body) for each in broker.messages] == [
        ("m", True)
    ]


def test_lost_while_another_attempt_is_due(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and orders to reconnect, one on the other: one attempt at a time (18)."""
    broker = serve()
    producer = connect(broker)
    states = States(monkeypatch)
    for _ in range(20):
        lives(producer)
        [connection] = broker.wait_for_connections(1, LIMIT)
        accepted = broker.accepted
        connection.reset()
        producer.reconnect()
        producer.reconnect()
        lives(producer)
        assert broker.accepted == accepted + 1
    producer.close(0.2)
    states.check()


def test_a_return_cut_in_the_middle(connect: Connect, serve: Serve) -> None:
    """Half a Basic.Return is no return: the message goes out again (55)."""
    broker = serve(FirstIsLost())
    producer = connect(broker)
    future = producer.submit(make_message("m"))
    [message] = broker.wait_for_messages(1, LIMIT)
    method = spec.Basic.Return(312, "NO_ROUTE", message.exchange, message.routing_key)
    message.connection.send_raw(frame.Method(message.channel, method).marshal())
    message.connection.send_raw(
        frame.Header(message.channel, len(message.body), message.properties).marshal()
    )
    message.connection.close()
    assert future.result(LIMIT).attempts == 2


def test_never_confirmed_is_given_up(connect: Connect, serve: Serve) -> None:
    """After confirm_give_up the channel is replaced, and the message sent again, once (54)."""
    broker = serve(FirstIsLost())
    producer = connect(broker, confirm_give_up=1.0)
    receipt = producer.publish(make_message("m"), timeout=0.1)
    assert not receipt.confirmed
    assert receipt.result(LIMIT).attempts == 2
    assert receipt.confirmed
    assert [message.properties.message_id for message in broker.messages] == ["m", "m"]


# --- a channel closed over one message ---------------------------------------------------------


def test_only_the_guilty_is_rejected(connect: Connect, serve: Serve) -> None:
    """Among many good ones the bad one is found; all others are confirmed (70)."""

    class RefusesPoison(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            if message.body == b"poison":
                connection.close_channel(channel, 406, "PRECONDITION_FAILED - no")
            elif tag > 50:  # enough in flight when the channel closes
                connection.ack(channel, tag)
            else:
                connection.later(0.05, connection.ack, channel, tag)

    broker = serve(RefusesPoison())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    futures = [
        producer.submit(make_message(body=b"poison" if number == 10 else b"good"), retry=False)
        for number in range(20)
    ]
    for number, future in enumerate(futures):
        if number == 10:
            error = future.exception(LIMIT)
            assert isinstance(error, BrokerRejectedError)
            assert error.reply_code == 406
        else:
            assert future.result(LIMIT).confirmed
    assert broker.accepted == 1
    assert [each.body for each in broker.messages].count(b"poison") == 2


# --- nonsense ----------------------------------------------------------------------------------

NONSENSE: dict[str, Any] = {
    "garbage": lambda c: c.send_raw(b"\xff" * 64),
    "a web page": lambda c: c.send_raw(b"HTTP/1.1 200 OK\r\n\r\n"),
    "unknown frame type": lambda c: c.send_frame(77, 1, b"x"),
    "wrong end octet": lambda c: c.send_frame(1, 1, b"\0\x3c\0\x50", end=0),
    "a method that is none": lambda c: c.send_frame(1, 1, b"\xff\xff\xff\xff"),
    "a cut method": lambda c: c.send_frame(1, 1, b"\0\x3c\0\x50"),
    "Channel.Flow": lambda c: c.send_method(1, spec.Channel.Flow(False)),
    "Basic.Cancel": lambda c: c.send_method(1, spec.Basic.Cancel("tag")),
    "an unexpected reply": lambda c: c.send_method(1, spec.Queue.DeclareOk("q", 0, 0)),
    "a second Start": lambda c: c.send_method(0, spec.Connection.Start(0, 9, {}, "PLAIN", "en")),
    "channel 77": lambda c: c.send_method(77, spec.Basic.Ack(1)),
    "a body out of turn": lambda c: c.send_frame(3, 1, b"body"),
    "a header out of turn": lambda c: c.send_raw(
        frame.Header(1, 4, spec.BasicProperties()).marshal()
    ),
    "a body of negative size": lambda c: (
        c.send_method(1, spec.Basic.Return(312, "NO_ROUTE", "", "k")),
        c.send_raw(frame.Header(1, 2**64 - 1, spec.BasicProperties()).marshal()),
        c.send_frame(3, 1, b"body"),
    ),
}
"""What a broken or hostile broker may send (56)."""


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense(connect: Connect, serve: Serve, nonsense: str) -> None:
    """Whatever comes in, the loop lives; messages get through, if need be on a new connection."""
    broker = serve(FirstIsLost())
    producer = connect(broker, confirm_give_up=0.5)
    future = producer.submit(make_message())
    [message] = broker.wait_for_messages(1, LIMIT)
    NONSENSE[nonsense](message.connection)
    message.connection.close()
    assert future.result(LIMIT).confirmed
    lives(producer)


@pytest.mark.parametrize("size", [131_073 - 8, 2**31 - 1, 2**32 - 1])
def test_a_frame_over_the_limit(connect: Connect, serve: Serve, size: int) -> None:
    """A length over what was agreed ends the connection at once, before what it announces has come
    (56).

    Otherwise a broker that trickles is listened to for ever, and its bytes copied over and over.
    """
    broker = serve(FirstIsLost())
    producer = connect(broker)
    future = producer.submit(make_message())
    [message] = broker.wait_for_messages(1, LIMIT)
    with in_time(LIMIT / 2):
        message.connection.send_frame(3, 1, b"x" * 1000, length=size)
        assert future.result(LIMIT).attempts == 2


def test_a_message_over_every_limit(connect: Connect, serve: Serve) -> None:
    """A return that announces a terabyte ends the connection before any of it is kept (56)."""
    broker = serve(FirstIsLost())
    producer = connect(broker)
    future = producer.submit(make_message())
    [message] = broker.wait_for_messages(1, LIMIT)
    with in_time(LIMIT / 2):
        message.connection.send_method(1, spec.Basic.Return(312, "NO_ROUTE", "", "k"))
        header = frame.Header(1, 2**40, spec.BasicProperties(cluster_id="1"))
        message.connection.send_raw(header.marshal())
        assert future.result(LIMIT).attempts == 2


def test_a_frame_of_the_greatest_length(connect: Connect, serve: Serve) -> None:
    """A frame that just fits is taken."""
    broker = serve(Silent())
    producer = connect(broker)
    future = producer.submit(make_message(body=b"x" * 1_000_000))
    [message] = broker.wait_for_messages(1, LIMIT)
    message.connection.return_(message.channel, message)  # in frames of 131,072 bytes
    ack(message)
    ack(broker.wait_for_messages(2, LIMIT)[-1])
    assert future.result(LIMIT).attempts == 2
    assert broker.accepted == 1


def test_each_declaration_has_its_own_time(connect: Connect, serve: Serve) -> None:
    """Over a long way the topology takes more than the limit for an attempt, and is declared."""
    broker = serve(SlowToDeclare(0.2))
    limit = 1.5
    producer = connect(broker, declare_topology="active", connection_timeout=limit)
    began = time.monotonic()
    assert producer.wait_connected(LIMIT)
    assert time.monotonic() - began > limit
    assert producer.status().reconnect_attempts == 0


def test_gave_up_and_revived(connect: Connect, serve: Serve) -> None:
    """After the last attempt it is said once; the next publish starts over (19)."""
    broker = serve(Silent())
    broker.stop_listening()
    producer = connect(broker, max_reconnect_attempts=3, reconnect_initial_delay=0.01)
    gave_up = threading.Event()
    producer.on("gave_up", gave_up.set)
    producer.start()
    assert gave_up.wait(LIMIT)
    assert not producer.is_healthy()
    assert producer.status().reconnect_attempts == 3
    broker.listen_again()
    receipt = producer.publish(make_message(), timeout=1.0)
    [message] = broker.wait_for_messages(1, LIMIT)
    ack(message)
    assert receipt.result(LIMIT).confirmed
    assert producer.status().reconnect_attempts == 0


class Busy(Behaviour):
    """Reads nothing more, once it has the first message, until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Basic.Ack, some time."""
        assert self.may_go_on.wait(LIMIT)
        super().on_publish(connection, channel, tag, message)


def test_what_the_socket_does_not_take_is_sent_later(connect: Connect, serve: Serve) -> None:
    """A message may be sent in part, and others wait behind it: all arrive whole, and in order."""
    behaviour = Busy()
    broker = serve(behaviour)
    producer = connect(broker)
    bodies = [bytes((number,)) * 1_000_000 for number in range(20)]  # sockets take a few of them
    assert producer.wait_connected(LIMIT)
    channel: Any = producer._life.runtime.engines[0]._io._channel  # type: ignore[union-attr]
    futures = [producer.submit(make_message(body=body)) for body in bodies]
    assert wait_until(lambda: channel.room() < connection.HIGH_WATER)  # something is left to pika
    behaviour.may_go_on.set()
    assert all(each.result(LIMIT).confirmed for each in futures)
    assert [each.body for each in broker.wait_for_messages(20, LIMIT)] == bodies


# --- another pika ------------------------------------------------------------------------------


def test_a_pika_without_what_is_private_today(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages are written by its public call, and arrive the same."""

    class Plain(connection.ConfirmChannel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._send = self._buffered = None

    broker = serve()
    assert connect(broker).publish(make_message("m"), timeout=LIMIT).confirmed
    monkeypatch.setattr(connection, "ConfirmChannel", Plain)
    assert connect(broker).publish(make_message("m"), timeout=LIMIT).confirmed
    usual, plain = broker.wait_for_messages(2, LIMIT)
    assert usual.properties == plain.properties
    assert (usual.routing_key, usual.mandatory, usual.body) == (
        plain.routing_key,
        plain.mandatory,
        plain.body,
    )


def test_the_endpoint_is_asked_for_while_it_is_forgotten() -> None:
    """A status that is read as the I/O thread begins another attempt has one or the other."""
    endpoint = object()
    found: list[Any] = [SimpleNamespace(endpoint=endpoint), None]

    class Forgetful(Connector):
        _resolved = property(lambda _: found.pop(0))  # type: ignore[assignment]

    assert Forgetful.__new__(Forgetful).endpoint is endpoint
