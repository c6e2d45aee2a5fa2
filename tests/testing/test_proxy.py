"""The proxy's faults, seen from both ends of plain sockets, and once through pika.

Runs on: the test's thread, which holds both ends itself.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest

from mlproducer.testing.fake_broker import FakeBroker
from mlproducer.testing.proxy import Proxy
from mlproducer.testing.socket_loop import Loop
from tests.stopwatch import in_time

LIMIT = 120.0


class Ends:
    """An upstream that listens, a proxy before it, and the pairs of sockets that go through."""

    def __init__(self) -> None:
        self._upstream = socket.create_server(("127.0.0.1", 0))
        self._upstream.settimeout(LIMIT)
        self._sockets: list[socket.socket] = [self._upstream]
        self.proxy = Proxy(self._upstream.getsockname())

    def client(self) -> socket.socket:
        """A client that has connected to the proxy."""
        return self._keep(socket.create_connection(self.proxy.address, timeout=LIMIT))

    def server(self) -> socket.socket:
        """The upstream's end of the next connection."""
        return self._keep(self._upstream.accept()[0])

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client, and the upstream's end of the same connection."""
        client = self.client()
        return client, self.server()

    def close(self) -> None:
        """End everything."""
        self.proxy.close()
        for sock in self._sockets:
            sock.close()

    def _keep(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(LIMIT)
        self._sockets.append(sock)
        return sock


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A proxy with an upstream."""
    ends = Ends()
    yield ends
    ends.close()


def receive(sock: socket.socket, n: int) -> bytes:
    """Exactly `n` bytes, or what there was before the end."""
    data = b""
    while len(data) < n and (piece := sock.recv(n - len(data))):
        data += piece
    return data


def silent(sock: socket.socket, seconds: float = 0.1) -> bool:
    """Whether nothing comes for a while, neither bytes nor an end."""
    sock.settimeout(seconds)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(LIMIT)
    return False


def resets(sock: socket.socket) -> bool:
    """Whether the next thing to come is RST."""
    try:
        sock.recv(1)
    except ConnectionResetError:
        return True
    return False


def descriptors() -> list[str]:
    """What this process has open."""
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_forwards_both_ways_and_counts(ends: Ends) -> None:
    """Bytes pass in both directions, and are counted for each."""
    client, server = ends.pair()
    client.sendall(b"question")
    assert receive(server, 8) == b"question"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"
    assert (ends.proxy.passed("c2s"), ends.proxy.passed("s2c")) == (8, 6)
    assert (ends.proxy.connections, ends.proxy.accepted) == (1, 1)


def test_ten_megabytes_arrive_unchanged(ends: Ends) -> None:
    """A stream longer than every buffer arrives whole and in order."""
    client, server = ends.pair()
    data = os.urandom(1 << 20) * 10
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert receive(server, len(data)) == data
    sender.join(timeout=LIMIT)


def test_url_keeps_all_but_host_and_port(ends: Ends) -> None:
    """Only host and port of an URL are replaced, whatever the password holds."""
    port = ends.proxy.port
    url = "amqps://u:p%40ss@rabbit.example:5671/%2Fv?heartbeat=5"
    assert ends.proxy.url(url) == f"amqps://u:p%40ss@127.0.0.1:{port}/%2Fv?heartbeat=5"
    assert ends.proxy.url("amqp://h/") == f"amqp://127.0.0.1:{port}/"


def test_the_end_of_one_side_is_passed_on(ends: Ends) -> None:
    """A client's FIN reaches the upstream after its bytes; the answer still comes back."""
    client, server = ends.pair()
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert receive(server, 100) == b"last words"
    server.sendall(b"heard")
    server.close()
    assert receive(client, 100) == b"heard"
    ends.proxy.wait_for_connections(0, LIMIT)


def test_the_reset_of_one_side_is_passed_on(ends: Ends) -> None:
    """An upstream's RST reaches the client as RST, not as FIN."""
    client, server = ends.pair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.close()
    assert resets(client)


def test_reset_reaches_both_sides(ends: Ends) -> None:
    """reset() is RST for client and upstream, and has ended the connection when it returns."""
    client, server = ends.pair()
    ends.proxy.reset()
    assert ends.proxy.connections == 0
    assert resets(client)
    assert resets(server)


def test_fin_is_an_orderly_end(ends: Ends) -> None:
    """fin() ends both sides with FIN, even where the client had more to say."""
    client, server = ends.pair()
    ends.proxy.fin()
    assert client.recv(1) == b""
    assert server.recv(1) == b""
    client.sendall(b"too late")
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    ends.proxy.wait_for_connections(0, LIMIT)


def test_half_close_leaves_the_way_to_the_upstream(ends: Ends) -> None:
    """After half_close() the client reads the end, and the upstream still hears it."""
    client, server = ends.pair()
    ends.proxy.half_close()
    assert client.recv(1) == b""
    server.sendall(b"into the void")
    client.sendall(b"still here")
    assert receive(server, 10) == b"still here"
    assert ends.proxy.connections == 1


def test_stall_holds_and_resume_loses_nothing(ends: Ends) -> None:
    """A stalled direction is silent, the other flows; resume() delivers what was held."""
    client, server = ends.pair()
    ends.proxy.stall("c2s")
    client.sendall(b"held")
    server.sendall(b"free")
    assert receive(client, 4) == b"free"
    assert silent(server)
    ends.proxy.resume()
    assert receive(server, 4) == b"held"


def test_a_stalled_sender_is_blocked_at_last(ends: Ends) -> None:
    """A stall pushes back: the sender cannot write for ever, and the proxy holds little."""
    client, _ = ends.pair()
    ends.proxy.stall()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(64 << 20))
    assert ends.proxy.passed("c2s") == 0


