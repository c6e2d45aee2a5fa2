"""What the model test sees: a broker's channel, a store, a breaker, and all that they were told.

They know what has happened to each message, and check every word that the library says against it.
The numbers (I1, I2 ...) are those of the invariants that the project holds to.

Runs on: the test's thread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from mlproducer.core.backoff import Backoff
from mlproducer.core.breaker import Breaker, Consecutive
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.states import CircuitState
from mlproducer.engine.keeper import Keeper
from mlproducer.errors import PublishError, StoreError
from mlproducer.message import Envelope
from mlproducer.observe.events import EventSink
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Claim, Entry

if TYPE_CHECKING:
    from tests.pure.model import House

BASE_DELAY, MAX_DELAY, COOLDOWN, PATIENCE, SWEEP = 1.0, 10.0, 30.0, 5.0, 1.0
PLENTY = 1 << 20

WIDE = b"properties that do not fit a narrow frame"


@frozen
class Setup:
    """The settings of one run."""

    max_retries: int = 3
    threshold: int = 4
    window: int = 8
    rows: int = 50
    durable: bool = False
    ahead: bool = False


class Clock:
    """Stands in for the module ``time`` where the library reads the clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The test's time."""
        return self.now


@define(eq=False)
class Record:
    """What has happened to one message."""

    delivery: Delivery
    serial: int
    sends: int = 0
    letters: int = 0
    hits: int = 0
    acked: bool = False
    hidden: bool = False  # written, its fate unknown: a queue may hold it
    counted: int = -1  # the write whose failure the breaker has counted last
    not_before: float = 0.0
    ends: list[str] = field(factory=list)
    answer: object = None

    @property
    def writes(self) -> int:
        """How often it was on the wire, as itself or as a dead letter."""
        return self.sends + self.letters


class Channel:
    """The broker's side of one channel."""

    def __init__(self, house: House, room: int, *, narrow: bool) -> None:
        self._house = house
        self._room = room
        self.longest_properties = len(WIDE) - 1 if narrow else PLENTY
        self.last = 0
        self.open: dict[int, Record] = {}
        self.returned: set[int] = set()
        self.probes: set[int] = set()

    def room(self) -> int:
        """As much as the test gives."""
        return self._room

    def carry(self, batch: list[tuple[Envelope, int]]) -> None:
        """Check each message on the wire."""
        state = self._house.breaker.state
        assert not self._house.blocked, "I19: written while the broker blocks"
        assert state is not CircuitState.OPEN, "I17: written while the breaker is open"
        if state is CircuitState.HALF_OPEN:
            assert len(batch) == 1, "I17: one probe"
            assert not self.probes & self.open.keys(), "I17: one probe at a time"
            self.probes.add(batch[0][1])
        for envelope, tag in batch:
            self._write(self._house.by_id[envelope.message_id], envelope, tag)

    def _write(self, record: Record, envelope: Envelope, tag: int) -> None:
        delivery = record.delivery
        self.last += 1
        assert tag == self.last, "I7: tags count from 1 in the order of writing"
        assert record not in self.open.values(), "I11: twice at once on one channel"
        assert not record.ends, "I2, I4: sent after its end"
        if not (record.sends or delivery.kept):
            assert record.serial > self._house.last_first, "I24: first attempts in order"
            self._house.last_first = record.serial
        self.open[tag] = record
        assert (envelope.exchange == "dead") == delivery.dead, "I22: a letter, or a message"
        if delivery.dead:
            record.letters += 1
        else:
            record.sends += 1

    def settle(self, tag: int, *, multiple: bool) -> list[tuple[Record, bool]]:
        """Give who is settled by a tag, and whether it had been returned."""
        if tag > self.last:
            return []
        tags = [t for t in self.open if t == tag or (multiple and (t < tag or tag == 0))]
        return [(self.open.pop(each), each in self.returned) for each in tags]


