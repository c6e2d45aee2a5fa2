"""What the sender needs of the engine, as protocols: the core imports nothing of it.

Runs on: the I/O thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from attrs import frozen

from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import RowState
from mlproducer.errors import PublishError
from mlproducer.message import Envelope

NO_PERMISSION = 403
NOT_FOUND = 404
"""Reply codes with which a broker closes a channel."""


class LossKind(enum.Enum):
    """Why there is no connection, in a closed set of words."""

    UNRESOLVED = "dns"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    TLS = "tls"
    PROTOCOL = "protocol"
    AUTHENTICATION = "authentication"
    CREDENTIALS = "credentials"
    CLOSED_BY_BROKER = "closed_by_broker"
    HEARTBEAT = "heartbeat"
    LOST = "lost"
    CLOSED = "closed"


@frozen
class Loss:
    """Why a channel or connection ended, or never began.

    :ivar text: for people; free of secrets and control characters
    :ivar reply_code: the broker's AMQP reply code; 0 where it said nothing
    :ivar reply_text: the broker's words, likewise free of control characters
    :ivar address: ``host:port`` of the broker, where it is known
    """

    text: str
    reply_code: int = 0
    kind: LossKind = LossKind.LOST
    reply_text: str = ""
    address: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """What an error about the connection says in fields."""
        return {
            "kind": self.kind.value,
            "address": self.address,
            "reply_code": self.reply_code,
            "reply_text": self.reply_text,
        }


Confirm = tuple[int, bool]
"""A delivery tag, and whether it stands for those before it, too: ``multiple``."""


class Channel(Protocol):
    """A channel in confirm mode."""

    longest_properties: int
    """Bytes of an envelope's properties that fit the negotiated frame size."""

    def room(self) -> int:
        """Bytes that may be written before its buffer is too full."""

    def publish(self, batch: list[tuple[Envelope, int]]) -> Sequence[int] | None:
        """Write messages, each with its delivery tag.

        Given are the tags of those that went over another channel, which are settled singly.
        """


class RetryWorker(Protocol):
    """The retry worker, as the core sees it; `tests/pure/fakes.py` has another."""

    name: str
    """The store's path or host, for people."""

    durable: bool
    """Whether what is stored survives this process."""

    def defer(
        self, delivery: Delivery, now: float, *, before: RowState, fresh: bool = False
    ) -> bool:
        """Store it, or note in its row what came of the last attempt.

        The answer to the first comes back through `Sender.stored` or `Sender.not_stored`.

        :returns: whether it is stored already, and no answer comes

        :param before: where its row stood until now: whether there is one
        :param fresh: it has become a dead letter just now, and is due at once
        """

    def holds(self, delivery: Delivery) -> bool | None:
        """Whether its row is this process's; ``None`` where it has none, as far as is known."""

    def settle(self, delivery: Delivery) -> None:
        """Delete its row: it was confirmed, or failed."""

    def withdraw(self, delivery: Delivery, *, waited: bool) -> None:
        """Delete its row, and answer through `Sender.withdrawn`: its publisher gets an error.

        :param waited: the row counts among those that wait
        """


MakeDeadLetter = Callable[[Delivery, PublishError, float], Envelope]
"""Gives a message the form in which it goes to the dead-letter exchange."""

LeaveWindow = Callable[[Iterable[Delivery]], None]
"""Gives back the slots of the in-flight window, and lets the next messages in."""