def test_a_reader_that_does_not_read_blocks_the_sender(ends: Ends) -> None:
    """At most about 1 MiB and the kernel's buffers wait for a sink that does not read."""
    client, _ = ends.pair()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(64 << 20))
    [connection] = ends.proxy._live
    assert connection._pipes[0].queued < (1 << 20) + (1 << 16)


def test_hole_discards_and_heal_ends_it(ends: Ends) -> None:
    """What is sent into a hole is gone for ever; after heal() bytes pass again."""
    client, server = ends.pair()
    ends.proxy.hole("s2c")
    server.sendall(b"lost")
    client.sendall(b"passes")
    assert receive(server, 6) == b"passes"
    assert silent(client)
    ends.proxy.heal()
    server.sendall(b"found")
    assert receive(client, 5) == b"found"


@pytest.mark.parametrize("linger", [None, struct.pack("ii", 1, 0)], ids=["fin", "rst"])
def test_a_hole_swallows_the_end_too(ends: Ends, linger: bytes | None) -> None:
    """The other side of a black hole does not learn that its peer has gone."""
    client, server = ends.pair()
    ends.proxy.hole()
    if linger is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()
    assert silent(server)
    assert ends.proxy.connections == 1


def test_delay_is_latency_not_stop_and_wait(ends: Ends) -> None:
    """Twenty pieces sent over 0.1 s arrive in order, each late by the delay, not one by one."""
    client, server = ends.pair()
    ends.proxy.delay(0.2, jitter=0.05, direction="c2s")
    with in_time(1.0, 0.2):
        for number in range(20):
            client.sendall(bytes([number]))
        assert receive(server, 20) == bytes(range(20))


def test_delay_holds_in_its_direction_only(ends: Ends) -> None:
    """The direction that is not delayed is as fast as before."""
    client, server = ends.pair()
    ends.proxy.delay(3.0, direction="c2s")
    server.sendall(b"x")
    client.settimeout(1.0)
    assert client.recv(1) == b"x"


def test_rate_limits_throughput(ends: Ends) -> None:
    """4,000 bytes at 10,000 a second take 0.4 s less the first piece, and do arrive."""
    client, server = ends.pair()
    ends.proxy.rate(10_000, "c2s")
    with in_time(1.5, 0.3):
        client.sendall(bytes(4_000))
        assert len(receive(server, 4_000)) == 4_000


