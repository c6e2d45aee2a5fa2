"""What the model test sees: a broker's channel, a store, a breaker, and all that they were told.

They know what has happened to each message, and check every word that the library says against it.
The numbers (I1, I2 ...) are those of the invariants that the project holds to.

Runs on: the test's thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import define, evolve, field, frozen

from mlproducer._answers import Answer
from mlproducer._core import events
from mlproducer._core.backoff import Backoff
from mlproducer._core.breaker import Breaker, Consecutive
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import RowState
from mlproducer._core.states import CircuitState
from mlproducer._engine.retry_worker import RetryWorker
from mlproducer._synchronization import Relay
from mlproducer.errors import BrokerRejectedError, PublishError, StoreError
from mlproducer.message import Envelope, Receipt
from mlproducer.observe.sinks import Sink, Table
from mlproducer.stores.memory import MemoryStore, _Slot
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Row, RowFate

if TYPE_CHECKING:
    from tests.pure.model import ModelProducer

BASE_DELAY, MAX_DELAY, COOLDOWN, PATIENCE, SWEEP, LEASE = 1.0, 10.0, 30.0, 5.0, 1.0, 20.0
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
    puts: int = 0  # the store never answers the one with this number; 0: it answers all


class NoAnswerError(BaseException):
    """Stands for a call that never comes back.

    :ivar keys: rows that it has written
    """

    def __init__(self, keys: list[int]) -> None:
        super().__init__()
        self.keys = keys


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
    retry: bool = True
    content: tuple[bytes, bytes] = field()
    sends: int = 0
    letters: int = 0
    hits: int = 0
    acked: bool = False
    hidden: bool = False  # written, or taken over, its fate unknown: a queue may hold it
    suspected: bool = False  # the same, unless it turns out that it was this one that was rejected
    summoned: int = 0  # how often it was in flight on a channel that was closed over a message
    lapsed: bool = False  # its lease was over: another process may have written it
    counted: int = -1  # the write whose failure the breaker has counted last
    not_before: float = 0.0
    ends: list[str] = field(factory=list)
    answer: object = None
    asked: bool = False  # its publisher's time is up, and the I/O thread has been asked
    told: PublishError | Receipt | None = None  # what a call has raised or returned on its own
    elsewhere: str = ""  # how it ended in another process
    shared: bool = False  # another process has had its row for a while
    stolen: bool = False  # the store has lost its row
    robbed: bool = False  # the same, and this process has no copy
    unsaid: bool = False  # the store has a row of it of which it will never tell

    @content.default
    def _content(self) -> tuple[bytes, bytes]:
        return self.delivery.envelope.properties, self.delivery.envelope.body

    @property
    def writes(self) -> int:
        """How often it was on the wire, as itself or as a dead letter."""
        return self.sends + self.letters


class Handed(Answer):
    """What a publisher waits for, which a test can look at as at a future."""

    def __init__(self) -> None:
        super().__init__(Relay(lambda: None))

    def done(self) -> bool:
        """Whether the sender has spoken."""
        return self.given is not None

    def cancelled(self) -> bool:
        """What was withdrawn has no answer."""
        return False

    def exception(self, timeout: float) -> PublishError | None:
        """Return the error, if it is one."""
        return self.given if isinstance(self.given, PublishError) else None

    def result(self, timeout: float) -> Receipt:
        """Return the receipt."""
        assert isinstance(self.given, Receipt)
        return self.given


class Channel:
    """The broker's side of one channel."""

    def __init__(self, producer: ModelProducer, room: int, *, narrow: bool) -> None:
        self._producer = producer
        self._room = room
        self.longest_properties = len(WIDE) - 1 if narrow else PLENTY
        self.last = 0
        self.open: dict[int, Record] = {}
        self.returned: set[int] = set()
        self.probes: set[int] = set()

    def room(self) -> int:
        """As much as the test gives."""
        return self._room

    def publish(self, batch: list[tuple[Envelope, int]]) -> None:
        """Check each message on the wire."""
        state = self._producer.breaker.state
        assert not self._producer.blocked, "I19: written while the broker blocks"
        assert state is not CircuitState.OPEN, "I17: written while the breaker is open"
        if state is CircuitState.HALF_OPEN:
            assert len(batch) == 1, "I17: one probe"
            assert not self.probes & self.open.keys(), "I17: one probe at a time"
            self.probes.add(batch[0][1])
        for envelope, tag in batch:
            self._write(self._producer.by_id[envelope.message_id], envelope, tag)

    def _write(self, record: Record, envelope: Envelope, tag: int) -> None:
        delivery = record.delivery
        self.last += 1
        assert tag == self.last, "I7: tags count from 1 in the order of writing"
        assert record not in self.open.values(), "I11: twice at once on one channel"
        assert not record.ends, f"I2, I4: sent after its end {record.ends}"
        assert not isinstance(record.told, PublishError), "I2: sent after the call has raised"
        if not (record.sends or delivery.in_store):
            assert record.serial > self._producer.last_first, "I24: first attempts in order"
            self._producer.last_first = record.serial
        self.open[tag] = record
        assert (envelope.exchange == "dead") == delivery.dead, "I22: a letter, or a message"
        content = envelope.properties, envelope.body
        assert content == record.content, "I31: it is written as it was published"
        if delivery.dead:
            record.letters += 1
        else:
            record.sends += 1
            more = delivery.unrouted + record.summoned
            allowed = 1 + self._producer.setup.max_retries + more
            assert record.sends <= allowed, "I14: one attempt too many"

    def settle(self, tag: int, *, multiple: bool) -> list[tuple[Record, bool]]:
        """Return who is settled by a tag, and whether it had been returned."""
        if tag > self.last:
            return []
        tags = [t for t in self.open if t == tag or (multiple and (t < tag or tag == 0))]
        return [(self.open.pop(each), each in self.returned) for each in tags]


