"""A producer without its threads: the real courier, keeper, gate and store, on a test's clock.

The broker and the publishers are models, which know what has happened to each message, and check
every word that the library says against it. What its threads tell one another waits here in
queues, so that a test can interleave them as it likes. The numbers (I1, I2 ...) are those of the
invariants that the project holds to.

Runs on: the test's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial

from attrs import define, evolve, field, frozen

from mlproducer.core.backoff import Backoff
from mlproducer.core.breaker import Breaker
from mlproducer.core.courier import Courier
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Loss
from mlproducer.core.recovery import accuses
from mlproducer.core.states import CircuitState
from mlproducer.engine.gate import Gate
from mlproducer.engine.keeper import Keeper
from mlproducer.errors import PublishError, RetriesExhaustedError, StoreError
from mlproducer.message import Envelope
from mlproducer.observe.events import EventSink
from mlproducer.stores.memory import MemoryStore
from tests.helpers import make_delivery

BASE_DELAY, MAX_DELAY, COOLDOWN, SWEEP = 1.0, 10.0, 30.0, 1.0
PLENTY = 1 << 20
MANY = 1000
WINDOW_BYTES = 40
"""Bytes inside at once: six messages of the tests' size, fewer of the larger ones."""

WIDE = b"does not fit a narrow frame"


@frozen
class Setup:
    """The settings of one run."""

    max_retries: int = 3
    threshold: int = 4
    window: int = 8
    rows: int = 50
    durable: bool = False


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
        self._narrow = narrow
        self.last = 0
        self.open: dict[int, Record] = {}
        self.returned: set[int] = set()
        self.probes: set[int] = set()

    def room(self) -> int:
        """As much as the test gives."""
        return self._room

    def fits(self, envelope: Envelope) -> bool:
        """A narrow channel has no frame for wide messages."""
        return not (self._narrow and envelope.body == WIDE)

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

    def confirmed(self, delivery: Delivery) -> None:
        """The broker has said so, and nothing else was said before."""
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
        assert delivery in self._house.keeper._keys, "I20: deferred before it was stored"

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
        super().__init__(house.setup.threshold, COOLDOWN, self._moved)
        self._house = house
        self._before = CircuitState.CLOSED
        self._since = -math.inf
        self.in_row = 0

    def failed(self, delivery: Delivery, now: float) -> None:
        """Count it, too."""
        record = self._house.record(delivery)
        assert record.counted != record.writes, "an attempt is counted once"
        record.counted = record.writes
        self.in_row += 1
        super().failed(delivery, now)

    def succeeded(self, delivery: Delivery) -> None:
        """Start over, too."""
        self.in_row = 0
        super().succeeded(delivery)

    def _moved(self, state: CircuitState) -> None:
        before, self._before = self._before, state
        if before is CircuitState.CLOSED:
            assert (state, self.in_row) == (CircuitState.OPEN, self._house.setup.threshold)
        elif before is CircuitState.OPEN:
            assert state is CircuitState.HALF_OPEN
            assert self._house.new_link or self._house.clock.now >= self._since + COOLDOWN
            if self._house.channel is not None:
                self._house.channel.probes.clear()
        if state is CircuitState.OPEN:
            self._since = self._house.clock.now


