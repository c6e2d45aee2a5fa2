"""A small web server for the status page, health and metrics, on one thread that no client blocks.

It uses HTTP and WSGI of the standard library, but not its server, in which a client can occupy a
thread and a descriptor for as long as it wants. Here the number of connections is limited, and the
oldest is closed when others wait; a client has one limit of time for its request and the answer;
and errors of clients are not logged. Each request closes its connection, as in HTTP/1.0.

Runs on: the thread ``mlproducer-http``; methods of `Server` on any.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler

from attrs import define, field

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._foreign_calls import guarded, write

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""Clients at a time, so that they cannot use up the application's descriptors."""

REQUEST_LIMIT = 10.0
"""Seconds in which a client has to send its request and read the answer."""

MAX_HEAD = 65_536
"""Bytes of a request's line and headers."""

BACKLOG = 512
"""Clients that may wait in the kernel to be accepted."""

GRACE = 0.5
"""Seconds that each client has, even if others wait to be accepted."""

PAUSE = 0.2
"""Seconds without accepting if the process has no descriptor left."""

IDLE = 3600.0
"""The longest wait of the idle thread, in seconds."""

CLOSE_LIMIT = 2.0
"""Seconds that `Server.close` waits for the thread."""

_PIECE = 65_536
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@define(eq=False)
class _Client:
    """A connection.

    :ivar began: monotonic time at which it was accepted
    :ivar received: the request, as far as it was received
    :ivar unsent: what is left of the answer, once there is one
    :ivar lingers: the client may still send, which has to be read: closing a connection with unread
        bytes resets it, and the answer is lost
    """

    socket: socket.socket
    address: Any
    began: float
    received: bytearray = field(factory=bytearray)
    unsent: memoryview | None = None
    lingers: bool = False

    @property
    def ends(self) -> float:
        """Monotonic time at which it is closed."""
        return self.began + REQUEST_LIMIT


