"""A TCP proxy whose faults are switched while connections live.

Owns: the bytes between a client and an upstream, and what may happen to them on the way; and the
``Loop`` and ``Listener`` on which it stands, and the fake broker too. Must not know AMQP, nor
anything else of this library: it sees bytes.

Runs on: ``mlproducer-proxy`` (a ``Loop``'s own thread); public methods on any other thread, they
return once the proxy's thread has done what they say.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import math
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar, final, get_args
from urllib.parse import urlsplit, urlunsplit

from attrs import asdict, define, evolve, field, frozen, validators

__all__ = ["Direction", "Listener", "Loop", "Proxy"]

Direction = Literal["c2s", "s2c", "both"]
Address = tuple[str, int]
T = TypeVar("T")

_CALL_LIMIT = 5.0
_CLOSE_LIMIT = 2.0
_QUEUE_LIMIT = 1 << 20
_READ_SIZE = 1 << 16


class Loop:
    """A thread with a selector, timers, and commands from other threads.

    The selector and the timers belong to its thread. A callback that raises ends the thread, for it
    is a bug; a command that raises does so in its caller.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._sequence = itertools.count()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._lock = threading.Lock()  # guards: _commands, _open, _stopping, ringing
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._open = True
        self._stopping = False
        self.watch(self._bell, selectors.EVENT_READ, lambda _: self._bell.recv(_READ_SIZE))
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the thread still takes commands."""
        return self._open

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread and return what it returns, or raise what it raises.

        :raises RuntimeError: the loop has been closed
        :raises TimeoutError: it took more than 5 s (``concurrent.futures.TimeoutError``)
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError(f"{self._thread.name} has ended")
            self._commands.append((function, future))
            self._ring()
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
                self._ring()
        self._thread.join(timeout=_CLOSE_LIMIT)
        if self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} did not end within {_CLOSE_LIMIT:g} s")

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full bell rings already
            self._ringer.send(b"\0")

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
            self._obey(*self._commands.popleft())

    def _obey(self, function: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - it belongs to the caller, who raises it
            future.set_exception(error)

    def _end(self) -> None:
        with self._lock:
            self._open = False
            self._bell.close()
            self._ringer.close()
        self._selector.close()
        for _, future in self._commands:
            future.set_exception(RuntimeError(f"{self._thread.name} has ended"))


class Listener:
    """A port of 127.0.0.1 that can refuse, and listen again, without being lost to another process.

    A second socket stays bound to the port and never listens; so the port is ours, and connecting
    to it is refused by the kernel. All methods run on the loop's thread.
    """

    def __init__(self, loop: Loop, on_accept: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._on_accept = on_accept
        self._listening: socket.socket | None = None
        self._reserved = self._bound(0)
        self.address: Address = self._reserved.getsockname()

    def listen(self) -> None:
        """Accept connections; does nothing where it does already."""
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
        """Give the port back."""
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


@frozen
class _Faults:
    """What lasts in one direction; times in seconds, sizes in bytes."""

    stalled: bool = False
    hole: bool = False
    delay: float = field(default=0.0, validator=validators.ge(0))
    jitter: float = field(default=0.0, validator=validators.ge(0))
    rate: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    slice: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    cut_after: int | None = field(default=None, validator=validators.optional(validators.ge(0)))


@define
class _Flow:
    """One direction of all connections: its faults, and how many bytes it has delivered."""

    faults: _Faults = field(factory=_Faults)
    passed: int = 0


@define(eq=False)
class _Pipe:
    """One direction of one connection: what was read from its source and is not yet delivered."""

    flow: _Flow
    source: socket.socket
    sink: socket.socket | None
    queue: deque[tuple[float, memoryview]] = field(factory=deque)
    queued: int = 0
    passed: int = 0
    ended: bool = False
    shut: bool = False
    blocked: bool = False
    free_at: float = 0.0

    @property
    def over(self) -> bool:
        return self.ended if self.sink is None else self.shut

    def wants_read(self) -> bool:
        return not (self.ended or self.flow.faults.stalled or self.queued >= _QUEUE_LIMIT)

    def read(self, now: float) -> None:
        faults = self.flow.faults
        try:
            data = self.source.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            if not faults.hole:  # a black hole swallows the reset as well
                raise
            data = b""
        if not data:
            self.ended = True
            return
        due = now + faults.delay + random.random() * faults.jitter
        last = self.queue[-1][0] if self.queue else due
        self.queue.append((max(due, last), memoryview(data)))
        self.queued += len(data)

    def write(self, now: float) -> None:
        """Deliver what is due.

        :raises OSError: the sink is gone, or `cut_after` says that it shall be
        """
        faults = self.flow.faults
        self.blocked = False
        if faults.hole or self.sink is None:
            self.queue.clear()
            self.queued = 0
            return
        self._check_cut(faults)
        while (due := self.next_due()) is not None and due <= now:
            self._send(self.sink, faults, now)
            self._check_cut(faults)
            if faults.slice:
                break
        if self.ended and not (self.queue or self.shut or faults.stalled):
            self.shut = True
            self.sink.shutdown(socket.SHUT_WR)

    def next_due(self) -> float | None:
        if self.blocked or not self.queue or self.flow.faults.stalled:
            return None
        return max(self.queue[0][0], self.free_at)

    def _send(self, sink: socket.socket, faults: _Faults, now: float) -> None:
        due, data = self.queue.popleft()
        try:
            sent = sink.send(data[: self._piece(faults)])
        except BlockingIOError:
            self.blocked, sent = True, 0
        if sent < len(data):
            self.queue.appendleft((due, data[sent:]))
        self.queued -= sent
        self.passed += sent
        self.flow.passed += sent
        if faults.rate is not None:
            self.free_at = now + sent / faults.rate

    def _piece(self, faults: _Faults) -> int:
        size = faults.slice or _READ_SIZE
        if faults.rate is not None:
            size = min(size, max(1, int(faults.rate / 20)))  # a piece every 50 ms
        return size if faults.cut_after is None else min(size, faults.cut_after - self.passed)

    def _check_cut(self, faults: _Faults) -> None:
        if faults.cut_after is not None and self.passed >= faults.cut_after:
            raise ConnectionResetError(errno.ECONNRESET, "cut_after")


class _Connection:
    """A client's socket, the upstream's if any, and a pipe each way. On the proxy's thread only."""

    def __init__(self, loop: Loop, pipes: list[_Pipe], on_end: Callable[[_Connection], None]):
        self._loop = loop
        self._pipes = pipes
        self._on_end = on_end
        self._wake_at = math.inf
        self._ended = False

    def pump(self, readable: _Pipe | None = None) -> None:
        """Read from `readable`, deliver what is due, and see what to wait for next."""
        if self._ended:
            return
        now = time.monotonic()
        try:
            if readable is not None and readable.wants_read():
                readable.read(now)
            for pipe in self._pipes:
                pipe.write(now)
        except OSError:  # one side is gone, and the other shall see it as it was
            self.reset()
            return
        if all(pipe.over for pipe in self._pipes):
            self.end()
        else:
            self._watch()

    def reset(self) -> None:
        for pipe in self._pipes:
            reset_on_close(pipe.source)
        self.end()

    def half_close(self) -> None:
        """FIN to the client; what it sends still passes, what the upstream sends is discarded."""
        with contextlib.suppress(OSError):  # the client is gone already: the pump will see it
            self._pipes[0].source.shutdown(socket.SHUT_WR)
        for pipe in self._pipes[1:]:
            pipe.sink = None
        self.pump()

    def fin(self) -> None:
        """FIN both ways; the client is read to its end, or closing would send it RST."""
        for pipe in self._pipes[1:]:
            self._loop.discard(pipe.source)
        del self._pipes[1:]
        self._pipes[0].sink = None
        self.half_close()

    def end(self) -> None:
        self._ended = True
        for pipe in self._pipes:
            self._loop.discard(pipe.source)
        self._on_end(self)

    def _watch(self) -> None:
        blocked = [pipe.sink for pipe in self._pipes if pipe.blocked]
        for pipe in self._pipes:
            events = selectors.EVENT_READ if pipe.wants_read() else 0
            events |= selectors.EVENT_WRITE if pipe.source in blocked else 0
            self._loop.watch(pipe.source, events, partial(self._ready, pipe))
        due = min((pipe.next_due() or math.inf for pipe in self._pipes), default=math.inf)
        if due < self._wake_at:
            self._wake_at = due
            self._loop.call_at(due, self._awake)

    def _ready(self, pipe: _Pipe, mask: int) -> None:
        self.pump(pipe if mask & selectors.EVENT_READ else None)

    def _awake(self) -> None:
        self._wake_at = math.inf
        self.pump()