def test_slices_are_small_and_complete(ends: Ends) -> None:
    """With a rate beside it, a slice of 3 arrives as 3 bytes at a time; nothing is lost."""
    client, server = ends.pair()
    ends.proxy.slice(3, "s2c")
    server.sendall(bytes(10_000))
    assert len(receive(client, 10_000)) == 10_000
    ends.proxy.rate(300, "s2c")
    server.sendall(b"abcdefgh")
    pieces = [client.recv(100) for _ in range(3)]
    assert pieces == [b"abc", b"def", b"gh"]


@pytest.mark.parametrize("n", [1, 10, 99])
def test_cut_after_delivers_exactly_so_many_bytes(ends: Ends, n: int) -> None:
    """A future connection passes n bytes, not one more, and is then reset on both sides."""
    ends.proxy.cut_after(n, "c2s")
    client, server = ends.pair()
    client.sendall(bytes(100))
    assert len(receive(server, n)) == n
    assert resets(server)
    assert resets(client)


def test_cut_after_counts_what_has_passed_already(ends: Ends) -> None:
    """A live connection beyond the limit is reset at once; one in the other direction is not."""
    client, server = ends.pair()
    client.sendall(bytes(10))
    assert len(receive(server, 10)) == 10
    ends.proxy.cut_after(10, "s2c")
    assert ends.proxy.connections == 1
    ends.proxy.cut_after(10, "c2s")
    assert ends.proxy.connections == 0


def test_refuse_and_accept_keep_port_and_live_connections(ends: Ends) -> None:
    """While refused, connecting fails at once, live connections flow, and the port stays ours."""
    client, server = ends.pair()
    for _ in range(3):
        ends.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            ends.client()
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        ends.proxy.accept()
        other, other_server = ends.pair()
        other.sendall(b"y")
        assert other_server.recv(1) == b"y"
    assert ends.proxy.accepted == 4


def test_deaf_accepts_and_says_nothing(ends: Ends) -> None:
    """A deaf proxy accepts TCP and no more, lets the client go, and hears again after accept()."""
    ends.proxy.deaf()
    client = ends.client()
    client.sendall(b"AMQP\x00\x00\x09\x01")
    assert silent(client)
    assert ends.proxy.connections == 1
    client.close()
    ends.proxy.wait_for_connections(0, LIMIT)
    ends.proxy.accept()
    client, server = ends.pair()
    client.sendall(b"x")
    assert server.recv(1) == b"x"


def test_retarget_moves_new_connections(ends: Ends) -> None:
    """New connections go to the new upstream, live ones stay with the old."""
    client, server = ends.pair()
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(LIMIT)
        ends.proxy.retarget(other.getsockname())
        ends.client().sendall(b"new")
        with other.accept()[0] as accepted:
            assert receive(accepted, 3) == b"new"
    client.sendall(b"old")
    assert receive(server, 3) == b"old"