class Server:
    """A web server on a daemon thread of its own.

    :param port: 0 chooses a free port
    :ivar port: the port on which it listens
    :raises OSError: the port is in use, or the host is not an address of this machine
    """

    def __init__(self, app: WSGIApplication, port: int, host: str) -> None:
        self._app = app
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._environ = {
            "SERVER_NAME": host,
            "SERVER_PORT": str(self.port),
            "GATEWAY_INTERFACE": "CGI/1.1",
            "REMOTE_HOST": "",
            "CONTENT_LENGTH": "",
            "SCRIPT_NAME": "",
        }
        reader, writer = os.pipe()
        self._wake_reader, self._wake_writer = io.FileIO(reader, "r"), io.FileIO(writer, "w")
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._check_wake)
        self._clients: dict[_Client, None] = {}
        self._paused_until: float | None = None
        self._listen()
        self._open = True
        self._open_once = [None]
        self._thread = threading.Thread(target=self._run, name="mlproducer-http", daemon=True)
        self._thread.start()
        _servers.add(self)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and close all connections; can be called again, and in a forked child."""
        forks.notice()
        with suppress(IndexError, ValueError):  # called before, or closed already in a child
            self._open_once.pop()  # pop() succeeds once: one write, before the pipe is closed
            self._wake_writer.write(b"\0")
        if self._thread.is_alive():
            self._thread.join(CLOSE_LIMIT)

    def release(self) -> None:
        """Close the descriptors, without a shutdown of connections that a parent may still use."""
        _servers.discard(self)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        for each in (self._listener, *(client.socket for client in self._clients)):
            each.close()
        self._clients.clear()

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while self._open:
            error = guarded(self._turn)
            if error is not None:
                write(logger, logging.ERROR, "the web server failed; continuing", error=error)
                for client in list(self._clients):
                    self._drop(client)
        # Shut down before they are closed: a forked child may still have copies of the descriptors.
        for each in (self._listener, *(client.socket for client in self._clients)):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.release()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout()):
            key.data()
        now = time.monotonic()
        for client in [each for each in self._clients if each.ends <= now]:
            self._drop(client)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self._listen()

    def _timeout(self) -> float:
        ends = [client.ends for client in self._clients]
        if self._paused_until is not None:
            ends.append(self._paused_until)
        return max(0.0, min(ends) - time.monotonic()) if ends else IDLE

    def _check_wake(self) -> None:
        self._open = not self._wake_reader.read(_PIECE)

    def _listen(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        now = time.monotonic()
        if len(self._clients) >= MAX_CONNECTIONS:
            oldest = next(iter(self._clients))
            if now - oldest.began < GRACE:
                self._pause(oldest.began + GRACE)
                return
            self._drop(oldest)
        try:
            accepted, address = self._listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED and not self._drop_oldest():
                self._pause(now + PAUSE)
            return
        accepted.setblocking(False)
        client = _Client(accepted, address, now)
        self._clients[client] = None
        self._await(client, selectors.EVENT_READ, self._receive)

    def _pause(self, until: float) -> None:
        """Stop accepting until then, or until a connection is closed."""
        self._selector.unregister(self._listener)
        self._paused_until = until

    def _await(self, client: _Client, event: int, then: Callable[[_Client], None]) -> None:
        step = partial(self._step, client, then)
        if client.socket.fileno() in self._selector.get_map():
            self._selector.modify(client.socket, event, step)
        else:
            self._selector.register(client.socket, event, step)

    def _step(self, client: _Client, then: Callable[[_Client], None]) -> None:
        """Continue with a client; if its connection fails, close it without a log line."""
        try:
            if client in self._clients:  # else it was closed in this very turn
                then(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
        except Exception as error:  # noqa: BLE001 - it affects only this client
            write(logger, logging.ERROR, "a request failed", error=error)
            self._drop(client)

    def _receive(self, client: _Client) -> None:
        piece = client.socket.recv(_PIECE)
        if not piece:
            self._drop(client)
            return
        client.received += piece
        head, found, rest = _cut(bytes(client.received))
        if found or len(client.received) > MAX_HEAD:
            client.lingers = bool(rest) or b"content-length" in head.lower() or not found
            request = _Request(self._app, self._environ, client.address, head, complete=found)
            client.unsent = memoryview(request.answer())
            self._await(client, selectors.EVENT_WRITE, self._send)

    def _send(self, client: _Client) -> None:
        if client.unsent:
            client.unsent = client.unsent[client.socket.send(client.unsent) :]
        if client.unsent:
            return
        if not client.lingers:
            self._drop(client)
            return
        client.socket.shutdown(socket.SHUT_WR)
        self._await(client, selectors.EVENT_READ, self._discard)

    def _discard(self, client: _Client) -> None:
        if not client.socket.recv(_PIECE):
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        with suppress(KeyError):  # registering it failed
            self._selector.unregister(client.socket)
        with suppress(OSError):
            client.socket.shutdown(socket.SHUT_RDWR)
        client.socket.close()
        del self._clients[client]  # last: a child forked before this closes its copy
        if self._paused_until is not None:
            self._paused_until = 0.0

    def _drop_oldest(self) -> bool:
        """Close the oldest connection; return false if there is none."""
        for client in self._clients:
            self._drop(client)
            return True
        return False


def _cut(received: bytes) -> tuple[bytes, bool, bytes]:
    """Split a request after its head; the empty line at the end may lack the carriage return."""
    request = received.lstrip(b"\r\n")
    ends = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := request.find(mark)) >= 0]
    if not ends:
        return request, False, b""
    at, length = min(ends)
    return request[: at + length], True, request[at + length :]


class _Request(WSGIRequestHandler):
    """One request, which the standard library's handler parses and answers, from bytes to bytes."""

    default_request_version = "HTTP/1.0"  # if the line has none; 0.9 has no status line

    def __init__(
        self,
        app: WSGIApplication,
        environ: dict[str, str],
        address: Any,
        head: bytes,
        *,
        complete: bool,
    ) -> None:
        # The base class's constructor is not called: it would use a socket at once.
        self._app = app
        self._complete = complete
        self.server = _Environ(environ)  # type: ignore[assignment]
        self.client_address = address
        self._read, self._written = io.BytesIO(head), io.BytesIO()
        self.wfile = self._written  # where the base class writes
        self.rfile = io.BufferedReader(self._read)

    def answer(self) -> bytes:
        """Return the answer."""
        self.raw_requestline = self.rfile.readline(MAX_HEAD + 1)
        if len(self.raw_requestline) > MAX_HEAD:
            self._refuse(HTTPStatus.REQUEST_URI_TOO_LONG)
        elif not self._complete:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self.parse_request():
            handler = _Handler(
                self._read, self._written, io.StringIO(), self.get_environ(), multithread=False
            )
            handler.request_handler = self
            handler.run(self._app)
        return self._written.getvalue()

    def _refuse(self, status: HTTPStatus) -> None:
        self.requestline = self.command = ""
        self.request_version = "HTTP/1.0"
        self.send_error(status)

    def parse_request(self) -> bool:
        """Parse the request's line and headers; its target may be a URL (RFC 9112, 3.2.2)."""
        if not super().parse_request():
            return False
        if self.path[:1] != "/" and "://" in self.path:
            try:
                target = urlsplit(self.path)
            except ValueError:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return False
            self.path = f"{target.path or '/'}?{target.query}"
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name is given
        """Log nothing: each open page would cause a line a second."""


@define
class _Environ:
    """What the standard library's handler needs of its server."""

    base_environ: dict[str, str]


class _Handler(ServerHandler):
    request_handler: _Request

    def log_exception(self, exc_info: Any) -> None:
        """Log the application's error with the library's logger, not on stderr."""
        write(logger, logging.ERROR, "a request failed", error=exc_info[1])


_servers: set[Server] = set()
"""The open servers; they are kept alive although nothing else may refer to them."""


def _in_child() -> None:
    """Close ports and connections, which would stay open as long as the child lives."""
    for server in list(_servers):
        server.release()


forks.in_child(_in_child)