class Listener(Sink):
    """Hears what the sender says of each message's end."""

    def __init__(self, producer: ModelProducer) -> None:
        self._producer = producer

    def table(self) -> Table:
        """Return what checks what is said."""
        return {
            events.Confirmed: self.confirmed,
            events.DeadLettered: lambda event: self.dead_lettered(event.delivery),
            events.Deferred: lambda event: self.deferred(event.delivery),
            events.Failed: lambda event: self.given_back(event.delivery, event.error),
        }

    def confirmed(self, event: events.Confirmed) -> None:
        """The broker has said so, and nothing else was said before."""
        for delivery in event.deliveries:
            assert self._producer.record(delivery).acked, (
                "I3: confirmed without an ack, or returned"
            )
            self._end(delivery, "confirmed")

    def dead_lettered(self, delivery: Delivery) -> None:
        """Only a letter that is ours, and that the broker has."""
        record = self._producer.record(delivery)
        assert delivery.row in (RowState.HELD, RowState.DELETING), "only what is ours is buried"
        assert record.letters, "I22: dead-lettered without a letter"
        assert record.acked, "I22: dead-lettered without an ack, or returned"
        self._end(delivery, "dead-lettered")

    def deferred(self, delivery: Delivery) -> None:
        """Only what the store holds, and what its publisher did not want back."""
        record = self._producer.record(delivery)
        stored = self._producer.retry_worker.stored_rows.claim_of(delivery) or record.stolen
        assert stored, "I20: deferred before it was stored"
        lost_row = self._producer.retry_worker.stored_rows.lost_rows.get(delivery)
        known = lost_row is None or lost_row.told or record.elsewhere
        assert known, "I20: deferred while it is not known where its row is"
        assert record.retry, "I2: retry=False, and deferred"
        assert not isinstance(record.told, PublishError), "I4: deferred after the call has raised"

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """What is said of it is true."""
        record = self._producer.record(delivery)
        assert error.message_id == delivery.envelope.message_id
        assert error.attempts == record.sends, "I14: attempts are writes"
        rejected = isinstance(error, BrokerRejectedError)
        hidden = record.hidden or (record.suspected and not rejected)
        assert error.possibly_sent or not hidden, "I13: it may be there"
        written = record.writes or record.lapsed or record.robbed
        assert written or not error.possibly_sent, "I13: it was never written"
        said = record.told or record.answer
        if isinstance(said, Receipt) and not record.robbed:
            assert self._producer.closing, "I2: the call has returned, and it is dropped"
            assert record.stolen or not said.durable, "I20: durable, and given back"
        lost_row = self._producer.retry_worker.stored_rows.lost_rows.get(delivery)
        if isinstance(error, StoreError) and lost_row is not None and lost_row.told:
            wanted = record.retry and delivery.retry and not self._producer.closing
            assert not wanted, "I2: given back, and another process has it"
        self._end(delivery, "given back")

    def _end(self, delivery: Delivery, end: str) -> None:
        ends = self._producer.record(delivery).ends
        assert not ends, f"I4: {end} after {ends}"
        ends.append(end)


