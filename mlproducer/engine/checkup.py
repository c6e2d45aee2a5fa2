"""The health check under way: its questions, on a channel of its own, and who waits for the answer.

Asked is whether the exchange is there, and how much the queues hold. Any answer means that the
broker is alive, also that something is missing or forbidden, which closes this channel alone.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mlproducer.core.ports import Loss
from mlproducer.engine.health import settle
from mlproducer.observe.events import EventSink
from mlproducer.topology import Topology

OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]


class Checkup:
    """What the health thread waits for; a check that has been answered goes on reading queues."""

    def __init__(self, topology: Topology, events: EventSink) -> None:
        self._topology = topology
        self._events = events
        self._reply: Future[None] | None = None

    def begin(self, open_channel: OpenChannel, reply: Future[None]) -> None:
        """Ask; the reply is resolved at the first answer."""
        self._reply = reply
        questions = _Questions(self._topology, self._events, self._on_alive)
        open_channel(questions.on_open, questions.on_closed)

    def waits_for(self, reply: Future[None]) -> bool:
        """Whether this very check is still without an answer."""
        return reply is self._reply

    def end(self) -> bool:
        """Let the health thread wait no longer; false if it did not."""
        reply, self._reply = self._reply, None
        if reply is not None:
            settle(reply)
        return reply is not None

    def _on_alive(self) -> None:
        if self.end():
            self._events.health_checked(alive=True)


class _Questions:
    """One channel's questions, one after the other."""

    def __init__(self, topology: Topology, events: EventSink, alive: Callable[[], None]) -> None:
        self._left = deque([topology.exchange, *(queue.name for queue in topology.queues)])
        self._exchange = topology.exchange
        self._events = events
        self._alive = alive
        self._channel: Any = None

    def on_open(self, channel: Any) -> None:
        self._channel = channel
        channel.exchange_declare(self._exchange, passive=True, callback=self._on_answer)

    def on_closed(self, loss: Loss) -> None:
        """Take the broker's refusal for an answer; without a reply code it has not said a word."""
        if self._left and loss.reply_code:
            self._events.health_fault(self._left[0], loss)
        self._alive()

    def _on_answer(self, frame: Any) -> None:
        self._alive()
        target = self._left.popleft()
        if target != self._exchange:
            self._events.queue_depth(target, frame.method.message_count)
        if not self._channel.is_open:
            return  # the connection is closing
        if self._left:
            self._channel.queue_declare(self._left[0], passive=True, callback=self._on_answer)
        else:
            self._channel.close()