@final
class Proxy:
    """Forwards a port of 127.0.0.1 to `upstream` (host, port), with faults to switch on and off.

    A fault of the flow holds for present and future connections until it is switched off, with
    ``None``, 0 or :meth:`heal`. ``"c2s"`` is client to server. A method returns when its fault has
    taken effect. At most 1 MiB is held for each direction of a connection; then reading stops.

    ::

        with Proxy(("127.0.0.1", 5672)) as proxy:
            connection = pika.BlockingConnection(pika.URLParameters(proxy.url(url)))
            proxy.reset()
    """

    def __init__(self, upstream: Address) -> None:
        self._upstream = _resolve(upstream)
        self._flows: dict[str, _Flow] = {"c2s": _Flow(), "s2c": _Flow()}
        self._deaf = False
        self._changed = threading.Condition()  # guards: _live, _accepted
        self._live: list[_Connection] = []
        self._accepted = 0
        self._loop = Loop("mlproducer-proxy")
        self._listener = Listener(self._loop, self._admit)
        self._loop.call(self._listener.listen)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """Host and port to connect to; the same after :meth:`refuse` and :meth:`accept`."""
        return self._listener.address

    @property
    def port(self) -> int:
        """The port alone."""
        return self.address[1]

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._live)

    @property
    def accepted(self) -> int:
        """How many clients have ever connected."""
        return self._accepted

    def url(self, amqp_url: str) -> str:
        """`amqp_url` with host and port replaced by the proxy's."""
        parts = urlsplit(amqp_url)
        userinfo, at, _ = parts.netloc.rpartition("@")
        netloc = f"{userinfo}{at}{self.address[0]}:{self.port}"
        return urlunsplit(parts._replace(netloc=netloc))

    def passed(self, direction: Literal["c2s", "s2c"]) -> int:
        """Bytes delivered in `direction`, over all connections, those just received included."""
        return self._loop.call(lambda: self._flows[direction].passed)

    def wait_for_connections(self, n: int, timeout: float) -> None:
        """Wait until at least `n` clients are connected; with 0, until none is.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._wait(lambda: self.connections >= n if n else not self._live, timeout)

    def wait_for_accepted(self, n: int, timeout: float) -> None:
        """Wait until `n` clients have ever connected.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._wait(lambda: self.accepted >= n, timeout)

    def reset(self) -> None:
        """RST to both sides of every connection."""
        self._loop.call(lambda: self._each(_Connection.reset))

    def fin(self) -> None:
        """End every connection in order (FIN) on both sides, without a word of AMQP."""
        self._loop.call(lambda: self._each(_Connection.fin))

    def half_close(self) -> None:
        """FIN to the client only: it may still send, and the upstream still hears it."""
        self._loop.call(lambda: self._each(_Connection.half_close))

    def stall(self, direction: Direction = "both") -> None:
        """Neither read nor deliver, until :meth:`resume`; the sender's buffers fill up."""
        self._set(direction, stalled=True)

    def resume(self) -> None:
        """End :meth:`stall`; nothing is lost by it."""
        self._set("both", stalled=False)

    def hole(self, direction: Direction = "both") -> None:
        """Read and discard, also the FIN or RST of the side that sends: a black hole."""
        self._set(direction, hole=True)

    def heal(self) -> None:
        """End every fault of the flow: stall, hole, delay, rate, slice, cut_after."""
        self._set("both", **asdict(_Faults()))

    def delay(self, seconds: float, jitter: float = 0.0, direction: Direction = "both") -> None:
        """Deliver after `seconds`, and up to `jitter` seconds more; the order stays."""
        self._set(direction, delay=seconds, jitter=jitter)

    def rate(self, bytes_per_second: float | None, direction: Direction = "both") -> None:
        """Deliver no faster than this, on each connection."""
        self._set(direction, rate=bytes_per_second)

    def slice(self, n: int | None, direction: Direction = "both") -> None:
        """Deliver in pieces of `n` bytes; with :meth:`rate`, each far enough from the next."""
        self._set(direction, slice=n)

    def cut_after(self, n: int | None, direction: Direction = "both") -> None:
        """Reset a connection when `n` bytes have passed on it; the n-th is still delivered."""
        self._set(direction, cut_after=n)

    def refuse(self) -> None:
        """Have new connections refused (ECONNREFUSED); live ones stay."""
        self._loop.call(self._listener.refuse)

    def deaf(self) -> None:
        """Accept new connections, but never speak and never forward; live ones stay."""
        self._loop.call(lambda: self._admit_as(deaf=True))

    def accept(self) -> None:
        """Accept and forward new connections again: the end of :meth:`refuse` and :meth:`deaf`."""
        self._loop.call(lambda: self._admit_as(deaf=False))

    def retarget(self, upstream: Address) -> None:
        """Forward new connections to `upstream`; live ones stay where they are."""
        self._upstream = _resolve(upstream)

    def close(self) -> None:
        """End every connection and the thread, and give the port back. Idempotent.

        :raises RuntimeError: the thread did not end within 2 s
        """
        if self._loop.is_open:
            self._loop.call(self._shut)
        self._loop.close()

    def _set(self, direction: Direction, **changes: Any) -> None:
        if direction not in get_args(Direction):
            raise ValueError(f"direction: {direction!r} given, 'c2s', 's2c' or 'both' accepted")
        flows = [flow for side, flow in self._flows.items() if direction in (side, "both")]
        self._loop.call(lambda: self._apply(flows, changes))

    def _apply(self, flows: list[_Flow], changes: dict[str, Any]) -> None:
        for flow in flows:
            flow.faults = evolve(flow.faults, **changes)
        self._each(_Connection.pump)

    def _each(self, act: Callable[[_Connection], None]) -> None:
        for connection in list(self._live):
            act(connection)

    def _admit_as(self, *, deaf: bool) -> None:
        self._deaf = deaf
        self._listener.listen()

    def _admit(self, client: socket.socket) -> None:
        if self._deaf:
            pipes = [_Pipe(self._flows["c2s"], client, None)]
        else:
            upstream = _connecting(*self._upstream)
            pipes = [
                _Pipe(self._flows["c2s"], client, upstream),
                _Pipe(self._flows["s2c"], upstream, client),
            ]
        connection = _Connection(self._loop, pipes, self._on_end)
        with self._changed:
            self._live.append(connection)
            self._accepted += 1
            self._changed.notify_all()
        connection.pump()

    def _on_end(self, connection: _Connection) -> None:
        with self._changed:
            self._live.remove(connection)
            self._changed.notify_all()

    def _wait(self, come_about: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(come_about, timeout):
                raise TimeoutError(f"{len(self._live)} connected, {self._accepted} accepted so far")

    def _shut(self) -> None:
        self._listener.close()
        self._each(_Connection.end)


def _resolve(address: Address) -> tuple[int, Any]:
    family, _, _, _, sockaddr = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    return family, sockaddr


def _connecting(family: int, sockaddr: Any) -> socket.socket:
    """A socket on its way to `sockaddr`; where that fails, its first use raises."""
    sock = socket.socket(family)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect_ex(sockaddr)
    return sock