class ModelBreaker(Breaker):
    """Checks that each attempt is counted once, and that it moves along its edges (I17)."""

    def __init__(self, producer: ModelProducer) -> None:
        super().__init__(
            Consecutive(producer.setup.threshold),
            COOLDOWN,
            PATIENCE,
            self._moved,
            lambda _when: None,
        )
        self._producer = producer
        self._before = CircuitState.CLOSED
        self._since = -math.inf
        self.in_row = 0

    def failed(self, delivery: Delivery | None, now: float) -> None:
        """Count it, too."""
        if delivery is not None:
            record = self._producer.record(delivery)
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
            assert (state, self.in_row) == (CircuitState.OPEN, self._producer.setup.threshold)
        elif before is CircuitState.OPEN:
            if state is CircuitState.CLOSED:
                assert not self.in_row, "I17: closed without a confirm"
                return
            assert (
                self._producer.new_connection or self._producer.clock.now >= self._since + COOLDOWN
            )
            if self._producer.channel is not None:
                self._producer.channel.probes.clear()
        if state is CircuitState.OPEN:
            self._since = self._producer.clock.now


class ModelStore(MemoryStore):
    """A memory store that fails when it is told to, and may pass for a durable one.

    :ivar broken: nothing can be stored
    :ivar stumbles: calls that fail, once each; a put may do so after it has stored everything
    :ivar meanwhile: what others do while a put is under way, before or after it is committed, and
        while rows are claimed
    :ivar puts_left: after so many puts it never answers again
    """

    def __init__(self, setup: Setup, clock: Clock) -> None:
        super().__init__(setup.rows, clock=clock.monotonic)
        self.durable = setup.durable
        self.write_ahead = setup.durable and setup.ahead
        self.lease = LEASE if setup.durable else math.inf
        self.broken = False
        self.stumbles: set[str] = set()
        self.meanwhile: dict[str, list[Callable[[], None]]] = {}
        self.fates: dict[int, str] = {}
        self.puts_left = setup.puts or PLENTY
        self._unanswered: list[Claim] = []
        self._leases: dict[int, float] = {}

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store messages, or not."""
        self._undo()
        if self.broken:
            raise StoreError("locked")
        new = list(entries)
        if new:
            self._pass("before")
        self._may_stumble("put")
        if self.broken:
            raise StoreError("locked")
        claims = super().put(new, patience)
        self._lease(claims)
        if new:
            self._pass("after")
            self.puts_left -= 1
        if not self.puts_left:
            raise NoAnswerError([claim.key for claim in claims])
        if claims and "put's answer" in self.stumbles:
            self._unanswered += claims
            self._may_stumble("put's answer")
        return claims

    def release(self, changes: Sequence[Change]) -> list[Claim]:
        """Note what became of rows, or fail."""
        self._undo()
        self._may_stumble("release")
        return super().release(changes)

    def renew(self, claims: Sequence[Claim]) -> list[Claim]:
        """Renew leases, or fail."""
        self._undo()
        self._may_stumble("renew")
        lost = super().renew(claims)
        self._lease(claim for claim in claims if claim not in lost)
        return lost

    def done(self, claims: Sequence[Claim]) -> None:
        """Delete rows, or fail."""
        self._undo()
        self._may_stumble("done")
        super().done(claims)

    def claim(self, limit: int) -> list[Row]:
        """Claim what is due, or fail."""
        self._undo()
        self._may_stumble("claim")
        rows = super().claim(limit)
        self._lease(row.claim for row in rows)
        if rows:
            self._pass("claimed")
        return rows

    def reclaim(self, held: Container[Claim], known: Container[int]) -> None:
        """Reclaim nothing from a durable store, whose rows may be another process's."""
        if not self.durable:
            super().reclaim(held, known)

    def depth(self) -> Depth:
        """Count the rows, or fail."""
        self._may_stumble("depth")
        return super().depth()

    def trace(self, claims: Sequence[Claim]) -> list[RowFate]:
        """Say what became of rows, or fail."""
        self._undo()
        self._may_stumble("trace")
        fates = {"delivers": RowFate.CONFIRMED, "buries": RowFate.DEAD_LETTERED}
        told = super().trace(claims)
        return [
            fates.get(self.fates.get(claim.key, ""), fate)
            for claim, fate in zip(claims, told, strict=True)
        ]

    def slots(self) -> dict[int, _Slot]:
        """Return the rows that are there to stay: not what was stored without an answer."""
        undone = {claim.key for claim in self._unanswered}
        return {key: slot for key, slot in self._slots.items() if key not in undone}

    def lapsed(self) -> list[int]:
        """Return the keys of claimed rows whose lease is over."""
        return [
            key
            for key, slot in self._slots.items()
            if slot.due is None and self._clock() - self._leases[key] > self.lease
        ]

    def remove(self, key: int) -> None:
        """Lose a row, as a store does that starts over empty."""
        self._count(self._slots.pop(key), -1)

    def due(self) -> list[int]:
        """Return the keys of rows that anyone may claim."""
        now = self._clock()
        return [k for k, slot in self._slots.items() if slot.due is not None and slot.due <= now]

    def take_over(self, key: int) -> None:
        """Let another process claim a row."""
        slot = self._slots[key]
        slot.token += 1
        slot.due = None
        self._leases[key] = math.inf

    def end(self, key: int, what: str) -> None:
        """Let the other process deliver or bury a message."""
        self.fates[key] = what
        self.remove(key)

    def give_up(self, key: int) -> None:
        """Let the other process die."""
        slot = self._slots[key]
        self._count(slot, -1)
        slot.due, slot.record, slot.ahead = self._clock(), evolve(slot.record, doubtful=True), False
        self._count(slot, 1)

    def _lease(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            self._leases[claim.key] = self._clock()

    def _pass(self, when: str) -> None:
        for step in self.meanwhile.pop(when, ()):
            step()

    def _may_stumble(self, call: str) -> None:
        if call in self.stumbles:
            self.stumbles.remove(call)
            raise StoreError(f"{call} failed")

    def _undo(self) -> None:
        """Delete what was stored without an answer, as a store has to before anything else."""
        unanswered, self._unanswered = self._unanswered, []
        super().done(unanswered)


class ModelRetryWorker(RetryWorker):
    """Notes when a message may be sent again at the earliest, as documented (I15)."""

    def __init__(self, producer: ModelProducer) -> None:
        backoff = Backoff(BASE_DELAY, MAX_DELAY)
        super().__init__(producer.store, producer.gate, backoff, SWEEP, Listener(producer).take)
        self._producer = producer
        self._take = self.stored_rows.take
        self.stored_rows.take = self._take_and_note  # type: ignore[method-assign]

    def _take_and_note(self, row: Row, now: float, epoch: float) -> Delivery:
        delivery = self._take(row, now, epoch)
        self._producer.note_life(delivery)
        return delivery

    def defer(
        self, delivery: Delivery, now: float, *, before: RowState, fresh: bool = False
    ) -> bool:
        """Store it, as soon as the thread gets to it."""
        record = self._producer.record(delivery)
        assert not record.ends, "kept after its end"
        assert record.retry, "I2: retry=False, and kept for a retry"
        assert now == self._producer.clock.now
        record.not_before = now + self._earliest(delivery)
        return super().defer(delivery, now, before=before, fresh=fresh)

    def _earliest(self, delivery: Delivery) -> float:
        if delivery.in_flight:
            return math.inf
        if delivery.dead:  # the first letter waits for nothing, however often it is stored
            return MAX_DELAY if self._producer.record(delivery).letters else 0.0
        if delivery.attempts == 0:
            return 0.0
        return float(min(BASE_DELAY * 2.0 ** (delivery.attempts - 1), MAX_DELAY))