class Sink(EventSink):
    """Hears what the courier says of each message's end."""

    def __init__(self, house: House) -> None:
        self._house = house

    def confirmed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """The broker has said so, and nothing else was said before."""
        for delivery in deliveries:
            assert self._house.record(delivery).acked, "I3: confirmed without an ack, or returned"
            self._end(delivery, "confirmed")

    def dead_lettered(self, delivery: Delivery) -> None:
        """Only a letter that is ours, and that the broker has."""
        record = self._house.record(delivery)
        assert delivery.kept, "only what is ours is buried"
        assert record.letters, "I22: dead-lettered without a letter"
        assert record.acked, "I22: dead-lettered without an ack, or returned"
        self._end(delivery, "dead-lettered")

    def deferred(self, delivery: Delivery) -> None:
        """Only what the store holds."""
        assert self._house.keeper.shelf.claim_of(delivery), "I20: deferred before it was stored"

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """What is said of it is true."""
        record = self._house.record(delivery)
        assert error.message_id == delivery.envelope.message_id
        assert error.attempts == record.sends, "I14: attempts are writes"
        assert error.possibly_sent or not record.hidden, "I13: it may be there"
        assert record.writes or not error.possibly_sent, "I13: it was never written"
        self._end(delivery, "given back")

    def _end(self, delivery: Delivery, end: str) -> None:
        ends = self._house.record(delivery).ends
        assert not ends, f"I4: {end} after {ends}"
        ends.append(end)


class ModelBreaker(Breaker):
    """Checks that each attempt is counted once, and that it moves along its edges (I17)."""

    def __init__(self, house: House) -> None:
        super().__init__(
            Consecutive(house.setup.threshold), COOLDOWN, PATIENCE, self._moved, lambda _when: None
        )
        self._house = house
        self._before = CircuitState.CLOSED
        self._since = -math.inf
        self.in_row = 0

    def failed(self, delivery: Delivery | None, now: float) -> None:
        """Count it, too."""
        if delivery is not None:
            record = self._house.record(delivery)
            assert record.counted != record.writes, "an attempt is counted once"
            record.counted = record.writes
        self.in_row += 1
        super().failed(delivery, now)

    def succeeded(self, deliveries: Collection[Delivery], now: float) -> None:
        """Start over, too."""
        self.in_row = 0
        super().succeeded(deliveries, now)
        assert self.state is CircuitState.CLOSED, "I17: a confirm closes it"

    def _moved(self, state: CircuitState) -> None:
        before, self._before = self._before, state
        if before is CircuitState.CLOSED:
            assert (state, self.in_row) == (CircuitState.OPEN, self._house.setup.threshold)
        elif before is CircuitState.OPEN:
            if state is CircuitState.CLOSED:
                assert not self.in_row, "I17: closed without a confirm"
                return
            assert self._house.new_link or self._house.clock.now >= self._since + COOLDOWN
            if self._house.channel is not None:
                self._house.channel.probes.clear()
        if state is CircuitState.OPEN:
            self._since = self._house.clock.now


class ModelStore(MemoryStore):
    """A memory store that fails when it is told to, and may pass for a durable one."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        super().__init__(setup.rows, clock=clock.monotonic)
        self.durable = setup.durable
        self.write_ahead = setup.durable and setup.ahead
        self.broken = False

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, or not."""
        if self.broken:
            raise StoreError("locked")
        return super().put(entries, patience)


class ModelKeeper(Keeper):
    """Notes when a message may be sent again at the earliest, by the contract (I15)."""

    def __init__(self, house: House) -> None:
        backoff = Backoff(BASE_DELAY, MAX_DELAY)
        super().__init__(house.store, house.gate, backoff, SWEEP, Sink(house))
        self._house = house

    def keep(self, delivery: Delivery, now: float, *, known: bool) -> None:
        """Store it, as soon as the thread gets to it."""
        record = self._house.record(delivery)
        assert not record.ends, "kept after its end"
        assert now == self._house.clock.now
        record.not_before = now + self._earliest(delivery)
        super().keep(delivery, now, known=known)

    def _earliest(self, delivery: Delivery) -> float:
        if delivery.place is Place.IN_FLIGHT:
            return math.inf
        if delivery.dead:
            return MAX_DELAY if delivery.buried else 0.0
        if delivery.attempts == 0:
            return 0.0
        return float(min(BASE_DELAY * 2.0 ** (delivery.attempts - 1), MAX_DELAY))
