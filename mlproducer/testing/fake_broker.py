"""An AMQP 0-9-1 broker in this process, for what RabbitMQ will not do on demand.

Owns: the broker's side of the protocol as far as a publisher sees it, a script of what it does
(:class:`Behaviour`), and the record of what it was sent. Every exchange exists, every publish is
routed and acked at once, any password is right; what shall differ is said in a behaviour or done
through a :class:`FakeConnection`. Must not know the publisher, nor store or deliver a message.

Runs on: ``mlproducer-fake-broker``, hooks included; everything else may be called on any thread.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, final

from attrs import define, field, frozen
from pika import exceptions, frame, spec

from mlproducer.testing.proxy import Listener, Loop, reset_on_close

__all__ = ["Behaviour", "FakeBroker", "FakeConnection", "ReceivedMessage"]

_PROTOCOL = b"AMQP\x00\x00\x09\x01"
_FRAME_HEADER = struct.Struct(">BHI")
_READ_SIZE = 1 << 16
_UNREAD_LIMIT = 1 << 20
_MALFORMED = (exceptions.AMQPError, struct.error, LookupError, ValueError)

_REPLIES: dict[type, Callable[[Any], Any]] = {
    spec.Channel.Open: lambda _: spec.Channel.OpenOk(),
    spec.Channel.Close: lambda _: spec.Channel.CloseOk(),
    spec.Confirm.Select: lambda _: spec.Confirm.SelectOk(),
    spec.Exchange.Declare: lambda _: spec.Exchange.DeclareOk(),
    spec.Queue.Declare: lambda method: spec.Queue.DeclareOk(method.queue or "amq.gen-fake", 0, 0),
    spec.Queue.Bind: lambda _: spec.Queue.BindOk(),
}


@frozen
class ReceivedMessage:
    """One publish as it arrived: method, header and body together.

    :ivar tag: delivery tag on `channel`, counted from Confirm.Select; 0 on a channel without it
    """

    exchange: str
    routing_key: str
    mandatory: bool
    properties: spec.BasicProperties = field(repr=False)
    body: bytes = field(repr=False)
    tag: int
    channel: int
    connection: FakeConnection = field(repr=False)


class Behaviour:
    """What the broker does, by default like RabbitMQ 3.10; override what shall differ.

    Hooks run on the broker's thread and must not block: for later there is
    :meth:`FakeConnection.later`, for never it is enough to do nothing. A hook that raises ends its
    connection with 541, and :meth:`FakeBroker.close` raises what it raised.
    """

    mechanisms: str = "PLAIN AMQPLAIN"
    channel_max: int = 2047
    frame_max: int = 131072
    heartbeat: int = 60
    capabilities: ClassVar[Mapping[str, bool]] = {
        "publisher_confirms": True,
        "exchange_exchange_bindings": True,
        "basic.nack": True,
        "consumer_cancel_notify": True,
        "connection.blocked": True,
        "consumer_priorities": True,
        "authentication_failure_close": True,
        "per_consumer_qos": True,
        "direct_reply_to": True,
    }

    def on_connect(self, connection: FakeConnection) -> None:
        """A client has sent its protocol header: answer with Connection.Start."""
        properties = {
            "product": "RabbitMQ",
            "version": "3.10.8",
            "capabilities": dict(self.capabilities),
        }
        connection.send_method(0, spec.Connection.Start(0, 9, properties, self.mechanisms, "en_US"))

    def on_start_ok(
        self,
        connection: FakeConnection,
        start_ok: spec.Connection.StartOk,
    ) -> None:
        """A client has sent its credentials: accept them with Connection.Tune."""
        tune = spec.Connection.Tune(self.channel_max, self.frame_max, self.heartbeat)
        connection.send_method(0, tune)

    def on_open(
        self,
        connection: FakeConnection,
        virtual_host: str,
    ) -> None:
        """A client opens a virtual host: let it in."""
        connection.send_method(0, spec.Connection.OpenOk())

    def on_close(self, connection: FakeConnection) -> None:
        """A client closes its connection: agree, and end it."""
        connection.send_method(0, spec.Connection.CloseOk())
        connection.close()

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Any other method, which waits for its reply: Channel.Open, Confirm.Select, declares."""
        reply = _REPLIES.get(type(method))
        if reply is None:
            connection.close_connection(540, f"NOT_IMPLEMENTED - {method.NAME}")
        elif not getattr(method, "nowait", False):
            connection.send_method(channel, reply(method))

    def on_publish(
        self,
        connection: FakeConnection,
        channel: int,
        tag: int,
        message: ReceivedMessage,
    ) -> None:
        """A message has arrived whole: ack it, if the channel confirms."""
        if tag:
            connection.ack(channel, tag)


