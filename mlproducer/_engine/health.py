"""Asks the broker whether it is there, and gives a silent one up.

A broker that is frozen, or a path that is dead in one direction, keeps its TCP connection; only a
question that is not answered shows it (RabbitMQ guide, *Heartbeats*, detects it far later).

Asked is, on a channel of its own, whether the exchange is there, and how much the queues hold. Any
answer means that the broker is alive, also that something is missing or forbidden, which closes
this channel alone. The broker logs each such answer, so what it has refused is asked for seldom.

Runs on: `Health` on the health thread, its `check_soon` on any; all else on the I/O thread.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.events import Emit
from mlproducer._core.interfaces import Loss
from mlproducer._engine.close_reasons import NOT_ALLOWED, NOT_IMPLEMENTED
from mlproducer._engine.pika_adapters import Traffic
from mlproducer._engine.threads import TimerThread
from mlproducer.topology import Topology

ANSWER_LIMIT = 5.0
"""Seconds that a broker has for its answer; a shorter freeze costs no connection."""

LOOKS = 10
"""How often it is seen in that time whether it is silent, or the link to it merely slow."""

SELDOM = 120
"""Checks that leave out what is missing or forbidden: an hour's, at the interval of 30 s."""

OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]


class Health:
    """Checks at each interval, and at once when a confirm is late.

    :param interval: seconds between checks
    :param order: has something done on the I/O thread; false if that has ended
    :param probe: asks the broker; the future is resolved when it answers
    :param silent: is told again and again that there is no answer yet
    """

    def __init__(
        self,
        interval: float,
        order: Callable[[Callable[[], None]], bool],
        probe: Callable[[Future[None]], None],
        silent: Callable[[Future[None]], None],
    ) -> None:
        self.thread = TimerThread(self.check)
        self.thread.due = time.monotonic() + interval
        self._order = order
        self._probe = probe
        self._silent = silent
        self._interval = interval
        self._asked = False
        self._reply: Future[None] | None = None

    def stop(self) -> None:
        """End the thread, also if it waits for an answer."""
        self.thread.stop()
        reply = self._reply
        if reply is not None:
            settle(reply)

    def check_soon(self) -> None:
        """Check without waiting for the interval; once, however often it is asked for."""
        if not self._asked:
            self._asked = True
            self.thread.order(self.check)

    def check(self) -> None:
        """Ask, wait for the answer, and have the connection replaced if there is none."""
        self.thread.due = time.monotonic() + self._interval
        self._asked = False  # before it asks: a confirm that is late after that has it asked again
        reply: Future[None] = Future()
        self._reply = reply
        if not self._order(partial(self._probe, reply)):
            return
        waits = True
        while waits:
            try:
                reply.result(ANSWER_LIMIT / LOOKS)
            except FutureTimeoutError:
                waits = self._order(partial(self._silent, reply))
            else:
                waits = False


def settle(reply: Future[None]) -> None:
    """Resolve it, unless another thread has."""
    with contextlib.suppress(InvalidStateError):
        reply.set_result(None)


class HealthProbe:
    """The check that the health thread waits for; once answered, it goes on to read queues."""

    def __init__(self, topology: Topology, emit: Emit) -> None:
        self._topology = topology
        self._emit = emit
        self._reply: Future[None] | None = None
        self._left_out: dict[str, int] = {}
        self._excused = False
        self._traffic: Callable[[], Traffic] = Traffic
        self._seen = Traffic()
        self._arrives_at = 0
        self._since = 0.0

    def begin(
        self, open_channel: OpenChannel, traffic: Callable[[], Traffic], reply: Future[None]
    ) -> None:
        """Ask; the reply is resolved at the first answer."""
        self._reply = reply
        self._traffic, self._since = traffic, time.monotonic()
        self.on_question()
        questions = _Questions(self._topology.exchange, self._due(), self)
        open_channel(questions.on_open, questions.on_closed)

    def on_question(self) -> None:
        """Note that a question is about to be written, behind all that waits already."""
        self._seen = self._traffic()
        self._arrives_at = self._seen.taken + self._seen.waiting

    def is_silent(self, reply: Future[None]) -> bool:
        """Whether the broker has let this very check go unanswered for too long.

        It has not as long as it says anything, or its host goes on taking what was written before
        the question: over a slow link that may be more than goes through in time.
        """
        if reply is not self._reply:
            return False
        before, self._seen = self._seen, self._traffic()
        on_its_way = before.taken < self._arrives_at and self._seen.taken > before.taken
        now = time.monotonic()
        if on_its_way or self._seen.received > before.received:
            self._since = now
        return now - self._since >= ANSWER_LIMIT

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
        self._health_probe.on_question()
        if not self._left:
            self._channel.close()
        elif self._left[0] == self._exchange:
            self._channel.exchange_declare(self._exchange, passive=True, callback=self._on_answer)
        else:
            self._channel.queue_declare(self._left[0], passive=True, callback=self._on_answer)
