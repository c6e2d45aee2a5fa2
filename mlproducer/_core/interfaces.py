"""What the sender needs of the world, as protocols; who fulfils them does not concern it.

Runs on: the I/O thread.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from attrs import frozen

from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import RowState
from mlproducer._core.states import CircuitState
from mlproducer.errors import PublishError
from mlproducer.message import Envelope


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


class Carrier(Protocol):
    """A channel in confirm mode."""

    longest_properties: int
    """Bytes of an envelope's properties that fit the negotiated frame size."""

    def room(self) -> int:
        """Bytes that may be written before its buffer is too full."""

    def carry(self, batch: list[tuple[Envelope, int]]) -> Sequence[int] | None:
        """Write messages, each with its delivery tag.

        Given are the tags of those that went over another channel, which are settled singly.
        """


class RetryWorker(Protocol):
    """The retry worker, as the core sees it; `tests/pure/fakes.py` has another."""

    name: str
    """The store's path or host, for people."""

    durable: bool
    """Whether what is kept survives this process."""

    def defer(
        self, delivery: Delivery, now: float, *, before: RowState, fresh: bool = False
    ) -> bool:
        """Store it, or note in its row what came of the last attempt.

        The answer to the first comes back through `Sender.stored` or `Sender.not_stored`.

        :returns: whether it is stored already, and no answer comes

        :param before: where its row stood until now: whether there is one
        :param fresh: it has become a dead letter just now, and is due at once
        """

    def settle(self, delivery: Delivery) -> None:
        """Delete its row: it was confirmed, or given back."""

    def withdraw(self, delivery: Delivery) -> None:
        """Delete its row, and say so through `Sender.withdrawn`: it is to be given back."""


class Owner(Protocol):
    """A connection's I/O thread, as the retry worker sees it: where answers and due messages go."""

    def order(self, order: Callable[[], None]) -> bool:
        """Have something done on the I/O thread; false if that has ended."""

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages again."""

    def pass_on(self, deliveries: Sequence[Delivery], owner: Owner) -> None:
        """Have another connection send messages that belong to this one."""

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored, and may be sent for the first time."""

    def stored(self, deliveries: Sequence[Delivery]) -> None:
        """They are stored, and wait for a retry."""

    def not_stored(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """They could not be stored."""

    def withdrawn(self, deliveries: Sequence[Delivery], *, gone: bool) -> None:
        """Their rows are gone, or are another process's, which sends them."""

    def taken_over(self, deliveries: Sequence[Delivery]) -> None:
        """Another process has claimed their rows, and sends them."""

    def ended_elsewhere(self, deliveries: Sequence[Delivery], *, dead: bool) -> None:
        """Another process has delivered them, or dead-lettered them."""

    def vanished(self, deliveries: Sequence[Delivery]) -> None:
        """Their rows are gone from the store, and there is no copy of them."""

    def expire(self, delivery: Delivery) -> None:
        """A publisher's time is up."""

    def ready(self) -> int:
        """How many messages handed over now would be written: none, one as a probe, or many."""


class DeadLetterMaker(Protocol):
    """Makes dead letters; `tests/pure/fakes.py` has another."""

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Give a message the form in which it goes to the dead-letter exchange."""


class Window(Protocol):
    """The in-flight window, as the core sees it; `tests/pure/fakes.py` has another."""

    def leave(self, deliveries: Iterable[Delivery]) -> None:
        """Let the next ones in."""


class Events:
    """What happens to messages, as methods to override. None may block or raise."""

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """The broker has them; one call for all that one frame has settled."""

    def late_confirm(self, delivery: Delivery) -> None:
        """The broker has one whose publisher waits no longer; `confirmed` follows."""

    def resumed(self, delivery: Delivery) -> None:
        """One that was kept, or tried before, is about to be written."""

    def retried(self, delivery: Delivery) -> None:
        """It is written again."""

    def failed(self, delivery: Delivery, error: PublishError) -> None:
        """An attempt failed; what follows is `kept` or `given_back`."""

    def dead_lettered(self, delivery: Delivery) -> None:
        """The broker has its dead letter."""

    def deferred(self, delivery: Delivery) -> None:
        """The library goes on without the publisher."""

    def possible_duplicate(self, delivery: Delivery) -> None:
        """It is sent again although an earlier attempt may have reached a queue."""

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """The library does not own it."""

    def circuit_changed(self, state: CircuitState) -> None:
        """The breaker moved."""

    def stray_confirm(self, tag: int) -> None:
        """The broker settled a tag that was not open."""
