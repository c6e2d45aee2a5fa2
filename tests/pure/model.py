"""A producer without its threads: the real courier, keeper, gate and store, on a test's clock.

What its threads tell one another waits here in queues, so that a test can interleave them as it
likes; what they do is checked by the witnesses that are built in.

Runs on: the test's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from attrs import evolve

from mlproducer.core.courier import Courier
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Loss
from mlproducer.core.recovery import accuses
from mlproducer.core.states import CircuitState
from mlproducer.engine.gate import Gate
from mlproducer.errors import PublishError, RetriesExhaustedError
from mlproducer.message import Envelope
from tests.helpers import make_delivery
from tests.pure.witnesses import (
    PLENTY,
    Channel,
    Clock,
    ModelBreaker,
    ModelKeeper,
    ModelStore,
    Record,
    Setup,
    Sink,
)

MANY = 1000
WINDOW_BYTES = 40
"""Bytes inside at once: six messages of the tests' size, fewer of the larger ones."""


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
        self.blocked = self.closed = False
        self.mailbox: deque[Delivery | Callable[[], None]] = deque()
        self.gate = Gate(setup.window, WINDOW_BYTES)
        self.store = ModelStore(setup, clock)
        self.keeper = ModelKeeper(self)
        self.breaker = ModelBreaker(self)
        self.courier = Courier(
            setup.max_retries, self.breaker, self.keeper, self, self.gate, Sink(self)
        )
        self.keeper.serve([self], lambda: None)  # type: ignore[list-item]

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

    def order(self, method: partial[None]) -> bool:
        """Have something done by the I/O thread."""
        if not self.closed:
            self.mailbox.append(method)
        return not self.closed

    def ready(self) -> int:
        """As the I/O thread says it."""
        if not self.courier.able:
            return 0
        return MANY if self.breaker.state is CircuitState.CLOSED else 1

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send again what was stored, and not before its time."""
        for delivery in deliveries:
            if delivery.open:
                assert delivery.place is Place.STORED
                assert self.clock.now >= self.record(delivery).not_before, "I15: early"
                assert delivery in self.gate._inside, "I6: inside without a slot"
            self.courier.readmit(delivery, self.clock.now)

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """Send for the first time what is stored."""
        for delivery in deliveries:
            assert self.keeper.shelf.has_row(delivery), "I20: sent before it was stored"
            self.courier.readmit(delivery, self.clock.now)

    def kept(self, deliveries: Sequence[Delivery]) -> None:
        """Pass it on."""
        self.courier.kept(deliveries, self.clock.now)

    def not_kept(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """Pass it on."""
        for delivery, error in refusals:
            self.courier.not_kept(delivery, error)

    def withdrawn(self, deliveries: Sequence[Delivery]) -> None:
        """Pass it on."""
        self.courier.withdrawn(deliveries)

    # --- publishers ---

    def publish(
        self, *, exchange: str, retry: bool, waits: bool, properties: bytes
    ) -> Delivery | None:
        """Hand a message in, as `MLProducer` does; nothing is made where the breaker refuses."""
        if self.breaker.refuses() and not (self.store.durable and retry):
            return None
        delivery = make_delivery(
            exchange=exchange,
            properties=properties,
            started=self.clock.now,
            retry=retry,
            answer_deferral=waits,
        )
        record = Record(delivery, len(self.records) + 1)
        self.records[delivery] = self.by_id[delivery.envelope.message_id] = record
        if self.gate.try_enter(delivery):
            if self.store.write_ahead:
                self.keeper.write_ahead(delivery)
            else:
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
        done = delivery.answer.done() or not delivery.answer_deferral
        assert done or self.courier.judge.owes(delivery) or self.store.write_ahead, "I4, I5"

    def _turn_away(self, delivery: Delivery) -> None:
        self.courier.turn_away(delivery, self.clock.now)

    # --- the threads ---

    def drain(self, limit: int) -> None:
        """Let the I/O thread see what others have handed in."""
        for _ in range(min(limit, len(self.mailbox))):
            item = self.mailbox.popleft()
            if isinstance(item, Delivery):
                self.courier.accept([item], self.clock.now)
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

    def work(self, seconds: float) -> Iterator[None]:
        """Let every thread do all that it has to do, now and after a time, thing by thing."""
        self.drain(PLENTY)
        yield
        self.clock.now += seconds
        self.cool()
        yield
        while not self.keeper.thread._orders.empty():
            self.keep_house()
            yield
        self.keep_house()
        yield
        self.drain(PLENTY)
        yield

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
