"""The health check under way: its questions, on a channel of its own, and who waits for the answer.

Asked is whether the exchange is there, and how much the queues hold. Any answer means that the
broker is alive, also that something is missing or forbidden, which closes this channel and no other.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

from mlproducer.core.ports import Loss
from mlproducer.engine.setup import OpenChannel
from mlproducer.observe.events import EventSink
from mlproducer.topology import Topology


class Checkup:
    """One check at a time."""

    def __init__(self, topology: Topology, events: EventSink) -> None:
        self._topology = topology
        self._events = events
        self._reply: Future[None] | None = None
        self._left: deque[str] = deque()
        self._channel: Any = None

    def begin(self, open_channel: OpenChannel, reply: Future[None]) -> None:
        """Ask; the reply is resolved at the first answer."""
        self._reply = reply
        self._left = deque([self._topology.exchange, *self._topology.queues])
        open_channel(self._on_open, self._on_closed)

    def waits_for(self, reply: Future[None]) -> bool:
        """Whether this very check is still without an answer."""
        return reply is self._reply

    def end(self) -> bool:
        """Let the health thread wait no longer; false if it did not."""
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.set_result(None)
        return reply is not None

    def _on_open(self, channel: Any) -> None:
        self._channel = channel
        channel.exchange_declare(self._left[0], passive=True, callback=self._on_answer)

    def _on_answer(self, frame: Any) -> None:
        self._alive()
        target = self._left.popleft()
        if target != self._topology.exchange:
            self._events.queue_depth(target, frame.method.message_count)
        if self._left:
            self._channel.queue_declare(self._left[0], passive=True, callback=self._on_answer)
        else:
            self._channel.close()

    def _on_closed(self, loss: Loss) -> None:
        """Take the broker's refusal for an answer."""
        if self._left:
            self._events.health_fault(self._left[0], loss)
        self._alive()

    def _alive(self) -> None:
        if self.end():
            self._events.health_checked(alive=True)
