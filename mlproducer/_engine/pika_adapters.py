"""pika's classes as the library needs them: services, connection, credentials, parameters.

Some methods override ones that are private to pika; each class says what happens under a pika that
has others. `tests/house` has the list of their names, and asks the installed pika for them.

Runs on: the I/O thread; `blocking_connection` on those of commands.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pika
from attrs import frozen
from pika import exceptions, spec
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.connection import Connection as PikaConnection

from mlproducer._core.interfaces import Confirm
from mlproducer._engine.close_reasons import (
    ClosedInWaiterError,
    NoMechanismError,
    OversizedFrameError,
    translate,
)
from mlproducer._engine.endpoints import (
    Address,
    Endpoint,
    Identity,
    ResolvedEndpoint,
    UnreachableError,
)
from mlproducer._engine.io_loop import EventLoop, shut_down
from mlproducer._wire.frames import ConfirmReader, FrameWriter
from mlproducer.errors import NotConnectedError
from mlproducer.message import Envelope

try:
    import fcntl
    import termios
except ImportError:  # not a POSIX system
    fcntl = termios = None  # type: ignore[assignment]

LONGEST = 512 * 1024 * 1024
"""Bytes of a message that comes in, all of which pika collects; RabbitMQ takes no longer ones."""

READ = 65_536
"""Bytes that are read at once, at most."""

_FRAME_HEADER = struct.Struct(">BHL")
_ACKNOWLEDGED = struct.Struct("=120xQ")  # in Linux's struct tcp_info
_BODY_SIZE = slice(11, 19)  # in the frame of a content header


@frozen
class Traffic:
    """What has gone over a connection, in bytes.

    :ivar received: from the broker
    :ivar taken: those that the other host has acknowledged, where the kernel tells; else 0
    :ivar waiting: those that are written, and not yet acknowledged
    """

    received: int = 0
    taken: int = 0
    waiting: int = 0


class IOServices(SelectorIOServicesAdapter):
    """pika's services for one connection, which save a thread and know the socket.

    The address was looked up before, so that pika starts no thread for it.

    :param address: where to connect
    :param failed: told what pika raises while it begins, which would end the loop
    :ivar plain: the socket, where what is sent is not encrypted
    """

    plain: socket.socket | None = None

    def __init__(
        self, loop: EventLoop, address: Address, failed: Callable[[Exception], None]
    ) -> None:
        super().__init__(loop)
        self._address = address
        self._failed = failed

    def sever(self) -> None:
        """Shut down this connection's socket, so that pika sees its end at once."""
        shut_down(list(getattr(self, "_watchers", ())))

    def sent(self) -> tuple[int, int]:
        """Return how many bytes the other host has acknowledged, and how many it has not."""
        for descriptor in getattr(self, "_watchers", ()):
            with contextlib.suppress(OSError, AttributeError, struct.error):  # not on Linux
                twin = socket.socket(fileno=descriptor)
                try:
                    info = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    queue = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))
                finally:
                    twin.detach()
                return _ACKNOWLEDGED.unpack_from(info)[0], int.from_bytes(queue, sys.byteorder)
        return 0, 0

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
        """Give ``on_done`` the address, soon."""
        return self.call_later(0, functools.partial(self._begin, on_done))

    def _begin(self, on_done: Callable[[Any], None]) -> None:
        try:
            on_done([self._address])
        except Exception as error:  # noqa: BLE001 - no descriptor left, no such family, ...
            self._failed(error)

    def create_streaming_connection(
        self, protocol_factory: Any, sock: socket.socket, on_done: Callable[[Any], None], **tls: Any
    ) -> Any:
        """Give ``on_done`` a stream, or an error; a reset may have come since the connect."""
        self.plain = None if tls.get("ssl_context") else sock
        try:
            return super().create_streaming_connection(protocol_factory, sock, on_done, **tls)
        except ValueError as error:  # pika's word for a socket that is not connected any more
            sock.close()
            lost = ConnectionResetError(str(error))
            return self.call_later(0, functools.partial(on_done, lost))


