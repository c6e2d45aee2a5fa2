"""The sender's world, written by hand: a channel, a retry worker, a door and a sink that only note.

Runs on: the test's thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve

from mlproducer._core import events
from mlproducer._core.breaker import Breaker, Consecutive
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import ROW_KNOWN, ROW_PENDING, AttemptState, RowState
from mlproducer._core.interfaces import Loss
from mlproducer._core.sender import Sender
from mlproducer.errors import PublishError
from mlproducer.message import Envelope, Receipt
from mlproducer.observe.sinks import Sink, Table
from tests.helpers import make_delivery

PLENTY = 1 << 20
COOLDOWN, PATIENCE = 30.0, 5.0


class FakeChannel:
    """A channel that notes what was written on it."""

    def __init__(self, room: int = PLENTY, longest_properties: int = PLENTY) -> None:
        self.room_left = room
        self.longest_properties = longest_properties
        self.written: list[tuple[str, int]] = []

    def room(self) -> int:
        """As set by the test."""
        return self.room_left

    def publish(self, batch: list[tuple[Envelope, int]]) -> None:
        """Note ids and tags."""
        self.written += [(envelope.message_id, tag) for envelope, tag in batch]


class FakeRetryWorker:
    """Notes what is kept and settled; storing succeeds when the test says so."""

    name = "fake"
    durable = False

    def __init__(self) -> None:
        self.rows: dict[Delivery, int] = {}
        self.settled: list[Delivery] = []
        self.withdrawn: list[Delivery] = []

    def defer(
        self, delivery: Delivery, now: float, *, before: RowState, fresh: bool = False
    ) -> bool:
        """Store it."""
        assert (before in ROW_KNOWN) == (delivery in self.rows)
        self.rows[delivery] = delivery.attempts
        return False

    def holds(self, delivery: Delivery) -> bool | None:
        """Whether there is one."""
        return delivery in self.rows or None

    def withdraw(self, delivery: Delivery, *, waited: bool) -> None:
        """Delete it, and note that it is to be given back."""
        self.withdrawn.append(delivery)
        self.rows.pop(delivery, None)

    def settle(self, delivery: Delivery) -> None:
        """Delete it."""
        self.settled.append(delivery)
        self.rows.pop(delivery, None)


def dead_letter(delivery: Delivery, _reason: PublishError, _now: float) -> Envelope:
    """Address a dead letter to the exchange ``dead``."""
    assert delivery.envelope.exchange != "dead", "a letter of a letter"
    return evolve(delivery.envelope, exchange="dead")


class FakeWindow:
    """Counts who has left, and how often."""

    def __init__(self) -> None:
        self.left: list[Delivery] = []

    def leave(self, deliveries: Iterable[Delivery]) -> None:
        """Note them."""
        self.left += deliveries


class Recorder(Sink):
    """Writes down the events about messages, with their ids."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.strays: list[int] = []

    def table(self) -> Table:
        """Note each, an attempt that failed by its error."""
        return {
            events.Confirmed: lambda event: [
                self._note("confirmed", each) for each in event.deliveries
            ],
            events.AttemptFailed: lambda event: self._note(
                type(event.error).__name__, event.delivery
            ),
            events.Deferred: lambda event: self._note("deferred", event.delivery),
            events.DeadLettered: lambda event: self._note("dead-lettered", event.delivery),
            events.LetterKept: lambda event: self._note("letter kept", event.delivery),
            events.PossibleDuplicate: lambda event: self._note(
                "possible duplicate", event.delivery
            ),
            events.Failed: lambda event: self._note("given back", event.delivery),
            events.UnknownTag: lambda event: self.strays.append(event.tag),
        }

    def _note(self, event: str, delivery: Delivery) -> None:
        self.log.append((event, delivery.envelope.message_id))


class World:
    """A sender among fakes, and what a publisher would do with it."""

    def __init__(self, *, max_retries: int = 1000, threshold: int = 1000) -> None:
        self.now = 0.0
        self.retry_worker, self.window, self.events = FakeRetryWorker(), FakeWindow(), Recorder()
        self.wakes: list[float] = []
        breaker = Breaker(
            Consecutive(threshold),
            COOLDOWN,
            PATIENCE,
            lambda state: self.events.take(events.CircuitChanged(state)),
            self.wakes.append,
        )
        self.sender = Sender(
            max_retries,
            breaker,
            self.retry_worker,
            dead_letter,
            self.window.leave,
            self.events.take,
        )
        self.channel = FakeChannel()

    def up(self, channel: FakeChannel | None = None) -> FakeChannel:
        """Open a channel."""
        self.channel = channel or FakeChannel()
        self.sender.up(self.channel)
        self.sender.pump(self.now)
        return self.channel

    def down(self, code: int = 0, text: str = "connection lost") -> None:
        """Lose the channel."""
        self.sender.down(Loss(text, code), self.now)

    def send(self, *names: str, retry: bool = True, exchange: str = "x") -> list[Delivery]:
        """Accept messages, and write what can be written."""
        deliveries = [make_delivery(name, retry=retry, exchange=exchange) for name in names]
        self.sender.accept(deliveries, self.now)
        self.sender.pump(self.now)
        return deliveries

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Confirm, then write on, as the I/O thread does."""
        self.sender.acked([(tag, multiple)], self.now)
        self.sender.pump(self.now)

    def nack(self, tag: int, *, multiple: bool = False) -> None:
        """Refuse."""
        self.sender.nacked([(tag, multiple)], self.now)
        self.sender.pump(self.now)

    def store(self, delivery: Delivery) -> None:
        """Have the retry worker report that it has stored the message, whose slot is free now."""
        if delivery.attempt is AttemptState.SCHEDULED and delivery.row in ROW_PENDING:
            self.window.leave([delivery])
        self.sender.stored([delivery], self.now)

    def retry(self, delivery: Delivery) -> None:
        """Have the retry worker send a stored message again."""
        assert delivery.attempt is AttemptState.SCHEDULED
        self.sender.readmit(delivery, self.now)
        self.sender.pump(self.now)


def receipt_of(delivery: Delivery) -> Receipt:
    """Return the receipt that the publisher got."""
    return delivery.waiter.result(0)


def error_of(delivery: Delivery) -> PublishError:
    """Return the error that the publisher got."""
    error = delivery.waiter.exception(0)
    assert isinstance(error, PublishError), error
    return error