def test_an_upstream_that_is_down_is_a_reset(ends: Ends) -> None:
    """Where the upstream refuses, the client's connection is reset, and the proxy lives on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ends.proxy.retarget(unused.getsockname())
        with pytest.raises(ConnectionResetError):
            ends.client().recv(1)
    ends.proxy.wait_for_connections(0, LIMIT)


def test_waiting_is_woken_and_limited(ends: Ends) -> None:
    """wait_for_connections wakes at the event, and says what there was when it comes too late."""
    with pytest.raises(TimeoutError, match="0 connected, 0 accepted"):
        ends.proxy.wait_for_connections(1, 0.05)
    waiter = threading.Thread(target=ends.proxy.wait_for_accepted, args=(2, LIMIT))
    waiter.start()
    ends.pair(), ends.pair()
    waiter.join(timeout=LIMIT)
    assert not waiter.is_alive()
    ends.proxy.wait_for_connections(2, LIMIT)


@pytest.mark.parametrize(
    ("method", "arguments", "names"),
    [
        ("stall", ("up",), "direction"),
        ("rate", (0,), "rate"),
        ("slice", (0,), "slice"),
        ("cut_after", (-1,), "cut_after"),
        ("delay", (-1.0,), "delay"),
    ],
)
def test_wrong_values_are_refused(
    ends: Ends, method: str, arguments: tuple[Any, ...], names: str
) -> None:
    """A wrong value raises in the caller, names the field, and leaves the proxy working."""
    with pytest.raises(ValueError, match=names):
        getattr(ends.proxy, method)(*arguments)
    client, server = ends.pair()
    client.sendall(b"x")
    assert server.recv(1) == b"x"


def test_pika_survives_one_byte_slices_and_sees_a_reset() -> None:
    """A real client's handshake passes in slices of one byte; a reset ends its connection."""
    with FakeBroker() as broker, Proxy(("127.0.0.1", broker.port)) as proxy:
        proxy.slice(1)
        connection = pika.BlockingConnection(pika.URLParameters(proxy.url(broker.url)))
        connection.channel()
        proxy.reset()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            connection.process_data_events(time_limit=LIMIT)


def test_pika_is_reset_within_the_handshake() -> None:
    """cut_after ends a real client's handshake wherever it is put, up to its last byte."""
    with FakeBroker() as broker, Proxy(("127.0.0.1", broker.port)) as proxy:
        parameters = pika.URLParameters(proxy.url(broker.url))
        connection = pika.BlockingConnection(parameters)
        handshake = proxy.passed("s2c")
        connection.close()
        # pika raises ValueError where the reset comes before it has looked at what it connected.
        reset = (pika.exceptions.AMQPConnectionError, ValueError)
        for n in (0, 1, 8, handshake // 2, handshake - 1):
            proxy.cut_after(n, "s2c")
            with pytest.raises(reset):
                pika.BlockingConnection(parameters)
        proxy.cut_after(handshake + 1, "s2c")
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            pika.BlockingConnection(parameters).channel()


def test_close_ends_the_thread_and_every_descriptor() -> None:
    """close() takes less than 2 s with faults on and clients in, twice, and leaves nothing."""
    before = descriptors()
    ends = Ends()
    pairs = [ends.pair() for _ in range(5)]
    ends.proxy.fin()
    pairs += [ends.pair() for _ in range(5)]
    ends.proxy.stall()
    ends.proxy.refuse()
    with in_time(2.0):
        ends.proxy.close()
        ends.proxy.close()
    assert not [t for t in threading.enumerate() if t.name == "mlproducer-proxy"]
    with pytest.raises(RuntimeError, match="has ended"):
        ends.proxy.reset()
    ends.close()
    assert descriptors() == before
    assert len(pairs) == 10


def test_a_thousand_resets_leave_nothing() -> None:
    """1,000 connections and resets leave no connection, no timer and no descriptor behind."""
    ends = Ends()
    before = len(descriptors())
    for _ in range(1000):
        client = socket.create_connection(ends.proxy.address, timeout=LIMIT)
        server = ends._upstream.accept()[0]
        ends.proxy.reset()
        client.close()
        server.close()
    assert (ends.proxy.connections, ends.proxy.accepted) == (0, 1000)
    assert len(descriptors()) == before
    assert ends.proxy._loop._timers == []
    ends.close()


def test_loop_runs_timers_in_order_and_commands_once() -> None:
    """Timers fire in the order of their times, and a command returns to its caller."""
    loop = Loop("mlproducer-test-loop")
    fired: list[int] = []
    done = threading.Event()
    now = time.monotonic()
    loop.call(lambda: loop.call_at(now + 0.04, done.set))
    loop.call(lambda: loop.call_at(now + 0.02, lambda: fired.append(2)))
    loop.call(lambda: loop.call_at(now + 0.01, lambda: fired.append(1)))
    assert done.wait(LIMIT)
    assert fired == [1, 2]
    assert loop.call(lambda: threading.current_thread().name) == "mlproducer-test-loop"
    loop.close()
