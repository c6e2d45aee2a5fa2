"""A TCP proxy whose faults are switched while connections live.

Owns: the port, the live connections, and the switches of the faults. Must not
know AMQP or the library: it sees bytes.

Runs on: ``mlproducer-proxy``; public methods on any other thread, they return once the proxy's
thread has done what they say.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, Literal, final, get_args
from urllib.parse import urlsplit, urlunsplit

from attrs import asdict, evolve

from mlproducer.testing.pipes import Connection, Faults, Flow, Pipe
from mlproducer.testing.socket_loop import Address, Listener, Loop

__all__ = ["Direction", "Proxy"]

Direction = Literal["c2s", "s2c", "both"]


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
        self._flows: dict[str, Flow] = {"c2s": Flow(), "s2c": Flow()}
        self._deaf = False
        self._changed = threading.Condition()  # guards: _live, _accepted
        self._live: list[Connection] = []
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
        """How many clients have connected so far."""
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
        """Wait until `n` clients have connected, now or before.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._wait(lambda: self.accepted >= n, timeout)

    def reset(self) -> None:
        """RST to both sides of every connection."""
        self._loop.call(lambda: self._each(Connection.reset))

    def fin(self) -> None:
        """End every connection in order (FIN) on both sides, without closing AMQP."""
        self._loop.call(lambda: self._each(Connection.fin))

    def half_close(self) -> None:
        """FIN to the client only: it may still send, and the upstream still hears it."""
        self._loop.call(lambda: self._each(Connection.half_close))

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
        self._set("both", **asdict(Faults()))

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
        """End every connection and the thread, and release the port. Idempotent.

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

    def _apply(self, flows: list[Flow], changes: dict[str, Any]) -> None:
        for flow in flows:
            flow.faults = evolve(flow.faults, **changes)
        self._each(Connection.pump)

    def _each(self, act: Callable[[Connection], None]) -> None:
        for connection in list(self._live):
            act(connection)

    def _admit_as(self, *, deaf: bool) -> None:
        self._deaf = deaf
        self._listener.listen()

    def _admit(self, client: socket.socket) -> None:
        if self._deaf:
            pipes = [Pipe(self._flows["c2s"], client, None)]
        else:
            upstream = _connecting(*self._upstream)
            pipes = [
                Pipe(self._flows["c2s"], client, upstream),
                Pipe(self._flows["s2c"], upstream, client),
            ]
        connection = Connection(self._loop, pipes, self._on_end)
        with self._changed:
            self._live.append(connection)
            self._accepted += 1
            self._changed.notify_all()
        connection.pump()

    def _on_end(self, connection: Connection) -> None:
        with self._changed:
            self._live.remove(connection)
            self._changed.notify_all()

    def _wait(self, come_about: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(come_about, timeout):
                raise TimeoutError(f"{len(self._live)} connected, {self._accepted} accepted so far")

    def _shut(self) -> None:
        self._listener.close()
        self._each(Connection.end)


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
