"""A program that is interrupted 200 times at random moments of its publishing, and looks at itself.

Runs on: the main thread of a process of its own.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from collections import Counter
from types import FrameType
from typing import Any

from mlproducer import MLProducer, Receipt, Settings
from mlproducer.testing.fake_broker import (
    Behaviour,
    FakeBroker,
    FakeConnection,
    ReceivedMessage,
)
from tests.helpers import LIMIT, make_message

ROUNDS = 200
LONGEST = 0.004
"""Seconds within which the interrupt comes; a publish here takes about half of that."""


class Leisurely(Behaviour):
    """Confirms after a millisecond, so that interrupts meet publishers who wait as well."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Confirm later."""
        connection.later(0.001, connection.ack, channel, tag)


class Interrupt:
    """Raises KeyboardInterrupt in the main thread, once each time it is armed."""

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGALRM, self._on_alarm)

    def arm(self) -> None:
        """Let it come within the next milliseconds."""
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, LONGEST))

    def disarm(self) -> None:
        """Let it not come any more."""
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_alarm(self, _signal: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


def publish(producer: MLProducer, way: str, name: str) -> list[Any]:
    """Publish one message or five, and return the answers."""
    if way == "publish":
        return [producer.publish(make_message(name))]
    if way == "submit":
        return [producer.submit(make_message(name)).result(LIMIT)]
    return producer.publish_many([make_message(f"{name}-{each}") for each in range(5)])


def main(way: str, window: int) -> dict[str, Any]:
    """Publish and be interrupted, then say what is left."""
    with FakeBroker(Leisurely()) as broker:
        settings = Settings(url=broker.url, declare_topology="off", max_in_flight=window)
        producer = MLProducer(settings)
        assert producer.wait_connected(LIMIT)
        interrupt, interrupts, confirmed = Interrupt(), 0, 0
        for number in range(ROUNDS):
            try:
                interrupt.arm()
                answers = publish(producer, way, f"{number}")
                interrupt.disarm()
                confirmed += sum(isinstance(each, Receipt) and each.confirmed for each in answers)
            except KeyboardInterrupt:
                interrupts += 1
        interrupt.disarm()
        after = [producer.publish(make_message(f"after {each}")).confirmed for each in range(20)]
        left = producer.flush(LIMIT)
        copies = Counter(message.properties.message_id for message in broker.messages)
        return {
            "interrupts": interrupts,
            "confirmed": confirmed,
            "after": all(after),
            "left": left,
            "twice": [name for name, count in copies.items() if count > 1],
            "pending": producer.status().pending_confirms,
            "connections": broker.accepted,
            "abandoned": producer.close(1.0).abandoned,
        }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
