"""What waits for the connection, and what is on it.

Messages wait in one queue, suspects in another, which goes first and one at a time; what
is written has its tag open in the confirms. Whether anything may be written depends on the channel
and on the broker's flow.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections import deque

from mlproducer._core.confirms import Confirms
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import ACCEPTED, AttemptEvent
from mlproducer._core.interfaces import Channel
from mlproducer._core.poison import PoisonIsolation


class SendQueue:
    """Deliveries between their acceptance and their confirm.

    :ivar backlog: those that wait, but for the suspects
    :ivar blocked: the broker has blocked publishers
    """

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.confirms = Confirms()
        self.poison = PoisonIsolation()
        self.backlog: deque[Delivery] = deque()
        self.blocked = False

    def add(self, delivery: Delivery) -> None:
        """Let a message wait for its turn."""
        delivery.attempt = ACCEPTED[delivery.attempt]
        self.backlog.append(delivery)

    def add_first(self, deliveries: list[Delivery]) -> None:
        """Let messages go before those that wait."""
        self.backlog.extendleft(reversed(deliveries))

    def withdraw(self, delivery: Delivery) -> None:
        """Take out a message that waits."""
        suspects = self.poison.suspects
        (suspects if delivery in suspects else self.backlog).remove(delivery)

    def next_suspect(self) -> Delivery | None:
        """Take out the suspect that is next, once nothing else is on the channel."""
        suspects = self.poison.suspects
        return suspects.popleft() if suspects and not self.confirms.open else None

    def lose_channel(self) -> list[Delivery]:
        """Forget the channel, and give what was in flight on it, in order."""
        self.channel = None
        lost = self.confirms.lose_all()
        for delivery in lost:
            delivery.step_attempt(AttemptEvent.LOST)
        return lost

    def clear(self) -> list[Delivery]:
        """Take out all that waits."""
        return [*self.poison.release(), *self.clear_backlog()]

    def clear_backlog(self) -> list[Delivery]:
        """Take out what waits, but for the suspects."""
        waiting = list(self.backlog)
        self.backlog.clear()
        return waiting