class BrokerConnection(pika.SelectConnection):
    """pika's connection, which keeps the broker's reply code, and believes no absurd length.

    It overrides methods that are private to pika. Where a later pika has others, they are merely
    not called: then a refusal counts as a lost connection, a frame without end as silence, and
    confirms take longer. So they do where it lacks what these methods read of it.

    :ivar confirms: reads those of the channel for publishing; ``None``: there is none yet
    :ivar on_settled: takes what it has read
    """

    confirms: ConfirmReader | None = None
    on_settled: Callable[[bool, Sequence[Confirm]], None]
    _plain: socket.socket | None = None

    # What is read where a later pika has these under other names.
    _frame_buffer = b"?"  # as if there were always the first part of a frame
    _nbio: Any = None
    _opened = True

    @property
    def _client_properties(self) -> dict[str, Any]:
        """Say what we are; pika would add itself and the version of Python."""
        everything: dict[str, Any] = super()._client_properties
        own = (*(self.params.client_properties or ()), "capabilities")
        return {name: value for name, value in everything.items() if name in own}

    def _on_connection_close_from_broker(self, method_frame: Any) -> None:
        method = method_frame.method
        if self._opened or not hasattr(self, "_terminate_stream"):
            super()._on_connection_close_from_broker(method_frame)
        else:
            self._terminate_stream(ClosedInWaiterError(method.reply_code, method.reply_text))

    def _proto_connection_made(self, transport: Any) -> None:
        self._plain = getattr(self._nbio, "plain", None)  # pika's blocking kind has other services
        if self._plain is not None:
            # One read for each time that the loop says that there is something: pika would go on
            # until a read fails, which takes longer than the read before it.
            transport._MAX_CONSUME_BYTES = 1  # noqa: SLF001 - see the class
            transport._MAX_RECV_BYTES = READ  # noqa: SLF001
        super()._proto_connection_made(transport)

    def send(self, data: bytes) -> None:
        """Send at once what the socket takes, and leave the rest to pika, in order."""
        if self._plain is not None and not self._get_write_buffer_size():
            try:
                sent = self._plain.send(data)
            except OSError:
                sent = 0  # full; or broken, which pika finds, too
            if sent == len(data):
                return
            data = data[sent:]
        self._output_marshaled_frames([data])

    def _on_data_available(self, data_in: bytes) -> None:
        """Read the confirms that come first without pika, whose way to a callback is 60 calls."""
        if self.confirms is not None and not self._frame_buffer:
            settled, rest = self.confirms.read(data_in)
            self.bytes_received += len(data_in) - len(rest)  # by which pika notices a silence
            for is_ack, confirms in settled:
                self.on_settled(is_ack, confirms)
            if not rest:
                return
            data_in = rest
        super()._on_data_available(data_in)

    def _read_frame(self) -> Any:
        buffer: bytes = self._frame_buffer
        # A protocol header is no frame; a frame of any kind is judged by its announced length.
        if len(buffer) >= _FRAME_HEADER.size and not buffer.startswith(b"AMQP"):
            kind, _, payload = _FRAME_HEADER.unpack_from(buffer)
            length = payload + spec.FRAME_HEADER_SIZE + spec.FRAME_END_SIZE
            absurd = length > (self.params.frame_max or spec.FRAME_MAX_SIZE) or (
                kind == spec.FRAME_HEADER and int.from_bytes(buffer[_BODY_SIZE], "big") > LONGEST
            )
            if absurd and hasattr(self, "_terminate_stream"):
                self._terminate_stream(self._nonsense())
                return 0, None
        return super()._read_frame()

    def _nonsense(self) -> Any:
        if self.connection_state == PikaConnection.CONNECTION_PROTOCOL:
            return exceptions.IncompatibleProtocolError("no AMQP frame")
        return OversizedFrameError("a frame over frame_max")


