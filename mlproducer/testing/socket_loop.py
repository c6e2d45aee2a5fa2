"""The thread with a selector on which the proxy and the fake broker run.

Owns: readiness, timers, commands from other threads (``Loop``), a port that can refuse and listen
again (``Listener``), and one client's socket with what is still to be written (``Stream``). Must
not know what the bytes mean.

Runs on: a ``Loop``'s own thread; ``Loop.call`` and ``Loop.close`` on any other.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["READ_SIZE", "Address", "Listener", "Loop", "Stream", "reset_on_close"]

Address = tuple[str, int]
T = TypeVar("T")

READ_SIZE = 1 << 16
_CALL_LIMIT = 60.0
_CLOSE_LIMIT = 2.0
_UNWRITTEN_LIMIT = 1 << 20


class Loop:
    """A thread with a selector, timers, and commands from other threads.

    The selector and the timers belong to its thread. A callback that raises ends the thread, for it
    is a bug; a command that raises does so in its caller.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._sequence = itertools.count()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._lock = threading.Lock()  # guards: _commands, _open, _stopping
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._open = True
        self._stopping = False
        self.watch(
            self._wake_reader, selectors.EVENT_READ, lambda _: self._wake_reader.recv(READ_SIZE)
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the thread still takes commands."""
        return self._open

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread and return what it returns, or raise what it raises.

        :raises RuntimeError: the loop has been closed
        :raises TimeoutError: it took more than a minute (``concurrent.futures.TimeoutError``)
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError(f"{self._thread.name} has ended")
            self._commands.append((function, future))
            self._wake()
        return future.result(timeout=_CALL_LIMIT)

    def call_at(self, when: float, function: Callable[[], object]) -> None:
        """Run `function` at `when` (``time.monotonic()``). Only on the loop's thread."""
        heapq.heappush(self._timers, (when, next(self._sequence), function))

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(mask)` when `sock` is ready; no events, no calls. Not for a closed one."""
        key = self._selector.get_map().get(sock)
        if key is None:
            if events:
                self._selector.register(sock, events, callback)
        elif not events:
            self._selector.unregister(sock)
        elif key.events != events:
            self._selector.modify(sock, events, callback)

    def discard(self, sock: socket.socket) -> None:
        """Stop watching `sock` and close it."""
        self.watch(sock, 0, lambda _: None)
        sock.close()

    def close(self) -> None:
        """End the thread.

        :raises RuntimeError: it did not end within 2 s
        """
        with self._lock:
            if self._open:
                self._stopping = True
                self._wake()
        self._thread.join(timeout=_CLOSE_LIMIT)
        if self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} did not end within {_CLOSE_LIMIT:g} s")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full buffer wakes it already
            self._wake_writer.send(b"\0")

    def _woken(self, _mask: int) -> None:
        self._wake_reader.recv(READ_SIZE)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._end()

    def _turn(self) -> None:
        limit = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, mask in self._selector.select(limit):
            key.data(mask)
        now, due = time.monotonic(), []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for function in due:
            function()
        while self._commands:
            self._execute(*self._commands.popleft())

    def _execute(self, function: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - it belongs to the caller, who raises it
            future.set_exception(error)

    def _end(self) -> None:
        with self._lock:
            self._open = False
            self._wake_reader.close()
            self._wake_writer.close()
        self._selector.close()
        for _, future in self._commands:
            future.set_exception(RuntimeError(f"{self._thread.name} has ended"))


class Listener:
    """A port of 127.0.0.1 that can refuse, and listen again, without being lost to another process.

    A second socket stays bound to the port and never listens; so the port stays reserved,
    and the kernel refuses connections to it. All methods run on the loop's thread.
    """

    def __init__(self, loop: Loop, on_accept: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._on_accept = on_accept
        self._listening: socket.socket | None = None
        self._reserved = self._bound(0)
        self.address: Address = self._reserved.getsockname()

    def listen(self) -> None:
        """Accept connections, unless it does already."""
        if self._listening is None:
            self._listening = self._bound(self.address[1])
            self._listening.listen(512)
            self._loop.watch(self._listening, selectors.EVENT_READ, lambda _: self._accept())

    def refuse(self) -> None:
        """Have connections refused; those that wait in the backlog are reset."""
        if self._listening is not None:
            self._loop.discard(self._listening)
            self._listening = None

    def close(self) -> None:
        """Release the port."""
        self.refuse()
        self._reserved.close()

    def _bound(self, port: int) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.setblocking(False)
        return sock

    def _accept(self) -> None:
        if self._listening is None:
            return
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # gone before we looked
            sock, _ = self._listening.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._on_accept(sock)


def reset_on_close(sock: socket.socket) -> None:
    """Make the coming ``close()`` send RST instead of FIN (socket(7), SO_LINGER with 0 s)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Stream:
    """A client's socket, and what is still to be written to it. On the loop's thread only."""

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
        """Whether received data may be read."""
        return not (self.paused or self._closing or self.ended)

    def pause(self, paused: bool) -> None:
        """Stop reading, or read again."""
        self.paused = paused
        if not self.ended:
            self.watch()

    def send(self, data: bytes) -> None:
        """Write now what the client takes, and the rest when it does."""
        if not self.ended:
            self._unwritten += data
            self._flush()

    def close(self) -> None:
        """FIN, once all is written."""
        if not self.ended:
            self._closing = True
            self._flush()

    def reset(self) -> None:
        """RST, at once."""
        if not self.ended:
            reset_on_close(self._socket)
            self.end()

    def end(self) -> None:
        """Close at once; what is not yet written is lost."""
        if not self.ended:
            self.ended = True
            self._loop.discard(self._socket)
            self._on_end()

    def watch(self) -> None:
        """Watch for what is to be read or written; the first call begins reading."""
        reads = self.reads and len(self._unwritten) < _UNWRITTEN_LIMIT
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
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # reset by the client: no different from its FIN here
            data = b""
        if data:
            self._on_data(data)
        else:
            self.end()
