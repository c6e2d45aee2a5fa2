"""A producer without its threads: the real sender, retry worker, gate and store, on a test's clock.

What its threads tell one another waits here in queues, so that a test can interleave them as it
likes; what they do is checked by the witnesses that are built in.

Runs on: the test's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from attrs import evolve

from mlproducer import _answers as waiting
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_errors import silent_store
from mlproducer._core.delivery_states import ROW_PENDING, AnswerState, AttemptState, RowState
from mlproducer._core.failures import SOFT_ACCUSATIONS, accuses
from mlproducer._core.interfaces import Loss
from mlproducer._core.sender import Sender
from mlproducer._core.states import CircuitState
from mlproducer._engine.gate import Gate
from mlproducer._engine.store_orders import Put
from mlproducer._synchronization import Latch
from mlproducer.errors import PublishError, RetriesExhaustedError
from mlproducer.message import Envelope
from tests.helpers import make_delivery
from tests.pure.witnesses import (
    PLENTY,
    Channel,
    Clock,
    Handed,
    Listener,
    ModelBreaker,
    ModelRetryWorker,
    ModelStore,
    NoAnswerError,
    Record,
    Setup,
)

MANY = 1000
TIMEOUT = 5.0
WINDOW_BYTES = 40
"""Bytes inside at once: six messages of the tests' size, fewer of the larger ones."""