@define
class _Channel:
    """A channel's confirm counter, and the content that is being assembled on it."""

    confirms: bool = False
    tag: int = 0
    closing: bool = False
    publish: spec.Basic.Publish | None = None
    header: frame.Header | None = None
    body: bytearray = field(factory=bytearray)

    def begin(self, publish: spec.Basic.Publish) -> None:
        if self.publish is not None:
            raise exceptions.UnexpectedFrameError("Basic.Publish within a content")
        self.publish = publish

    def add(self, part: frame.Header | frame.Body) -> bool:
        """Whether the content is whole now.

        :raises UnexpectedFrameError: the frame is out of sequence, or the body too long
        """
        if isinstance(part, frame.Header):
            if self.publish is None or self.header is not None:
                raise exceptions.UnexpectedFrameError("content header out of sequence")
            self.header = part
        elif self.header is None:
            raise exceptions.UnexpectedFrameError("content body out of sequence")
        else:
            self.body += part.fragment
        if len(self.body) > self.header.body_size:
            raise exceptions.UnexpectedFrameError("content body too long")
        return len(self.body) == int(self.header.body_size)

    def take(self, number: int, connection: FakeConnection) -> ReceivedMessage:
        """The whole message, with the next delivery tag; ready for the next content."""
        assert self.publish is not None
        assert self.header is not None
        if self.confirms:
            self.tag += 1
        message = ReceivedMessage(
            exchange=self.publish.exchange,
            routing_key=self.publish.routing_key,
            mandatory=self.publish.mandatory,
            properties=self.header.properties,
            body=bytes(self.body),
            tag=self.tag,
            channel=number,
            connection=connection,
        )
        self.publish, self.header, self.body = None, None, bytearray()
        return message


