"""One connection to one broker, from the first packet to the last; the only room that knows pika.

A `Link` is used once: it opens, declares the topology, opens a channel in confirm mode and hands it
to its owner as often as the broker closes one, and ends. Once it has ended or was aborted, whatever
pika still says for it is dropped. What pika raises is translated here, by a table.

pika logs callbacks at DEBUG, so it is given bound methods without arguments, never a payload.

Runs on: the I/O thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pika
from attrs import frozen
from pika import exceptions, spec
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.channel import Channel
from pika.connection import Connection

from mlproducer.core.ports import Loss, LossKind
from mlproducer.core.trial import NOT_FOUND
from mlproducer.engine.losses import closed_by_broker, printable, translate
from mlproducer.engine.roles import LinkOwner
from mlproducer.engine.setup import Setup
from mlproducer.errors import NotConnectedError
from mlproducer.message import Envelope
from mlproducer.settings import Broker
from mlproducer.topology import Declaration
from mlproducer.wire.frames import FrameWriter

HIGH_WATER = 1024 * 1024
"""Bytes in pika's write buffer, which has no limit of its own, above which nothing is added."""


class EventLoop(IOLoop):
    """pika's loop, which knows its descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, None] = {}

    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None:
        """Watch a descriptor."""
        super().add_handler(fd, handler, events)
        self._watched[fd] = None

    def remove_handler(self, fd: int) -> None:
        """Watch it no longer."""
        self._watched.pop(fd, None)
        super().remove_handler(fd)

    def descriptors(self) -> Iterator[int]:
        """Give every descriptor that this loop holds, for a forked child to let go of."""
        yield from list(self._watched)
        for name in ("_poll", "_r_interrupt", "_w_interrupt"):
            holder = getattr(self._poller, name, None)
            if holder is not None:
                yield holder.fileno()

    def sever(self, spared: int) -> None:
        """Shut down every socket but one, so that pika sees their end at once."""
        _shut_down(fd for fd in list(self._watched) if fd != spared)


def _shut_down(descriptors: Iterable[int]) -> None:
    """Shut down what is connected; pika fails over a socket that is shut down before it is."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as twin:
            twin.getpeername()
            twin.shutdown(socket.SHUT_RDWR)


