"""Makes dead letters: who, why, after how many attempts, and since when.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from attrs import define

from mlproducer._core.delivery import Delivery
from mlproducer._wire.amqp import LETTER_MAX
from mlproducer._wire.dead_letter import dead_letter
from mlproducer.errors import PublishError
from mlproducer.message import Envelope

REASON_MAX = 255
"""Bytes of the reason's text."""


@define
class DeadLetterMaker:
    """Addresses dead letters to one exchange.

    :ivar plain: gives a message the route that it has without a delay, to which it goes back
    :ivar longest: bytes of properties that the connection takes
    """

    exchange: str
    plain: Callable[[Envelope], Envelope]
    longest: int = LETTER_MAX

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Give a message the form in which it goes to the dead-letter exchange."""
        alive = self.plain(delivery.envelope)
        ago = timedelta(seconds=now - delivery.first_failed)
        why = f"{type(reason).__name__}: {reason}".encode(errors="replace")[:REASON_MAX]
        headers: dict[str, str | int] = {
            "x-original-exchange": alive.exchange,
            "x-original-routing-key": alive.routing_key,
            "x-attempts": delivery.attempts,
            "x-first-failed-at": (datetime.now(timezone.utc) - ago).isoformat(),
            "x-death-reason": why.decode(errors="ignore"),
        }
        return dead_letter(alive, self.exchange, headers, min(self.longest, LETTER_MAX))
