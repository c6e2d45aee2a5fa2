"""A broker with moods, and what tests of failure watch in a producer.

Runs on: the fake broker's thread, and the tests' threads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from pika import spec

from mlproducer import MLProducer
from mlproducer._core import events
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT

FAKE_BROKER = "mlproducer-fake-broker"
"""The name of a fake broker's thread."""

LETTERS = "bookmarkai.ml.dlx"


class Moody(Behaviour):
    """Treats each message as its mood says, and dead letters as their own mood says.

    :ivar heard: when each message came, in monotonic time, and the message
    :ivar asked: released for each health check's first question
    """

    def __init__(self, mood: str = "ack", letters: str = "ack") -> None:
        self.mood = mood
        self.letters = letters
        self.heard: list[tuple[float, ReceivedMessage]] = []
        self.asked = threading.Semaphore(0)

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Ack, nack, return, reset, close the channel, or keep silent."""
        self.heard.append((time.monotonic(), message))
        mood = self.letters if message.exchange == LETTERS else self.mood
        if mood == "ack":
            connection.ack(channel, tag)
        elif mood == "nack":
            connection.nack(channel, tag)
        elif mood == "return":
            connection.return_(channel, message)
            connection.ack(channel, tag)
        elif mood == "close":
            connection.close_channel(channel, 404, "NOT_FOUND - no exchange")
        elif mood == "reset":
            connection.reset()

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Count the health checks, and answer."""
        if isinstance(method, spec.Exchange.Declare) and method.passive:
            self.asked.release()
        super().on_method(connection, channel, method)

    def times(self, message_id: str) -> list[float]:
        """When a message came, each time."""
        return [at for at, each in self.heard if each.properties.message_id == message_id]

    def ids(self) -> list[str]:
        """The ids of all that came, in order."""
        return [each.properties.message_id for _, each in self.heard]


class Happenings:
    """Calls of some methods, by their names and arguments, in order, to look at and to wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: seen
        self.seen: list[Any] = []

    def note(self, what: Any) -> None:
        """Add one."""
        with self._changed:
            self.seen.append(what)
            self._changed.notify_all()

    def wait_for(self, *what: Any) -> None:
        """Wait until these have been seen, as the last of all."""
        self.wait_until(lambda: tuple(self.seen[-len(what) :]) == what)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds of what was seen."""
        with self._changed:
            assert self._changed.wait_for(holds, LIMIT), self.seen


def our_threads() -> set[threading.Thread]:
    """Return the library's threads that last, without the fake broker's.

    The thread that starts a producer is no such one: it may be alive for a moment after the first
    message is confirmed.
    """
    apart = {"mlproducer-start", FAKE_BROKER}
    every = [each for each in threading.enumerate() if each.name.startswith("mlproducer-")]
    return {each for each in every if each.name not in apart}


def gaps(times: list[float]) -> list[float]:
    """Seconds from each to the next."""
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def circuit_of(producer: MLProducer) -> Happenings:
    """Watch the breaker of a producer that has been started; each move is noted as its state."""
    return told(producer, events.CircuitChanged, lambda event: event.state)


def told(
    producer: MLProducer, kind: type[events.Event], note: Callable[[Any], object]
) -> Happenings:
    """Watch what the sinks of a producer are told: what ``note`` makes of the events of a kind."""
    seen = Happenings()
    fanout = io_of(producer)._emit.__self__
    fanout._takers[kind].append((lambda event: seen.note(note(event)), None))
    return seen


def events_of(producer: MLProducer, *names: str) -> Happenings:
    """Watch events of a producer, each noted as its name."""
    seen = Happenings()
    for name in names:
        producer.on(name, lambda event: seen.note(event.name))
    return seen


def io_of(producer: MLProducer) -> Any:
    """Return what the I/O thread of a producer owns."""
    engine: Any = producer._life.runtime.engines[0]
    return engine._io
