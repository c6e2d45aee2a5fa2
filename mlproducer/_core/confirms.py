"""Publisher confirms: which delivery tag stands for which delivery (RabbitMQ guide, *Confirms*).

Tags count from 1 on each channel, in the order of writing. A tag settles once; tags that are
unknown, settled or never given out settle nothing.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlproducer._core.delivery import Delivery


class Confirms:
    """The open tags of one channel, oldest first.

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
