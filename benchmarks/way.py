"""The way of a message through the real classes, without threads, sockets or a broker.

Each step is one stage for a burst of messages, from making the tasks to handing their receipts to
their publishers. On the way of a success nothing is stored and nothing is buried, so that retry
worker and dead-letter maker are never asked to do anything.

Runs on: the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.contestants.work import TEXT
from mlproducer import Settings, SummarizationTask
from mlproducer._answers import Answer, finish
from mlproducer._core.breaker import Breaker, Consecutive
from mlproducer._core.delivery import Delivery
from mlproducer._core.sender import Sender
from mlproducer._engine.gate import Gate
from mlproducer._engine.io_loop import Mailbox
from mlproducer._synchronization import Relay
from mlproducer._wire.amqp import FRAME_MAX
from mlproducer._wire.encode import Encoder
from mlproducer._wire.frames import FrameWriter
from mlproducer.message import Envelope
from mlproducer.observe.sinks import Fanout

BURST = 32
"""Messages that one wake-up of the I/O thread finds in the mailbox."""


class _Idle:
    """A retry worker that keeps nothing, no dead letters, and an engine without waiters."""

    name = "memory"
    durable = False


_IDLE: Any = _Idle()
_RELAY = Relay(lambda: None)
_PLENTY = 1 << 20


class Way:
    """What a producer has inside, with this object in the place of the channel."""

    def __init__(self) -> None:
        settings = Settings(url="amqp://localhost/")
        self._encoder = Encoder(settings)
        self._gate = Gate(settings.max_in_flight)
        self._mailbox = Mailbox()
        self._frames = FrameWriter(1, FRAME_MAX)
        self.longest_properties = self._frames.longest_properties
        self._batch: list[tuple[Envelope, int]] = []
        self._tag = 0
        breaker = Breaker(Consecutive(10), 30.0, 5.0, lambda _state: None, lambda _when: None)
        self._sender = Sender(3, breaker, _IDLE, _IDLE, self._gate.leave, Fanout([]).emit)
        self._sender.up(self)

    def close(self) -> None:
        """Release the mailbox's descriptors."""
        self._mailbox.close()

    # --- the channel ---------------------------------------------------------------------------

    def room(self) -> int:
        """There is always room."""
        return _PLENTY

    def publish(self, batch: list[tuple[Envelope, int]]) -> None:
        """Leave the frames for a stage of their own."""
        self._batch = batch
        self._tag = batch[-1][1]

    # --- stages --------------------------------------------------------------------------------

    def steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Give the stages of one burst; each is to be called before the next is taken."""
        tasks: list[SummarizationTask] = []
        envelopes: list[Envelope] = []
        waits: list[tuple[Delivery, Answer]] = []
        yield "make the task", lambda: tasks.extend(_tasks())
        yield "encode it", lambda: envelopes.extend(map(self._encoder.encode, tasks))
        yield "delivery and answer", lambda: waits.extend(map(_wait, envelopes))
        yield "enter the gate", lambda: self._enter(waits)
        yield "mailbox, in and out", lambda: self._post(waits)
        yield "sender: accept, write", lambda: self._accept(waits)
        yield "frames", self._write
        yield "sender: confirm, leave", self._confirm
        yield "take the receipt", lambda: [finish(_IDLE, *wait) for wait in waits]

    def _enter(self, waits: list[tuple[Delivery, Answer]]) -> None:
        for delivery, _ in waits:
            self._gate.enter(delivery, delivery.deadline)

    def _post(self, waits: list[tuple[Delivery, Answer]]) -> None:
        for delivery, _ in waits:
            self._mailbox.put(delivery)
        for _ in self._mailbox.drain():
            pass

    def _accept(self, waits: list[tuple[Delivery, Answer]]) -> None:
        now = time.monotonic()
        self._sender.accept([delivery for delivery, _ in waits], now)
        self._sender.pump(now)

    def _write(self) -> None:
        self._frames.publish(self._batch)

    def _confirm(self) -> None:
        self._sender.acked([(self._tag, True)], time.monotonic())


def _tasks() -> list[SummarizationTask]:
    return [SummarizationTask(f"share-{number}", {"text": TEXT}) for number in range(BURST)]


def _wait(envelope: Envelope) -> tuple[Delivery, Answer]:
    now = time.monotonic()
    answer = Answer(_RELAY)
    return Delivery(envelope, answer, started=now, deadline=now + 5.0), answer
