"""The figures of a scenario, or of all: what calls answered, held against the broker's queues.

Runs on: the main thread.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from attrs import asdict, frozen

from mlproducer.testing.audit import Journal


@frozen
class Figures:
    """The figures.

    :ivar taken_over: calls that returned: the message is the library's
    :ivar delivered: of these, found in their queue or, after the last retry, as a dead letter
    :ivar dead_lettered: of these, the dead letters
    :ivar given_back: calls that raised
    :ivar leaked: of these, raised as not sent, and found
    :ivar duplicates: copies beyond the first one of each message
    :ivar longest_publish: seconds
    """

    taken_over: int = 0
    delivered: int = 0
    dead_lettered: int = 0
    given_back: int = 0
    leaked: int = 0
    duplicates: int = 0
    longest_publish: float = 0.0

    @classmethod
    def of(cls, journal: Journal, found: Counter[str], dead_letters: Counter[str]) -> Figures:
        """Hold a journal against what is in the queues and among the dead letters."""
        receipts = journal.receipts
        audit = journal.check(found + dead_letters)
        return cls(
            taken_over=len(receipts),
            delivered=len(receipts) - len(audit.lost),
            dead_lettered=sum(each.message_id in dead_letters for each in receipts),
            given_back=len(journal) - len(receipts),
            leaked=len(audit.leaked),
            duplicates=audit.duplicates,
            longest_publish=journal.longest,
        )

    @property
    def rate(self) -> float:
        """The share of taken messages that was delivered."""
        return self.delivered / self.taken_over if self.taken_over else 1.0

    @property
    def well(self) -> bool:
        """Whether nothing was lost, and nothing sent that was said not to be."""
        return self.delivered == self.taken_over and self.leaked == 0

    def __add__(self, other: Figures) -> Figures:
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        sums["longest_publish"] = max(self.longest_publish, other.longest_publish)
        return Figures(**sums)

    def __str__(self) -> str:
        return (
            f"{self.delivered} of {self.taken_over} delivered ({self.rate:.2%}), "
            f"{self.duplicates} twice, {self.given_back} given back"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**asdict(self), "delivery_rate": self.rate}
