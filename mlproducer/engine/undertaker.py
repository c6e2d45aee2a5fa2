"""Makes dead letters: who, why, after how many attempts, and since when.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from attrs import frozen

from mlproducer.core.delivery import Delivery
from mlproducer.errors import PublishError
from mlproducer.message import Envelope
from mlproducer.wire.dead_letter import dead_letter


@frozen
class Undertaker:
    """Addresses dead letters to one exchange.

    :ivar plain: gives a message the route that it has without a delay, to which it goes back
    """

    exchange: str
    plain: Callable[[Envelope], Envelope]

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Give a message the form in which it goes to the dead-letter exchange."""
        alive = self.plain(delivery.envelope)
        ago = timedelta(seconds=now - delivery.first_failed)
        headers: dict[str, str | int] = {
            "x-death-reason": f"{type(reason).__name__}: {reason}"[:255],
            "x-attempts": delivery.attempts,
            "x-original-exchange": alive.exchange,
            "x-original-routing-key": alive.routing_key,
            "x-first-failed-at": (datetime.now(timezone.utc) - ago).isoformat(),
        }
        return dead_letter(alive, self.exchange, headers)