class PlainCredentials(pika.PlainCredentials):
    """User and password; pika's own do not tell what a broker offers that takes none."""

    def response_for(self, start: Any) -> Any:
        """Answer Connection.Start.

        :raises NoMechanismError: it does not offer PLAIN
        """
        return _answered(self.TYPE, start, super().response_for(start))


class ExternalCredentials(pika.credentials.ExternalCredentials):
    """The client's certificate."""

    def response_for(self, start: Any) -> Any:
        """Answer Connection.Start.

        :raises NoMechanismError: it does not offer EXTERNAL
        """
        return _answered(self.TYPE, start, super().response_for(start))


def _answered(wanted: str, start: Any, answer: tuple[Any, Any]) -> tuple[Any, Any]:
    if answer[0] is None:
        offered = start.mechanisms
        text = offered.decode(errors="replace") if isinstance(offered, bytes) else str(offered)
        raise NoMechanismError(wanted, text or "nothing")
    return answer


def _credentials(mechanism: str, identity: Identity) -> Any:
    if mechanism == ExternalCredentials.TYPE:
        return ExternalCredentials()
    return PlainCredentials(identity.user, identity.password)


def parameters(
    resolved: ResolvedEndpoint, timeouts: tuple[float, float]
) -> pika.ConnectionParameters:
    """Put an endpoint as pika wants it.

    :param timeouts: seconds for TCP, and for TCP, TLS and AMQP together
    """
    endpoint = resolved.endpoint
    server_name = (endpoint.tls and endpoint.tls.settings.server_name) or endpoint.broker.host
    return pika.ConnectionParameters(
        host=endpoint.broker.host,
        port=endpoint.broker.port,
        virtual_host=endpoint.broker.virtual_host,
        credentials=_credentials(endpoint.broker.auth_mechanism, resolved.identity),
        heartbeat=endpoint.broker.heartbeat,
        socket_timeout=timeouts[0],
        stack_timeout=timeouts[1],
        ssl_options=resolved.context and pika.SSLOptions(resolved.context, server_name),
        client_properties={
            "product": "mlproducer",
            "version": _VERSION,
            "connection_name": endpoint.connection_name or _program(),
        },
    )


def _own_version() -> str:
    try:
        return importlib.metadata.version("mlproducer")
    except importlib.metadata.PackageNotFoundError:  # run from a copy that is not installed
        return "unknown"


_VERSION = _own_version()


def _program() -> str:
    """Name the running program and its process, as operators look for it."""
    path = Path(sys.argv[0] if sys.argv else "")
    name = path.parent.name if path.name == "__main__.py" else path.name
    shown = name.encode(errors="replace").decode()[:100]
    return f"{shown if shown not in ('', '-c') else 'python'}:{os.getpid()}"


def blocking_connection(endpoint: Endpoint) -> Any:
    """Open a connection of pika's blocking kind, for commands that ask questions.

    :raises NotConnectedError: it cannot be opened; the text says why
    """
    try:
        found = parameters(endpoint.find(), (endpoint.broker.connection_timeout,) * 2)
        try:
            return pika.BlockingConnection(found, _impl_class=BrokerConnection)
        except TypeError:  # a later pika has no such parameter
            return pika.BlockingConnection(found)
    except UnreachableError as error:
        loss = error.loss
    except (exceptions.AMQPError, AMQPConnectorException, OSError) as error:
        tls = endpoint.tls is not None
        loss = translate(endpoint.broker.address, error, endpoint.broker.hint, tls=tls)
    raise NotConnectedError(loss.text, kind=loss.kind.value, reply_code=loss.reply_code)


def decode_properties(envelope: Envelope) -> spec.BasicProperties:
    """Read an envelope's properties as pika gives those of a delivery."""
    return spec.BasicProperties().decode(FrameWriter(0, 0).properties(envelope, 0))