class _Stream:
    """A client's socket, and what is still to be written to it. On the broker's thread only."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        on_data: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._on_data = on_data
        self._on_end = on_end
        self._unwritten = bytearray()
        self._closing = False
        self.paused = False
        self.ended = False

    @property
    def reads(self) -> bool:
        """Whether what has come in may be looked at."""
        return not (self.paused or self._closing or self.ended)

    def pause(self, paused: bool) -> None:
        self.paused = paused
        if not self.ended:
            self.watch()

    def send(self, data: bytes) -> None:
        if not self.ended:
            self._unwritten += data
            self._flush()

    def close(self) -> None:
        """FIN, once all is written."""
        if not self.ended:
            self._closing = True
            self._flush()

    def reset(self) -> None:
        if not self.ended:
            reset_on_close(self._socket)
            self.end()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._loop.discard(self._socket)
            self._on_end()

    def watch(self) -> None:
        reads = self.reads and len(self._unwritten) < _UNREAD_LIMIT
        events = selectors.EVENT_READ if reads else 0
        events |= selectors.EVENT_WRITE if self._unwritten else 0
        self._loop.watch(self._socket, events, self._ready)

    def _flush(self) -> None:
        try:
            while self._unwritten:
                del self._unwritten[: self._socket.send(self._unwritten)]
        except BlockingIOError:
            self.watch()
        except OSError:  # the client has gone
            self.end()
        else:
            self.end() if self._closing else self.watch()

    def _ready(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and not self.ended:
            self._flush()
        if mask & selectors.EVENT_READ and self.reads:
            self._read()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # reset by the client: for a broker no different from its FIN
            data = b""
        if data:
            self._on_data(data)
        else:
            self.end()


@final
class FakeConnection:
    """The broker's end of one connection. What is sent to a client that has gone is dropped.

    Public methods may be called on any thread, and return when the bytes are on their way to the
    client, as far as it reads.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, behaviour: Behaviour, journal: _Journal
    ) -> None:
        self._loop = loop
        self._behaviour = behaviour
        self._journal = journal
        self._stream = _Stream(loop, sock, self._on_data, lambda: journal.disconnected(self))
        self._inbox = bytearray()
        self._channels: dict[int, _Channel] = {}
        self._heartbeat = 0
        self._heard_at = time.monotonic()
        self._greeted = False
        self._closing = False

    @property
    def is_open(self) -> bool:
        """Whether the TCP connection lives."""
        return not self._stream.ended

    def ack(self, channel: int, tag: int, *, multiple: bool = False) -> None:
        """Basic.Ack, whether `tag` is outstanding or not."""
        self.send_method(channel, spec.Basic.Ack(tag, multiple))

    def nack(self, channel: int, tag: int, *, multiple: bool = False) -> None:
        """Basic.Nack, whether `tag` is outstanding or not."""
        self.send_method(channel, spec.Basic.Nack(tag, multiple, requeue=False))

    def return_(
        self,
        channel: int,
        message: ReceivedMessage,
        reply_code: int = 312,
        reply_text: str = "NO_ROUTE",
    ) -> None:
        """Basic.Return with the message; RabbitMQ sends it before the message's ack."""
        method = spec.Basic.Return(reply_code, reply_text, message.exchange, message.routing_key)
        size = self._behaviour.frame_max - spec.FRAME_HEADER_SIZE - spec.FRAME_END_SIZE
        frames = [
            frame.Method(channel, method),
            frame.Header(channel, len(message.body), message.properties),
            *(
                frame.Body(channel, message.body[start : start + size])
                for start in range(0, len(message.body), size)
            ),
        ]
        self.send_raw(b"".join(part.marshal() for part in frames))

    def close_channel(self, channel: int, code: int, text: str) -> None:
        """Channel.Close, as for a publish; what the client had sent on it before is ignored."""
        close = spec.Channel.Close(code, text, *divmod(spec.Basic.Publish.INDEX, 1 << 16))
        self._loop.call(partial(self._close_channel, channel, close))

    def close_connection(self, code: int, text: str) -> None:
        """Connection.Close; then only CloseOk is heard, and ends the connection."""
        self._loop.call(partial(self._close_connection, spec.Connection.Close(code, text, 0, 0)))

    def block(self, reason: str = "low on memory", *, keep_reading: bool = False) -> None:
        """Connection.Blocked, and stop reading as RabbitMQ does (its guide, *Alarms*).

        :param keep_reading: to see what the client sends nevertheless
        """
        self._loop.call(
            partial(self._block, spec.Connection.Blocked(reason), pause=not keep_reading)
        )

    def unblock(self) -> None:
        """Connection.Unblocked, and read again."""
        self._loop.call(partial(self._block, spec.Connection.Unblocked(), pause=False))

    def send_method(self, channel: int, method: Any) -> None:
        """A method of ``pika.spec`` on `channel`."""
        self.send_raw(frame.Method(channel, method).marshal())

    def send_frame(
        self,
        frame_type: int,
        channel: int,
        payload: bytes = b"",
        *,
        end: int = spec.FRAME_END,
        length: int | None = None,
    ) -> None:
        """A frame of any type, on any channel, with any end octet, and a false length if given."""
        size = len(payload) if length is None else length
        self.send_raw(_FRAME_HEADER.pack(frame_type, channel, size) + payload + bytes([end]))

    def send_raw(self, data: bytes) -> None:
        """These bytes, whatever they are."""
        self._loop.call(partial(self._stream.send, data))

    def later(self, seconds: float, function: Callable[..., object], *args: Any) -> None:
        """Call `function(*args)` on the broker's thread after `seconds`, if the client is there."""
        when = time.monotonic() + seconds
        self._loop.call(partial(self._loop.call_at, when, partial(self._obey, function, *args)))

    def close(self) -> None:
        """FIN, once what was sent has been written."""
        self._loop.call(self._stream.close)

    def reset(self) -> None:
        """RST, at once."""
        self._loop.call(self._stream.reset)

    def begin(self) -> None:
        """Listen to the client; the broker's own."""
        self._stream.watch()

    def drop(self) -> None:
        """FIN at once, with what was not yet written lost; the broker's own."""
        self._loop.call(self._stream.end)

    def _on_data(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        self._inbox += data
        self._drain()

    def _drain(self) -> None:
        try:
            if not self._greeted:
                self._greet()
            while self._greeted and self._stream.reads:
                part = self._next_frame()
                if part is None:
                    return
                self._dispatch(part)
        except _MALFORMED as error:
            self._inbox.clear()
            self.close_connection(501, f"FRAME_ERROR - {type(error).__name__}")

    def _greet(self) -> None:
        if len(self._inbox) < len(_PROTOCOL):
            return
        self._greeted = self._inbox.startswith(_PROTOCOL)
        del self._inbox[: len(_PROTOCOL)]
        if self._greeted:
            self._obey(self._behaviour.on_connect, self)
        else:  # AMQP 0-9-1, 4.2.2: answer with the header that is spoken here, and close
            self.send_raw(_PROTOCOL)
            self.close()

    def _next_frame(self) -> frame.Frame | None:
        if len(self._inbox) < _FRAME_HEADER.size:
            return None
        size = _FRAME_HEADER.unpack_from(self._inbox)[2] + _FRAME_HEADER.size + 1
        if size > self._behaviour.frame_max:
            raise exceptions.InvalidFrameError("frame_too_large")
        if len(self._inbox) < size:
            return None
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return frame.decode_frame(data)[1]

    def _dispatch(self, part: frame.Frame) -> None:
        number, method = part.channel_number, getattr(part, "method", None)
        if isinstance(part, frame.Heartbeat):
            return
        if self._closing:
            self._on_frame_while_closing(method)
        elif number == 0:
            self._on_connection_method(method)
        elif isinstance(method, spec.Channel.Open):
            self._channels[number] = _Channel()
            self._obey(self._behaviour.on_method, self, number, method)
        elif number in self._channels:
            self._on_channel_frame(number, self._channels[number], part, method)
        else:
            self.close_connection(504, "CHANNEL_ERROR - expected 'channel.open'")

    def _on_frame_while_closing(self, method: Any) -> None:
        if isinstance(method, spec.Connection.CloseOk):
            self.close()
        elif isinstance(method, spec.Connection.Close):
            self.send_method(0, spec.Connection.CloseOk())

    def _on_connection_method(self, method: Any) -> None:
        if isinstance(method, spec.Connection.StartOk):
            self._obey(self._behaviour.on_start_ok, self, method)
        elif isinstance(method, spec.Connection.TuneOk):
            self._start_heartbeats(method.heartbeat)
        elif isinstance(method, spec.Connection.Open):
            self._obey(self._behaviour.on_open, self, method.virtual_host)
        elif isinstance(method, spec.Connection.Close):
            self._obey(self._behaviour.on_close, self)
        else:
            self.close_connection(503, "COMMAND_INVALID - unexpected on channel 0")

    def _on_channel_frame(self, number: int, channel: _Channel, part: Any, method: Any) -> None:
        if channel.closing:
            if isinstance(method, spec.Channel.CloseOk):
                del self._channels[number]
            elif isinstance(method, spec.Channel.Close):
                self.send_method(number, spec.Channel.CloseOk())
        elif method is None:
            if channel.add(part):
                self._on_content(number, channel)
        elif isinstance(method, spec.Basic.Publish):
            channel.begin(method)
        elif not method.NAME.endswith("Ok"):  # answers to what a test has sent ask for nothing
            self._on_channel_method(number, channel, method)

    def _on_content(self, number: int, channel: _Channel) -> None:
        message = channel.take(number, self)
        self._journal.received(message)
        self._obey(self._behaviour.on_publish, self, number, message.tag, message)

    def _on_channel_method(self, number: int, channel: _Channel, method: Any) -> None:
        if isinstance(method, spec.Confirm.Select):
            channel.confirms = True
        elif isinstance(method, spec.Channel.Close):
            del self._channels[number]
        self._obey(self._behaviour.on_method, self, number, method)

    def _obey(self, function: Callable[..., object], *args: Any) -> None:
        if self._stream.ended:
            return
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001 - a test's own; FakeBroker.close() raises it
            self._journal.failed(error)
            self.close_connection(541, "INTERNAL_ERROR")

    def _close_channel(self, number: int, close: spec.Channel.Close) -> None:
        if number in self._channels:
            self._channels[number].closing = True
        self.send_method(number, close)

    def _close_connection(self, close: spec.Connection.Close) -> None:
        if not self._closing:
            self._closing = True
            self.send_method(0, close)

    def _block(self, method: Any, *, pause: bool) -> None:
        self._stream.pause(pause)
        self._heard_at = time.monotonic()
        self.send_method(0, method)
        self._loop.call_at(self._heard_at, self._drain)  # what had arrived before the pause

    def _start_heartbeats(self, seconds: int) -> None:
        self._heartbeat = seconds
        if seconds:
            self._loop.call_at(time.monotonic() + seconds / 2, self._beat)

    def _beat(self) -> None:
        now = time.monotonic()
        if self._stream.ended:
            return
        if not self._stream.paused and now - self._heard_at > 2 * self._heartbeat:
            self._stream.end()
            return
        self.send_raw(frame.Heartbeat().marshal())
        self._loop.call_at(now + self._heartbeat / 2, self._beat)


class _Journal:
    """What has happened so far, for tests to read and to wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: everything below
        self.connections: tuple[FakeConnection, ...] = ()
        self.accepted = 0
        self.messages: list[ReceivedMessage] = []
        self.failures: list[Exception] = []

    def connected(self, connection: FakeConnection) -> None:
        with self._changed:
            self.connections = (*self.connections, connection)
            self.accepted += 1
            self._changed.notify_all()

    def disconnected(self, connection: FakeConnection) -> None:
        with self._changed:
            self.connections = tuple(c for c in self.connections if c is not connection)
            self._changed.notify_all()

    def received(self, message: ReceivedMessage) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        with self._changed:
            self.failures.append(error)

    def wait(self, come_about: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(come_about, timeout):
                raise TimeoutError(
                    f"{len(self.connections)} connected, {self.accepted} accepted, "
                    f"{len(self.messages)} messages so far"
                )


@final
class FakeBroker:
    """A broker on a port of 127.0.0.1 that behaves as its `behaviour` says.

    ::

        class Silent(Behaviour):
            def on_publish(self, connection, channel, tag, message):
                "Never confirmed."

        with FakeBroker(Silent()) as broker:
            connection = pika.BlockingConnection(pika.URLParameters(broker.url))
            ...
            [message] = broker.wait_for_messages(1, timeout=5)
            message.connection.ack(message.channel, message.tag)
    """

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self._behaviour = behaviour or Behaviour()
        self._journal = _Journal()
        self._loop = Loop("mlproducer-fake-broker")
        self._listener = Listener(self._loop, self._admit)
        self._loop.call(self._listener.listen)

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop()
        if kind is None:
            self.close()

    @property
    def port(self) -> int:
        """The port, the same after :meth:`stop_listening` and :meth:`listen_again`."""
        return self._listener.address[1]

    @property
    def url(self) -> str:
        """An URL to connect to; any other user, password and virtual host will do as well."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def connections(self) -> tuple[FakeConnection, ...]:
        """The live connections, oldest first."""
        return self._journal.connections

    @property
    def accepted(self) -> int:
        """How many clients have ever connected."""
        return self._journal.accepted

    @property
    def messages(self) -> list[ReceivedMessage]:
        """All messages received so far, in order."""
        return list(self._journal.messages)

    def wait_for_connections(self, n: int, timeout: float) -> tuple[FakeConnection, ...]:
        """The live connections, once there are at least `n`; with 0, once there are none.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._journal.wait(
            lambda: len(self.connections) >= n if n else not self.connections, timeout
        )
        return self.connections

    def wait_for_messages(self, n: int, timeout: float) -> list[ReceivedMessage]:
        """All messages received so far, once there are at least `n`.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._journal.wait(lambda: len(self._journal.messages) >= n, timeout)
        return self.messages

    def stop_listening(self) -> None:
        """Have new connections refused; live ones stay."""
        self._loop.call(self._listener.refuse)

    def listen_again(self) -> None:
        """Accept connections on the same port again."""
        self._loop.call(self._listener.listen)

    def close(self) -> None:
        """End every connection and the thread, and give the port back. Idempotent.

        :raises RuntimeError: the thread did not end within 2 s
        :raises Exception: what a hook of the behaviour had raised first, once
        """
        self._stop()
        failures, self._journal.failures = self._journal.failures, []
        if failures:
            raise failures[0]

    def _stop(self) -> None:
        if self._loop.is_open:
            self._loop.call(self._shut)
        self._loop.close()

    def _shut(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.drop()

    def _admit(self, sock: socket.socket) -> None:
        connection = FakeConnection(self._loop, sock, self._behaviour, self._journal)
        self._journal.connected(connection)
        connection.begin()