class ModelStore(MemoryStore):
    """A memory store that fails when it is told to, and may pass for a durable one."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.rows)
        self.durable = setup.durable
        self.broken = False

    def put(self, envelope: Envelope, attempts: int, due: float | None) -> int:
        """Store a message, or not."""
        if self.broken:
            raise StoreError("locked", message_id=envelope.message_id, attempts=attempts)
        return super().put(envelope, attempts, due)


class ModelKeeper(Keeper):
    """Notes when a message may be sent again at the earliest, by the contract (I15)."""

    def __init__(self, house: House) -> None:
        super().__init__(house.store, house.gate, Backoff(BASE_DELAY, MAX_DELAY), SWEEP)
        self._house = house

    def keep(self, delivery: Delivery, now: float) -> None:
        """Store it, as soon as the thread gets to it."""
        record = self._house.record(delivery)
        assert not record.ends, "kept after its end"
        assert now == self._house.clock.now
        record.not_before = now + self._delay(delivery)
        super().keep(delivery, now)

    def _delay(self, delivery: Delivery) -> float:
        if delivery.place is Place.IN_FLIGHT:
            return math.inf
        if delivery.dead:
            return MAX_DELAY if delivery in self._dead else 0.0
        return min(BASE_DELAY * 2 ** (delivery.attempts - 1), MAX_DELAY) * (delivery.attempts > 0)


class House:
    """One producer, its broker and its publishers."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.setup = setup
        self.clock = clock
        self.records: dict[Delivery, Record] = {}
        self.by_id: dict[str, Record] = {}
        self.last_first = 0
        self.channel: Channel | None = None
        self.new_link = False
        self.blocked = False
        self.mailbox: deque[Delivery | Callable[[], None]] = deque()
        self.gate = Gate(setup.window, WINDOW_BYTES)
        self.store = ModelStore(setup)
        self.keeper = ModelKeeper(self)
        self.breaker = ModelBreaker(self)
        self.courier = Courier(
            setup.max_retries, self.breaker, self.keeper, self, self.gate, Sink(self)
        )
        self.keeper.serve(self, lambda: None)  # type: ignore[arg-type]

    def record(self, delivery: Delivery) -> Record:
        """Give what is known of a message."""
        return self.records[delivery]

    # --- the undertaker ---

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Make a letter, once, and only of what has used up its retries or is hopeless (I14)."""
        assert delivery.envelope.exchange != "dead", "I22: a letter of a letter"
        assert delivery.place is not Place.IN_FLIGHT, "buried while its tag is open"
        assert delivery.attempts > self.setup.max_retries or reason.permanent, "I14"
        assert not isinstance(reason, RetriesExhaustedError)
        return evolve(delivery.envelope, exchange="dead")

    # --- the desk ---

    def order(self, method: partial[None]) -> None:
        """Have something done by the I/O thread."""
        self.mailbox.append(method)

    def ready(self) -> int:
        """As the I/O thread says it."""
        if not self.courier.able:
            return 0
        return MANY if self.breaker.state is CircuitState.CLOSED else 1

    def readmit(self, delivery: Delivery) -> None:
        """Send again what was stored, and not before its time."""
        assert delivery.place is Place.STORED
        assert self.clock.now >= self.record(delivery).not_before, "I15: early"
        assert delivery in self.gate._inside, "I6: inside without a slot"
        self.courier.readmit(delivery, self.clock.now)

    def kept(self, delivery: Delivery, *, durable: bool) -> None:
        """Pass it on."""
        self.courier.kept(delivery, self.clock.now, durable=durable)

    def not_kept(self, delivery: Delivery, error: PublishError) -> None:
        """Pass it on."""
        self.courier.not_kept(delivery, error)

    # --- publishers ---

    def publish(self, *, exchange: str, retry: bool, waits: bool, body: bytes) -> Delivery | None:
        """Hand a message in, as `MLProducer` does; nothing is made where the breaker refuses."""
        if self.breaker.refuses() and not (self.store.durable and retry):
            return None
        delivery = make_delivery(
            exchange=exchange,
            body=body,
            started=self.clock.now,
            retry=retry,
            answer_deferral=waits,
        )
        record = Record(delivery, len(self.records) + 1)
        self.records[delivery] = self.by_id[delivery.envelope.message_id] = record
        if self.gate.try_enter(delivery):
            self.mailbox.append(delivery)
        elif waits:
            self.mailbox.append(partial(self._turn_away, delivery))
        else:
            self.withdraw(delivery)
        return delivery

    def withdraw(self, delivery: Delivery) -> None:
        """Take a message back, as an interrupted publisher does."""
        delivery.retry = False
        if delivery.answer.cancel():
            self.record(delivery).ends.append("withdrawn")
            self.gate.leave((delivery,))

    def expire(self, delivery: Delivery) -> None:
        """Say that a publisher's time is up."""
        self.mailbox.append(partial(self._expire, delivery))

    def _expire(self, delivery: Delivery) -> None:
        self.courier.expire(delivery, self.clock.now)
        assert delivery.answer.done() or not delivery.answer_deferral or delivery.kept, "I4, I5"

    def _turn_away(self, delivery: Delivery) -> None:
        self.courier.turn_away(delivery, self.clock.now)

    # --- the threads ---

    def drain(self, limit: int) -> None:
        """Let the I/O thread see what others have handed in."""
        for _ in range(min(limit, len(self.mailbox))):
            item = self.mailbox.popleft()
            if isinstance(item, Delivery):
                self.courier.accept(item, self.clock.now)
            else:
                item()
        self.pump()

    def pump(self) -> None:
        """Let it write."""
        self.courier.pump(self.clock.now)

    def keep_house(self) -> None:
        """Let the retry thread carry out one order, or sweep where that is due."""
        orders, due = self.keeper.thread._orders, self.keeper.thread.due
        if not orders.empty():
            orders.get(timeout=0)()
        elif due is not None and due <= self.clock.now:
            self.keeper.sweep()

    # --- the broker ---

    def settle(self, tag: int, *, multiple: bool, good: bool) -> None:
        """Ack or nack."""
        if self.channel is None:
            return
        failed = []
        for record, returned in self.channel.settle(tag, multiple=multiple):
            record.hits += 1
            if good and not returned:
                record.acked = True
            elif not returned:
                record.hidden = True
                failed.append(record)
        judge = self.courier.acked if good else self.courier.nacked
        judge(tag, self.clock.now, multiple=multiple)
        self._check_counted(failed)
        self.pump()

    def block(self, *, blocked: bool) -> None:
        """Let the alarm come or go."""
        self.blocked = blocked
        self.courier.block(blocked=blocked)
        if not blocked:
            self.pump()
            self.keeper.sweep_soon()

    def up(self, room: int = PLENTY, *, narrow: bool = False, first: bool = True) -> None:
        """Open a channel; the first of a connection ends a cooldown."""
        self.channel = Channel(self, room, narrow=narrow)
        self.courier.up(self.channel)
        if first:
            self.new_link = True
            self.breaker.reconnected()
            self.new_link = False
        self.pump()
        self.keeper.sweep_soon()

    def down(self, code: int) -> None:
        """Lose the channel; telling it twice changes nothing."""
        if self.channel is None:
            return
        alone = accuses(code) and len(self.channel.open) == 1
        failed = []
        for tag, record in self.channel.open.items():
            record.hits += 1
            if tag not in self.channel.returned and not alone:
                record.hidden = True
                failed.append(record)
        self.channel = None
        for _ in range(2):
            self.courier.down(Loss("gone", code), self.clock.now)
        if not accuses(code):
            self._check_counted(failed)

    def lose_connection(self, code: int) -> None:
        """Lose the channel, and the broker's Blocked with it."""
        self.down(code)
        self.blocked = False
        self.courier.disconnected()

    def cool(self) -> None:
        """Let the breaker thread look at the clock."""
        self.breaker.cool(self.clock.now)
        self.pump()
        self.keeper.sweep_soon()

    def _check_counted(self, failed: list[Record]) -> None:
        for record in failed:
            assert record.counted == record.writes, "I17: a failure was not counted"
