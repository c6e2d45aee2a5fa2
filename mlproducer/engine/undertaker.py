"""Makes dead letters: who, why, after how many attempts, and since when.

Runs on: the I/O thread.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from attrs import frozen

from mlproducer.core.delivery import Delivery
from mlproducer.errors import PublishError
from mlproducer.message import Envelope
from mlproducer.wire.dead_letter import dead_letter


@frozen
class Undertaker:
    """Addresses dead letters to one exchange."""

    exchange: str

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Give a message the form in which it goes to the dead-letter exchange."""
        ago = timedelta(seconds=now - delivery.first_failed)
        headers: dict[str, str | int] = {
            "x-death-reason": f"{type(reason).__name__}: {reason}"[:255],
            "x-attempts": delivery.attempts,
            "x-original-exchange": delivery.envelope.exchange,
            "x-original-routing-key": delivery.envelope.routing_key,
            "x-first-failed-at": (datetime.now(timezone.utc) - ago).isoformat(),
        }
        return dead_letter(delivery.envelope, self.exchange, headers)
