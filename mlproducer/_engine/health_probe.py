"""The health check under way: its questions, on a channel of its own, and who waits for the answer.

Asked is whether the exchange is there, and how much the queues hold. Any answer means that the
broker is alive, also that something is missing or forbidden, which closes this channel alone. The
broker logs each such answer, so what it has refused is asked for seldom.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from mlproducer._core import events
from mlproducer._core.events import Emit
from mlproducer._core.interfaces import Loss
from mlproducer._engine.close_reasons import NOT_ALLOWED, NOT_IMPLEMENTED
from mlproducer._engine.health import settle
from mlproducer.topology import Topology

SELDOM = 120
"""Checks that leave out what is missing or forbidden: an hour's, at the interval of 30 s."""

OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]


class HealthProbe:
    """What the health thread waits for; a check that has been answered goes on reading queues."""

    def __init__(self, topology: Topology, emit: Emit) -> None:
        self._topology = topology
        self._emit = emit
        self._reply: Future[None] | None = None
        self._left_out: dict[str, int] = {}
        self._excused = False

    def begin(self, open_channel: OpenChannel, reply: Future[None]) -> None:
        """Ask; the reply is resolved at the first answer."""
        self._reply = reply
        questions = _Questions(self._topology.exchange, self._due(), self)
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

    def excuses(self, loss: Loss) -> bool:
        """Whether a connection that ended while we asked may have ended over something else.

        So it may for once, until the next answer: a message in flight can end it just then. But a
        broker says so where it allows no second channel, or has no answer to what was asked.
        """
        excused, self._excused = self._excused, True
        return not excused and loss.reply_code not in (0, NOT_ALLOWED, NOT_IMPLEMENTED)

    def on_alive(self) -> None:
        """Take any answer for a sign of life."""
        self._excused = False
        if self.end():
            self._emit(events.HealthChecked(alive=True))

    def on_depth(self, queue: str, messages: int) -> None:
        """Tell how much a queue holds."""
        self._emit(events.QueueDepth(queue, messages))

    def on_refusal(self, target: str, loss: Loss) -> None:
        """Tell that something is missing or forbidden, and ask for it seldom from now on."""
        self._left_out[target] = SELDOM
        self._emit(events.HealthFault(target, loss))

    def _due(self) -> Iterable[str]:
        """Return what is asked for this time; without its exchange, nothing of the topology is."""
        exchange = self._topology.exchange
        for target in (exchange, *(queue.name for queue in self._topology.queues)):
            left = self._left_out.get(target, 0)
            if not left:
                yield target
                continue
            self._left_out[target] = left - 1
            if target == exchange:
                return


class _Questions:
    """One channel's questions, one after the other."""

    def __init__(self, exchange: str, targets: Iterable[str], health_probe: HealthProbe) -> None:
        self._exchange = exchange
        self._left = deque(targets)
        self._health_probe = health_probe
        self._channel: Any = None

    def on_open(self, channel: Any) -> None:
        """Ask for the first target; where there is none, that the channel is open will do."""
        self._channel = channel
        if not self._left:
            self._health_probe.on_alive()
        self._ask()

    def on_closed(self, loss: Loss) -> None:
        """Take the broker's refusal for an answer; without a reply code it has not said a word."""
        if self._left and loss.reply_code:
            self._health_probe.on_refusal(self._left[0], loss)
        self._health_probe.on_alive()

    def _on_answer(self, frame: Any) -> None:
        self._health_probe.on_alive()
        target = self._left.popleft()
        if target != self._exchange:
            self._health_probe.on_depth(target, frame.method.message_count)
        if self._channel.is_open:  # else the connection is closing
            self._ask()

    def _ask(self) -> None:
        if not self._left:
            self._channel.close()
        elif self._left[0] == self._exchange:
            self._channel.exchange_declare(self._exchange, passive=True, callback=self._on_answer)
        else:
            self._channel.queue_declare(self._left[0], passive=True, callback=self._on_answer)