class ModelProducer:
    """One producer without its threads, its broker and its publishers."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.setup = setup
        self.clock = clock
        self.records: dict[Delivery, Record] = {}
        self.by_id: dict[str, Record] = {}
        self.last_first = 0
        self.channel: Channel | None = None
        self.new_connection = False
        self.blocked = self.closing = self.closed = False
        self.stuck = False  # the retry thread waits for an answer that never comes
        self.owing: list[Delivery] = []
        self.submits: dict[Delivery, tuple[Put, Latch]] = {}
        self.taken: dict[int, Record] = {}  # rows that another process has claimed
        self.revived: list[Delivery] = []  # second lives that the test has not seen yet
        self.mailbox: deque[Delivery | Callable[[], None]] = deque()
        self.gate = Gate(setup.window, WINDOW_BYTES)
        self.store = ModelStore(setup, clock)
        self.retry_worker = ModelRetryWorker(self)
        self.breaker = ModelBreaker(self)
        self.sender = Sender(
            setup.max_retries,
            self.breaker,
            self.retry_worker,
            self.dead_letter,
            self.gate.leave,
            Listener(self).take,
        )
        self.retry_worker.serve([self], lambda: None)  # type: ignore[list-item]

    def record(self, delivery: Delivery) -> Record:
        """Return what is known of a message, in this life of it."""
        return self.records[delivery]

    def note_life(self, delivery: Delivery) -> None:
        """Begin a record for a message that comes from a row, and that is not followed any more.

        It has ended here, which its row was not told of: by then another process had that, which
        died. So it is sent once more, as any process would that claims the row.
        """
        if delivery in self.records:
            return
        before = self.by_id[delivery.envelope.message_id]
        going = before.delivery.row is RowState.WITHDRAWING  # its publisher is about to be told
        assert before.ends or going, "a second life beside the first"
        assert before.lapsed, "a second life within its lease"
        record = Record(delivery, before.serial, retry=True)
        record.sends = record.hits = delivery.attempts
        record.hidden = delivery.doubt is not Doubt.NONE
        record.lapsed = True
        self.records[delivery] = self.by_id[delivery.envelope.message_id] = record
        self.revived.append(delivery)

    # --- the dead-letter maker ---

    def dead_letter(self, delivery: Delivery, reason: PublishError, now: float) -> Envelope:
        """Make a letter, once, and only of what has used up its retries or is hopeless (I14)."""
        assert delivery.envelope.exchange != "dead", "I22: a letter of a letter"
        assert not delivery.in_flight, "buried while its tag is open"
        assert delivery.attempts > self.setup.max_retries or reason.permanent, "I14"
        assert not isinstance(reason, RetriesExhaustedError)
        return evolve(delivery.envelope, exchange="dead")

    # --- the owner ---

    def order(self, method: partial[None]) -> bool:
        """Have something done by the I/O thread."""
        if not self.closed:
            self.mailbox.append(method)
        return not self.closed

    def ready(self) -> int:
        """As the I/O thread says it."""
        if not self.sender.able:
            return 0
        return MANY if self.breaker.state is CircuitState.CLOSED else 1

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send again what was stored, and not before its time."""
        for delivery in deliveries:
            if delivery.open:
                owed = delivery.row in ROW_PENDING
                given_back = owed and delivery.attempt is AttemptState.RETIRED
                assert delivery.attempt is AttemptState.SCHEDULED or given_back, delivery.attempt
                assert self.clock.now >= self.record(delivery).not_before, "I15: early"
                inside = delivery in self.gate._inside or given_back
                assert inside, "I6: inside without a slot"
            self.sender.readmit(delivery, self.clock.now)

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """Send for the first time what is stored."""
        for delivery in deliveries:
            stored = (
                self.retry_worker.stored_rows.claim_of(delivery) or self.record(delivery).stolen
            )
            assert stored, "I20: sent before it was stored"
            self.sender.stored_ahead([delivery])
            self.sender.readmit(delivery, self.clock.now)
            if delivery.deadline <= self.clock.now and self.record(delivery).asked:
                self._expire(delivery)  # its publisher has asked while it was being stored

    def stored(self, deliveries: Sequence[Delivery]) -> None:
        """Pass it on."""
        self.sender.stored(deliveries, self.clock.now)

    def not_stored(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """Pass it on."""
        for delivery, error in refusals:
            self.sender.not_stored(delivery, error, self.clock.now)

    def withdrawn(self, deliveries: Sequence[Delivery], *, gone: bool) -> None:
        """Pass it on; what is another process's is sent there."""
        for delivery in deliveries:
            assert gone or self.record(delivery).shared, "there was no other process"
        self.sender.withdrawn(deliveries, self.clock.now, gone=gone)

    def taken_over(self, deliveries: Sequence[Delivery]) -> None:
        """Pass it on; from here on it is known that another process may have sent them."""
        for delivery in deliveries:
            self.record(delivery).lapsed = self.record(delivery).hidden = True
        self.sender.taken_over(deliveries, self.clock.now)

    def ended_elsewhere(self, deliveries: Sequence[Delivery], *, dead: bool) -> None:
        """Pass it on; it is an end of which the other process has told."""
        for delivery in deliveries:
            record = self.record(delivery)
            assert record.elsewhere == ("buries" if dead else "delivers")
            if delivery.open:
                record.ends.append("elsewhere")
        self.sender.ended_elsewhere(deliveries, self.clock.now, dead=dead)

    def vanished(self, deliveries: Sequence[Delivery]) -> None:
        """Pass it on; it is only true of what was in the store alone."""
        for delivery in deliveries:
            assert self.record(delivery).robbed, "the row was there, or a copy was here"
        self.sender.vanished(deliveries)

    # --- publishers ---

    def publish(
        self,
        *,
        exchange: str,
        retry: bool,
        waits: bool,
        properties: bytes,
        cut: str = "",
    ) -> Delivery | None:
        """Hand a message in, as `MLProducer` does; nothing is made where the breaker refuses.

        :param cut: the step after which the call is interrupted
        """
        if self.breaker.refuses() and not (self.store.durable and retry):
            return None
        delivery = make_delivery(
            exchange=exchange,
            properties=properties,
            started=self.clock.now,
            deadline=self.clock.now + TIMEOUT,
            retry=retry,
            answers_deferral=waits,
        )
        if waits:
            delivery.waiter = Handed()
        record = Record(delivery, len(self.records) + 1, retry)
        self.records[delivery] = self.by_id[delivery.envelope.message_id] = record
        if self.gate.try_enter(delivery):
            if cut == "entered":
                self.withdraw(delivery)
            elif self.store.write_ahead and not self.closing:
                self._write_ahead(delivery, waits=waits)
            else:
                self.mailbox.append(delivery)
        elif waits:
            self.mailbox.append(partial(self._turn_away, delivery))
        else:
            self.withdraw(delivery)
        if cut == "posted":
            self.submits.pop(delivery, None)
            self.withdraw(delivery)
        return delivery

    def _write_ahead(self, delivery: Delivery, *, waits: bool) -> None:
        if waits:
            self.retry_worker.write_ahead(delivery)
        else:
            done = Latch()
            self.submits[delivery] = self.retry_worker.write_ahead(delivery, done), done

    def look(self) -> None:
        """Let those who submit see whether their messages are stored."""
        for delivery, (put, done) in list(self.submits.items()):
            record = self.record(delivery)
            if done.wait(0):
                del self.submits[delivery]
                record.told = put.refusal
            elif self.clock.now >= delivery.deadline:
                del self.submits[delivery]
                error = silent_store(delivery, "store")
                record.told = error if self.take_back(delivery, error) else put.refusal

    def give_up(self, delivery: Delivery) -> None:
        """End the wait of a publisher to whom the I/O thread does not speak."""
        record = self.record(delivery)
        assert isinstance(delivery.waiter, Handed)
        try:
            record.told = waiting.unanswered(self, delivery, delivery.waiter)  # type: ignore[arg-type]
        except PublishError as error:
            record.told = error

    def withdraw(self, delivery: Delivery, _error: BaseException | None = None) -> None:
        """Take a message back, as an interrupted publisher does."""
        delivery.recall()
        self.take_back(delivery, PublishError("interrupted"))

    def take_back(self, delivery: Delivery, _error: PublishError) -> bool:
        """Take a message back, as a publisher does that gives up, unless it is ours already."""
        taken = delivery.withdraw()
        if taken:
            self.record(delivery).ends.append("withdrawn")
            self.gate.leave((delivery,))
        return taken

    def expire(self, delivery: Delivery) -> None:
        """Say that a publisher's time is up."""
        self.record(delivery).asked = True
        self.mailbox.append(partial(self._expire, delivery))

    def _expire(self, delivery: Delivery) -> None:
        self.sender.expire(delivery, self.clock.now)
        owes = delivery.row in ROW_PENDING
        if owes:
            self.owing.append(delivery)
        waits = delivery.answer in (AnswerState.WITHDRAWABLE, AnswerState.WAITING)
        done = delivery.waiter.done() or not (delivery.answers_deferral and waits)
        assert done or owes or self.store.write_ahead or self.record(delivery).told, "I4, I5"

    def pay(self) -> None:
        """Let the time be over that the store has beyond a publisher's."""
        owing, self.owing = self.owing, []
        for delivery in owing:
            if delivery.row in ROW_PENDING:
                self.record(delivery).lapsed = True  # what it does not delete, others may send
            self.sender.store_is_late(delivery, self.clock.now)

    def _turn_away(self, delivery: Delivery) -> None:
        self.sender.turn_away(delivery, self.clock.now)

    # --- the end ---

    def store_rest(self) -> None:
        """Have a durable store take what is left, as a close does before anything else."""
        self.closing = True
        if self.store.durable and not self.sender.shutdown.begun:
            self.sender.shutdown.store_rest(self.clock.now)
            self.retry_worker.verify()

    # --- the store, and another process that shares it ---

    def rob(self, key: int) -> None:
        """Lose a row; its message is lost with it where this process holds no copy."""
        record = self.by_id[self.store._slots[key].record.envelope.message_id]
        record.stolen = True
        record.robbed = record.delivery not in self.retry_worker.stored_rows.claims
        self.taken.pop(key, None)
        self.store.remove(key)

    def left_rows(self) -> list[Record]:
        """Return the messages whose row is this process's to delete, or is owned by none."""
        left = []
        for key, slot in self.store.slots().items():
            record = self.by_id[slot.record.envelope.message_id]
            elsewhere = key in self.taken or (record.shared and slot.due is not None)
            if not (elsewhere or record.unsaid):
                left.append(record)
        return left

    def take_over(self, key: int) -> None:
        """Let another process have a row."""
        self.taken[key] = self.by_id[self.store._slots[key].record.envelope.message_id]
        self.taken[key].shared = True
        self.store.take_over(key)

    def elsewhere(self, what: str) -> None:
        """Let the other process deliver or bury all that it holds, or die."""
        for key, record in self.taken.items():
            if what == "dies":
                self.store.give_up(key)
                continue
            record.elsewhere = what
            record.acked = True
            self.store.end(key, what)
        self.taken.clear()

    def note_lapsed(self) -> None:
        """Remember whose lease is over, whether another process takes it or not."""
        for record in self.records.values():
            record.lapsed = record.lapsed or record.delivery.leased_until < self.clock.now

    def posted(self) -> set[Delivery]:
        """Return the messages that something in the mailbox is about."""
        found: set[Delivery] = set()
        for item in self.mailbox:
            for each in (item,) if isinstance(item, Delivery) else item.args:  # type: ignore[attr-defined]
                if isinstance(each, Delivery):
                    found.add(each)
                elif isinstance(each, list):
                    found.update(one[0] if isinstance(one, tuple) else one for one in each)
        return found

    # --- the threads ---

    def drain(self, limit: int) -> None:
        """Let the I/O thread see what others have handed in."""
        self.note_lapsed()
        for _ in range(min(limit, len(self.mailbox))):
            item = self.mailbox.popleft()
            if isinstance(item, Delivery):
                self.sender.accept([item], self.clock.now)
            else:
                item()
        self.pump()

    def pump(self) -> None:
        """Let it write."""
        self.note_lapsed()
        self.sender.pump(self.clock.now)

    def run_retry_thread(self) -> None:
        """Let the retry thread carry out one order, or sweep where that is due."""
        orders, due = self.retry_worker.thread._orders, self.retry_worker.thread.due
        try:
            if self.stuck:
                return
            if orders:
                orders.popleft()()
            elif due is not None and due <= self.clock.now:
                self.retry_worker.sweep()
        except NoAnswerError as silence:
            self.stuck = True
            for key in silence.keys:
                self.by_id[self.store._slots[key].record.envelope.message_id].unsaid = True

    @property
    def ordered(self) -> bool:
        """Whether the retry thread has something to do, and can do it."""
        return bool(self.retry_worker.thread._orders) and not self.stuck

    def work(self, seconds: float) -> Iterator[None]:
        """Let every thread do all that it has to do, now and after a time, thing by thing."""
        self.drain(PLENTY)
        yield
        self.clock.now += seconds
        self.cool()
        self.pay()
        yield
        while self.ordered:
            self.run_retry_thread()
            yield
        self.run_retry_thread()
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
        failures = self.sender.acked if good else self.sender.nacked
        failures([(tag, multiple)], self.clock.now)
        self._check_counted(failed)
        self.pump()

    def block(self, *, blocked: bool) -> None:
        """Let the alarm come or go."""
        self.blocked = blocked
        self.sender.block(blocked=blocked)
        if not blocked:
            self.pump()
            self.retry_worker.sweep_soon()

    def up(self, room: int = PLENTY, *, narrow: bool = False, first: bool = True) -> None:
        """Open a channel; the first of a connection ends a cooldown."""
        self.channel = Channel(self, room, narrow=narrow)
        self.sender.up(self.channel)
        if first:
            self.new_connection = True
            self.breaker.reconnected()
            self.new_connection = False
        self.pump()
        self.retry_worker.sweep_soon()

    def down(self, code: int) -> None:
        """Lose the channel; telling it twice changes nothing."""
        if self.channel is None:
            return
        alone = accuses(code) and len(self.channel.open) == 1
        failed = []
        for tag, record in self.channel.open.items():
            record.hits += 1
            record.summoned += accuses(code) and not alone
            if tag not in self.channel.returned and not alone:
                record.suspected = True
                record.hidden = record.hidden or code not in SOFT_ACCUSATIONS
                failed.append(record)
        self.channel = None
        for _ in range(2):
            self.sender.down(Loss("gone", code), self.clock.now)
        if not accuses(code):
            self._check_counted(failed)

    def lose_connection(self, code: int) -> None:
        """Lose the channel, and the broker's Blocked with it."""
        self.down(code)
        self.blocked = False
        self.sender.disconnected()

    def cool(self) -> None:
        """Let the breaker thread look at the clock."""
        self.breaker.cool(self.clock.now)
        self.pump()
        self.retry_worker.sweep_soon()

    def _check_counted(self, failed: list[Record]) -> None:
        for record in failed:
            assert record.counted == record.writes, "I17: a failure was not counted"
