"""What waits for the connection, and what is on it.

Messages wait in one queue, suspects in another, which goes first and one at a time; what
is written has its tag open in the confirms. Whether anything may be written depends on the channel
and on the broker's flow.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import ACCEPTED, AttemptEvent
from mlproducer._core.interfaces import NO_PERMISSION, NOT_FOUND, Channel


class Confirms:
    """The open tags of one channel, oldest first (RabbitMQ guide, *Confirms*).

    Tags count from 1 on each channel, in the order of writing. A tag settles once; tags that are
    unknown, settled or never given out settle nothing.

    :ivar open: their deliveries
    """

    def __init__(self) -> None:
        self.open: dict[int, Delivery] = {}
        self._apart: set[int] = set()
        self._last = 0

    def __len__(self) -> int:
        return len(self.open)

    def __iter__(self) -> Iterator[Delivery]:
        return iter(list(self.open.values()))

    def register(self, delivery: Delivery) -> int:
        """Return the next tag; before the write, since the confirm can be there first."""
        self._last += 1
        self.open[self._last] = delivery
        return self._last

    def set_apart(self, tags: Iterable[int]) -> None:
        """Have tags settled singly: a confirm of several on this channel does not cover them."""
        self._apart.update(tags)

    def find(self, tag: int) -> Delivery | None:
        """Return the delivery whose tag is open."""
        return self.open.get(tag)

    def settle(self, tag: int, *, multiple: bool) -> list[Delivery]:
        """Close a tag, or with ``multiple`` all up to it (0: all), and return their deliveries."""
        if not multiple:
            delivery = self.open.pop(tag, None)
            self._apart.discard(tag)
            return [] if delivery is None else [delivery]
        if tag > self._last:
            return []  # an ack for what was never sent must not settle what was
        if self._apart:
            spoken_of = [each for each in self.open if each <= (tag or self._last)]
            return [self.open.pop(each) for each in spoken_of if each not in self._apart]
        if tag in (0, self._last):
            settled = list(self.open.values())
            self.open.clear()
            return settled
        tags = []
        for each in self.open:
            if each > tag:
                break
            tags.append(each)
        return [self.open.pop(each) for each in tags]

    def lose_all(self) -> list[Delivery]:
        """Forget all open tags, whose channel is gone, and return their deliveries in order."""
        lost = list(self.open.values())
        self.open.clear()
        self._apart.clear()
        self._last = 0
        return lost

    def oldest(self) -> Delivery | None:
        """Return the delivery that has waited longest."""
        return next(iter(self.open.values()), None)


class PoisonIsolation:
    """Finds the message that has closed the channel, without failing the others.

    A broker answers one bad message by closing the channel, under all that were in flight. They
    become suspects and are sent again one at a time. The one that is alone on a channel when it
    closes is rejected; those behind it, which the broker has never read, are free. So each is sent
    once more at most.

    :ivar suspects: in the order in which they are tried
    """

    def __init__(self) -> None:
        self.suspects: deque[Delivery] = deque()

    def __len__(self) -> int:
        return len(self.suspects)

    def isolate(self, lost: list[Delivery]) -> None:
        """Line suspects up in the order in which the broker has read them."""
        self.suspects.extendleft(reversed(lost))

    def reject(self, offender: Delivery, reply_code: int) -> list[Delivery]:
        """Return the offender, and those for whose route the same answer is certain."""
        shared = [each for each in self.suspects if _same_answer(reply_code, offender, each)]
        self.suspects = deque(each for each in self.suspects if each not in shared)
        return [offender, *shared]

    def release(self) -> list[Delivery]:
        """End the isolation, and return those that are still suspects."""
        freed = list(self.suspects)
        self.suspects.clear()
        return freed


def _same_answer(reply_code: int, offender: Delivery, other: Delivery) -> bool:
    one, two = offender.envelope, other.envelope
    if reply_code == NOT_FOUND:
        return one.exchange == two.exchange
    same_route = (one.exchange, one.routing_key) == (two.exchange, two.routing_key)
    return reply_code == NO_PERMISSION and same_route


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
