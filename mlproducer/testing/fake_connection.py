"""The fake broker's end of one connection: what it answers, and what a test makes it say.

Owns: the broker's side of the protocol as far as a publisher sees it, and the script of what it
does (:class:`Behaviour`). Must not know the listener, other connections, nor the publisher.

Runs on: ``mlproducer-fake-broker``, hooks included; public methods of ``FakeConnection`` on any.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, final

from attrs import field, frozen
from pika import exceptions, frame, spec

from mlproducer.testing.fake_frames import FRAME_HEADER, Channel, take_frame
from mlproducer.testing.socket_loop import Loop, Stream

__all__ = ["Behaviour", "FakeConnection", "ReceivedMessage"]

_PROTOCOL = b"AMQP\x00\x00\x09\x01"
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

    def on_update_secret(self, connection: FakeConnection, secret: str) -> None:
        """A client renews its token: take it."""
        connection.send_method(0, spec.Connection.UpdateSecretOk())

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


@final
class FakeConnection:
    """The broker's end of one connection. What is sent to a client that has gone is dropped.

    Public methods may be called on any thread, and return when the bytes are on their way to the
    client, as far as it reads.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        behaviour: Behaviour,
        on_message: Callable[[ReceivedMessage], None],
        on_failure: Callable[[Exception], None],
        on_end: Callable[[FakeConnection], None],
    ) -> None:
        self._loop = loop
        self._behaviour = behaviour
        self._on_message = on_message
        self._on_failure = on_failure
        self._stream = Stream(loop, sock, self._on_data, lambda: on_end(self))
        self._inbox = bytearray()
        self._channels: dict[int, Channel] = {}
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
        self.send_raw(FRAME_HEADER.pack(frame_type, channel, size) + payload + bytes([end]))

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
                part = take_frame(self._inbox, self._behaviour.frame_max)
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

    def _dispatch(self, part: frame.Frame) -> None:
        number, method = part.channel_number, getattr(part, "method", None)
        if isinstance(part, frame.Heartbeat):
            return
        if self._closing:
            self._on_frame_while_closing(method)
        elif number == 0:
            self._on_connection_method(method)
        elif isinstance(method, spec.Channel.Open):
            self._channels[number] = Channel()
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
        elif isinstance(method, spec.Connection.UpdateSecret):
            self._obey(self._behaviour.on_update_secret, self, method.new_secret)
        elif isinstance(method, spec.Connection.Close):
            self._obey(self._behaviour.on_close, self)
        else:
            self.close_connection(503, "COMMAND_INVALID - unexpected on channel 0")

    def _on_channel_frame(self, number: int, channel: Channel, part: Any, method: Any) -> None:
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

    def _on_content(self, number: int, channel: Channel) -> None:
        publish, properties, body = channel.take()
        message = ReceivedMessage(
            exchange=publish.exchange,
            routing_key=publish.routing_key,
            mandatory=publish.mandatory,
            properties=properties,
            body=body,
            tag=channel.tag,
            channel=number,
            connection=self,
        )
        self._on_message(message)
        self._obey(self._behaviour.on_publish, self, number, message.tag, message)

    def _on_channel_method(self, number: int, channel: Channel, method: Any) -> None:
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
            self._on_failure(error)
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
