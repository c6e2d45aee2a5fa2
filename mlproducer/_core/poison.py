"""Which message closed the channel: it is found without failing the others.

A broker answers one bad message by closing the channel, under all that were in flight. They become
suspects and are sent again one at a time. The one that is alone on a channel when it closes is
rejected; those behind it, which the broker has never read, are free. So each is sent once more at
most.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections import deque

from mlproducer._core.delivery import Delivery

NO_PERMISSION = 403
NOT_FOUND = 404


class PoisonIsolation:
    """The suspects, in the order in which they are tried."""

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
