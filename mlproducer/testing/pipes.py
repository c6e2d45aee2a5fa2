"""What happens to bytes between two sockets: the proxy's pipes and their faults.

Owns: the faults of one direction, the queue of one direction of one connection, and a connection's
two sockets. Must not know the proxy that switches the faults, nor what the bytes mean.

Runs on: ``mlproducer-proxy``.
"""

from __future__ import annotations

import contextlib
import errno
import math
import random
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from attrs import define, field, frozen, validators

from mlproducer.testing.socket_loop import READ_SIZE, Loop, reset_on_close

__all__ = ["Connection", "Faults", "Flow", "Pipe"]

_QUEUE_LIMIT = 1 << 20


@frozen
class Faults:
    """What lasts in one direction; times in seconds, sizes in bytes."""

    stalled: bool = False
    hole: bool = False
    delay: float = field(default=0.0, validator=validators.ge(0))
    jitter: float = field(default=0.0, validator=validators.ge(0))
    rate: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    slice: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    cut_after: int | None = field(default=None, validator=validators.optional(validators.ge(0)))


@define
class Flow:
    """One direction of all connections: its faults, and how many bytes it has delivered."""

    faults: Faults = field(factory=Faults)
    passed: int = 0


@define(eq=False)
class Pipe:
    """One direction of one connection: what was read from its source and is not yet delivered."""

    flow: Flow
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
        """Whether nothing more will come, nor has to be delivered."""
        return self.ended if self.sink is None else self.shut

    def wants_read(self) -> bool:
        """Whether the source is to be read now."""
        return not (self.ended or self.flow.faults.stalled or self.queued >= _QUEUE_LIMIT)

    def read(self, now: float) -> None:
        """Take what the source has sent.

        :raises OSError: the source was reset
        """
        faults = self.flow.faults
        try:
            data = self.source.recv(READ_SIZE)
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
        """When the next bytes are due; ``None`` where that is not a matter of time."""
        if self.blocked or not self.queue or self.flow.faults.stalled:
            return None
        return max(self.queue[0][0], self.free_at)

    def _send(self, sink: socket.socket, faults: Faults, now: float) -> None:
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

    def _piece(self, faults: Faults) -> int:
        size = faults.slice or READ_SIZE
        if faults.rate is not None:
            size = min(size, max(1, int(faults.rate / 20)))  # a piece every 50 ms
        return size if faults.cut_after is None else min(size, faults.cut_after - self.passed)

    def _check_cut(self, faults: Faults) -> None:
        if faults.cut_after is not None and self.passed >= faults.cut_after:
            raise ConnectionResetError(errno.ECONNRESET, "cut_after")


class Connection:
    """A client's socket, the upstream's if any, and a pipe each way. On the proxy's thread only."""

    def __init__(self, loop: Loop, pipes: list[Pipe], on_end: Callable[[Connection], None]):
        self._loop = loop
        self._pipes = pipes
        self._on_end = on_end
        self._wake_at = math.inf
        self._ended = False

    def pump(self, readable: Pipe | None = None) -> None:
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
        """RST to both sides."""
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
        """Close both sides."""
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

    def _ready(self, pipe: Pipe, mask: int) -> None:
        self.pump(pipe if mask & selectors.EVENT_READ else None)

    def _awake(self) -> None:
        self._wake_at = math.inf
        self.pump()