class IOServices(SelectorIOServicesAdapter):
    """pika's services for one connection, which save a thread and a turn of the loop.

    A numeric host is resolved without a thread: Python 3.12 starts none any more while it shuts
    down, when there may be much to deliver. What is written to a plain socket is sent at once, and
    not when the loop has found that it may be.
    """

    _stream: int | None = None
    _unsent = False

    def set_writer(self, fd: int, on_writable: Callable[[], None]) -> None:
        """Have a descriptor written; what it does not take now, when it can."""
        self._unsent = True
        if fd == self._stream:
            on_writable()  # which ends in `remove_writer` if everything was taken
        if self._unsent:
            super().set_writer(fd, on_writable)

    def remove_writer(self, fd: int) -> bool:
        """Have it written no longer; false if it was not to be."""
        self._unsent = False
        return bool(super().remove_writer(fd))

    def connect_socket(
        self, sock: socket.socket, resolved_addr: Any, on_done: Callable[[Any], None]
    ) -> Any:
        """Connect; the socket may have the number of an earlier one, whose stream has failed."""
        self._stream = None
        return super().connect_socket(sock, resolved_addr, on_done)

    def sever(self) -> None:
        """Shut down this connection's socket, so that pika sees its end at once."""
        _shut_down(list(getattr(self, "_watchers", ())))

    def getaddrinfo(
        self,
        host: str,
        port: int,
        on_done: Callable[[Any], None],
        family: int = 0,
        socktype: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """Give ``on_done`` the addresses, or an error, soon."""
        numeric = flags | socket.AI_NUMERICHOST
        try:
            found: Any = socket.getaddrinfo(host, port, family, socktype, proto, numeric)
        except socket.gaierror:
            try:
                return super().getaddrinfo(host, port, on_done, family, socktype, proto, flags)
            except RuntimeError as error:
                found = error
        return self.call_later(0, functools.partial(on_done, found))

    def create_streaming_connection(
        self, protocol_factory: Any, sock: socket.socket, on_done: Callable[[Any], None], **tls: Any
    ) -> Any:
        """Give ``on_done`` a stream, or an error; a reset may have come since the connect."""
        self._stream = None if tls.get("ssl_context") else sock.fileno()
        try:
            return super().create_streaming_connection(protocol_factory, sock, on_done, **tls)
        except ValueError as error:  # pika's word for a socket that is not connected any more
            sock.close()
            lost = ConnectionResetError(str(error))
            return self.call_later(0, functools.partial(on_done, lost))


@frozen
class Route:
    """How to reach one broker, and what to declare there."""

    broker: Broker
    context: ssl.SSLContext | None
    timeout: float
    heartbeat: int
    declarations: tuple[Declaration, ...]

    def parameters(self) -> pika.ConnectionParameters:
        """Put it as pika wants it."""
        broker = self.broker
        return pika.ConnectionParameters(
            host=broker.host,
            port=broker.port,
            virtual_host=broker.virtual_host,
            credentials=pika.PlainCredentials(broker.user, broker.password),
            heartbeat=self.heartbeat,
            socket_timeout=self.timeout,
            stack_timeout=self.timeout,
            ssl_options=self.context and pika.SSLOptions(self.context, broker.host),
            client_properties={"product": "mlproducer", "platform": platform.python_version()},
        )


def blocking_channel(route: Route) -> Any:
    """Open a channel of pika's blocking kind, for commands that consume.

    :raises NotConnectedError: it cannot be opened; the text says why
    """
    try:
        return pika.BlockingConnection(route.parameters()).channel()
    except (exceptions.AMQPError, OSError) as error:
        raise NotConnectedError(translate(route.broker.address, error).text) from None


def decode_properties(envelope: Envelope) -> spec.BasicProperties:
    """Read an envelope's properties as pika gives those of a delivery."""
    return spec.BasicProperties().decode(FrameWriter(0, 0).properties(envelope, 0))


class ConfirmChannel:
    """A channel in confirm mode, on which envelopes are written."""

    def __init__(self, channel: Channel, connection: pika.SelectConnection) -> None:
        self._channel = channel
        self._frames = FrameWriter(int(channel), connection.params.frame_max)
        self.longest_properties = self._frames.longest_properties
        # pika's own encoder takes half of the time of a publish; where its inside has changed,
        # its public call is used instead.
        self._emit = getattr(connection, "_output_marshaled_frames", None)
        self._buffered = getattr(connection, "_get_write_buffer_size", None)

    def room(self) -> int:
        """Bytes that may be written before the buffer is too full."""
        return HIGH_WATER - (self._buffered() if self._buffered is not None else 0)

    def carry(self, batch: list[tuple[Envelope, int]]) -> None:
        """Write messages, each with its delivery tag, in one piece."""
        if self._emit is None:
            for envelope, tag in batch:
                self._carry_by_pika(envelope, tag)
        else:
            self._emit([self._frames.publish(batch)])

    def _carry_by_pika(self, envelope: Envelope, tag: int) -> None:
        properties = spec.BasicProperties().decode(self._frames.properties(envelope, tag))
        self._channel.basic_publish(
            envelope.exchange, envelope.routing_key, envelope.body, properties, mandatory=True
        )


class Link:
    """One connection, and on it one confirm channel at a time."""

    def __init__(self, loop: EventLoop, route: Route, owner: LinkOwner) -> None:
        self._loop = loop
        self._route = route
        self._address = route.broker.address
        self._owner: LinkOwner | None = owner
        self._closing = False
        self._services = IOServices(loop)
        self._confirming: Channel | None = None
        self._timer: Any = loop.call_later(route.timeout, self._on_timeout)
        self._connection = pika.SelectConnection(
            route.parameters(), self._on_open, self._on_open_error, self._on_close, self._services
        )

    # --- how it ends ---------------------------------------------------------------------------

    def close(self) -> None:
        """Close in good order; the owner is told by `LinkOwner.link_failed`."""
        self._closing = True
        self._stop_timer()
        if self._connection.is_open:
            self._connection.close()
        else:
            self.cut()

    def abort(self) -> None:
        """End it at once, and tell nobody."""
        self._owner = None
        self._stop_timer()
        self.cut()

    def cut(self) -> None:
        """Drop the connection without a handshake."""
        if self._connection.connection_state == Connection.CONNECTION_INIT:
            self._connection.close()  # no stream yet: pika ends the attempt
        elif not self._connection.is_closed:
            self._services.sever()

    def _on_timeout(self) -> None:
        """Give up on a broker that accepts and does not answer."""
        self._timer = None
        self._fail(Loss(f"{self._address}: no answer in time", kind=LossKind.TIMEOUT))
        self.cut()

    def _on_open_error(self, _connection: Connection, error: BaseException | str) -> None:
        self._fail(translate(self._address, error))

    def _on_close(self, _connection: Connection, error: BaseException) -> None:
        if self._closing:  # also where the broker did not answer it in time
            error = exceptions.ConnectionClosedByClient(200, "")
        self._fail(translate(self._address, error))

    def _fail(self, loss: Loss) -> None:
        self._stop_timer()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.link_failed(loss)

    # --- how it begins -------------------------------------------------------------------------

    def _on_open(self, connection: Connection) -> None:
        if self._owner is None:
            self.cut()
            return
        if not (connection.publisher_confirms and connection.basic_nack):
            self._fail(Loss(f"{self._address}: no publisher confirms", kind=LossKind.PROTOCOL))
            self.cut()
            return
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self._declare()

    def _declare(self) -> None:
        """Declare the topology, then open the channel for publishing."""
        Setup(
            self._route.declarations, self.side_channel, self._on_fault, self._open_confirming
        ).start()

    def _on_fault(self, declaration: Declaration, loss: Loss) -> None:
        if self._owner is not None:
            self._owner.topology_fault(declaration, loss)

    def _open_confirming(self) -> None:
        if self._connection.is_open:
            channel = self._connection.channel(on_open_callback=self._on_confirming_open)
            channel.add_on_close_callback(self._on_channel_closed)
            self._confirming = channel

    def _on_confirming_open(self, channel: Channel) -> None:
        if self._confirming is not None and channel is self._confirming:
            channel.add_on_return_callback(self._on_return)
            channel.confirm_delivery(self._on_confirm, callback=self._on_ready)

    def _on_ready(self, _frame: object) -> None:
        self._stop_timer()
        if self._owner is not None and self._confirming is not None:
            self._owner.link_ready(ConfirmChannel(self._confirming, self._connection))

    # --- what the broker says ------------------------------------------------------------------

    def _on_confirm(self, frame: Any) -> None:
        owner, method = self._owner, frame.method
        if owner is None:
            return
        if isinstance(method, spec.Basic.Ack):
            owner.acked(method.delivery_tag, multiple=method.multiple)
        else:
            owner.nacked(method.delivery_tag, multiple=method.multiple)

    def _on_return(
        self, channel: Channel, method: Any, properties: spec.BasicProperties, _body: bytes
    ) -> None:
        attempt = str(properties.cluster_id)
        if self._owner is not None and channel is self._confirming and attempt.isdecimal():
            self._owner.returned(int(attempt), method.reply_code, printable(method.reply_text))

    def _on_blocked(self, _connection: Connection, frame: Any) -> None:
        if self._owner is not None:
            self._owner.flow_changed(blocked=True, reason=printable(frame.method.reason))

    def _on_unblocked(self, _connection: Connection, _frame: Any) -> None:
        if self._owner is not None:
            self._owner.flow_changed(blocked=False, reason="")

    def _on_channel_closed(self, channel: Channel, reason: Exception) -> None:
        if self._owner is None or not isinstance(reason, exceptions.ChannelClosedByBroker):
            return  # the end of the connection, which is told on its own, or our own doing
        if channel is self._confirming:
            self._timer = self._loop.call_later(self._route.timeout, self._on_timeout)
            loss = closed_by_broker(reason)
            self._owner.channel_lost(loss)
            if loss.reply_code == NOT_FOUND:
                self._declare()
            else:
                self._open_confirming()

    def give_up(self, why: str) -> None:
        """Drop a connection that is of no use although it stands, and tell the owner."""
        self._fail(Loss(f"{self._address}: {why}", kind=LossKind.TIMEOUT))
        self.cut()

    def side_channel(
        self, on_open: Callable[[Channel], None], on_closed: Callable[[Loss], None]
    ) -> None:
        """Open a channel for questions; the broker may close it without harm to any other."""
        if self._connection.is_open:
            channel = self._connection.channel(on_open_callback=on_open)
            channel.add_on_close_callback(functools.partial(_tell_side, on_closed))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._loop.remove_timeout(self._timer)
            self._timer = None


def _tell_side(on_closed: Callable[[Loss], None], _channel: Channel, reason: Exception) -> None:
    if isinstance(reason, exceptions.ChannelClosedByBroker):
        on_closed(closed_by_broker(reason))
