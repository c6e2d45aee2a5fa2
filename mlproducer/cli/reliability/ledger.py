"""What each call said of its message, held against what the broker's queues hold.

Runs on: publishing threads add, the main thread counts.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from attrs import asdict, define, field, frozen

from mlproducer import Message, MLProducer, Receipt
from mlproducer.errors import PublishError

Answer = Receipt | PublishError


@frozen
class Account:
    """The figures.

    :ivar taken_over: calls that returned: the message is the library's
    :ivar delivered: of these, found in their queue or, after the last retry, as a dead letter
    :ivar dead_lettered: of these, the dead letters
    :ivar given_back: calls that raised
    :ivar leaked: of these, raised as not sent, and found all the same
    :ivar duplicates: copies on top of each first one
    :ivar longest_publish: seconds
    """

    taken_over: int = 0
    delivered: int = 0
    dead_lettered: int = 0
    given_back: int = 0
    leaked: int = 0
    duplicates: int = 0
    longest_publish: float = 0.0

    @property
    def rate(self) -> float:
        """Delivered of what was taken over, from 0 to 1."""
        return self.delivered / self.taken_over if self.taken_over else 1.0

    @property
    def well(self) -> bool:
        """Nothing lost, and nothing sent that was said not to be."""
        return self.delivered == self.taken_over and self.leaked == 0

    def __add__(self, other: Account) -> Account:
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        sums["longest_publish"] = max(self.longest_publish, other.longest_publish)
        return Account(**sums)

    def __str__(self) -> str:
        return (
            f"{self.delivered} of {self.taken_over} delivered ({self.rate:.2%}), "
            f"{self.duplicates} twice, {self.given_back} given back"
        )

    def to_json(self) -> dict[str, Any]:
        """Give what programs read."""
        return {**asdict(self), "delivery_rate": self.rate}


@define
class Ledger:
    """The answers of one scenario's calls, by message id."""

    receipts: dict[str, Receipt] = field(factory=dict)
    errors: dict[str, PublishError] = field(factory=dict)
    durations: list[float] = field(factory=list)

    def publish(
        self,
        producer: MLProducer,
        message: Message,
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Answer:
        """Publish, and write down what the call said."""
        started = time.monotonic()
        try:
            answer: Answer = producer.publish(message, timeout=timeout, retry=retry)
        except PublishError as error:
            answer = error
        self.durations.append(time.monotonic() - started)
        return self.note(str(message.message_id), answer)

    def note(self, message_id: str, answer: Answer) -> Answer:
        """Write down an answer."""
        if isinstance(answer, Receipt):
            self.receipts[message_id] = answer
        else:
            self.errors[message_id] = answer
        return answer

    def check(self, found: Counter[str], buried: Counter[str]) -> Account:
        """Hold it against what lies in the queues, and among the dead letters."""
        copies = found + buried
        unsent = [key for key, error in self.errors.items() if not error.possibly_sent]
        return Account(
            taken_over=len(self.receipts),
            delivered=sum(key in copies for key in self.receipts),
            dead_lettered=len(buried.keys() & self.receipts.keys()),
            given_back=len(self.errors),
            leaked=sum(key in copies for key in unsent),
            duplicates=copies.total() - len(copies),
            longest_publish=max(self.durations, default=0.0),
        )
