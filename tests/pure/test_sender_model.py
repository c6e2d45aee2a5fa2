"""The sender and its retry worker against a model of broker and publishers, in any order of events.

A step is one thing that one of the threads, the broker or a publisher does, with a look at
everything after it; most rules are one, `a_while` is many. Each example ends in one of two ways:
the producer is closed on the spot, or the faults stop and everything has to find its end within a
bounded time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlproducer import _answers as waiting
from mlproducer._core.delivery import Delivery, Doubt, NoWaiter
from mlproducer._core.delivery_states import ROW_PENDING, AnswerState, AttemptState
from mlproducer._core.states import CircuitState
from mlproducer._engine import retry_worker, store_writer
from mlproducer.errors import (
    AuthenticationError,
    NotConnectedError,
    PublishError,
    RetriesExhaustedError,
)
from mlproducer.message import Receipt
from tests.helpers import NO_PROPERTIES
from tests.pure.model import TIMEOUT, WINDOW_BYTES, ModelProducer
from tests.pure.witnesses import (
    COOLDOWN,
    LEASE,
    PLENTY,
    SWEEP,
    WIDE,
    Clock,
    Record,
    Setup,
)

ENDED = {AttemptState.CONFIRMED, AttemptState.RETIRED}
CALLS = ["put", "put's answer", "release", "renew", "done", "claim", "depth", "trace"]
MOMENTS = [
    "a_second_passes",
    "everyone_expires",
    "the_io_thread_reads",
    "the_io_thread_is_silent",
    "the_store_is_late",
    "the_broker_confirms",
    "the_connection_is_lost",
]

ROUNDS = 500
"""Seconds within which everything finds its end once faults have stopped."""

PICK = st.integers(0, 1 << 16)

clock = Clock()


class SenderMachine(RuleBasedStateMachine):
    """All that can happen, in any order."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.producer = ModelProducer(Setup(), clock)
        self.live: dict[Delivery, Record] = {}
        self.fair = False
        self.hurried = False

    @initialize(
        max_retries=st.sampled_from([3, 3, 1, 0]),
        threshold=st.sampled_from([4, 1000, 1000, 1]),
        window=st.sampled_from([8, 8, 2, 100]),
        rows=st.sampled_from([50, 50, 50, 2]),
        durable=st.booleans(),
        ahead=st.booleans(),
        fair=st.booleans(),
        connected=st.sampled_from([True, True, True, False]),
        puts=st.sampled_from([0] * 6 + [1, 4]),
        hurried=st.booleans(),
    )
    def begin(self, *, fair: bool, connected: bool, hurried: bool = False, **fields: int) -> None:
        """Make a producer."""
        self.producer = ModelProducer(Setup(**fields), clock)  # type: ignore[arg-type]
        self.fair = fair
        self.hurried = hurried
        if connected:
            self.producer.up()

    # --- publishers ---

    @rule(
        count=st.integers(1, 4),
        retry=st.sampled_from([True, True, True, False]),
        waits=st.booleans(),
        exchange=st.sampled_from("xy"),
        properties=st.sampled_from([NO_PROPERTIES] * 4 + [WIDE]),
        cut=st.sampled_from([""] * 8 + ["entered", "posted"]),
        seen=st.booleans(),
    )
    def publish(self, *, count: int, seen: bool, **message: Any) -> None:
        """Some publish or submit; the I/O thread sees it at once, or later."""
        for _ in range(count):
            self.publish_one(**message)
        if seen:
            self.producer.drain(PLENTY)

    def publish_one(self, **message: Any) -> None:
        """Hand one in."""
        delivery = self.producer.publish(**message)
        if delivery is not None:
            self.live[delivery] = self.producer.record(delivery)

    @precondition(lambda self: self.live)
    @rule(pick=PICK, hit=st.sampled_from([False, False, True]))
    def interrupt(self, pick: int, hit: bool) -> None:
        """A publisher is interrupted, and takes its message back if it still can."""
        delivery = self._one_of_the_live(pick)
        if hit and self._waits(delivery):
            self.producer.withdraw(delivery)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def expire(self, pick: int) -> None:
        """The time of one publisher is up."""
        delivery = self._one_of_the_live(pick)
        clock.now = max(clock.now, delivery.deadline)
        self._expire(delivery)

    def _expire(self, delivery: Delivery) -> None:
        record = self.producer.record(delivery)
        if self._waits(delivery) and clock.now >= delivery.deadline and not record.asked:
            self.producer.expire(delivery)

    def _waits(self, delivery: Delivery) -> bool:
        """Whether a call of `publish` waits for its answer."""
        record = self.producer.record(delivery)
        told = delivery.answer is AnswerState.DEFERRED or self._answered(delivery)
        waits = delivery.answers_deferral and not told and record.told is None
        return waits and record.ends != ["withdrawn"]

    def everyone_expires(self) -> None:
        """The time of all publishers is up."""
        clock.now += TIMEOUT
        for delivery in self.live:
            self._expire(delivery)

    @precondition(lambda self: self.live)
    @rule()
    def the_io_thread_is_silent(self) -> None:
        """Publishers whose time is up have asked it, and wait no longer."""
        for delivery in list(self.live):
            if self._waits(delivery) and self.producer.record(delivery).asked:
                self.producer.give_up(delivery)

    @rule()
    def the_store_is_late(self) -> None:
        """What it has not answered by now is owed; those who submit look at it themselves."""
        self.producer.pay()
        self.producer.look()

    def _one_of_the_live(self, pick: int) -> Delivery:
        deliveries = list(self.live)
        return deliveries[pick % len(deliveries)]

    # --- the threads ---

    @precondition(lambda self: self.producer.mailbox)
    @rule(limit=st.sampled_from([1, 2, 1000, 1000]))
    def the_io_thread_looks(self, limit: int) -> None:
        """It takes from its mailbox what is there, or a part of it."""
        self.producer.drain(limit)

    @rule(count=st.sampled_from([1, 1, 2, 1000]))
    def the_retry_thread_works(self, count: int) -> None:
        """It carries out orders and sweeps."""
        for _ in range(count):
            self.producer.run_retry_thread()
            if not self.producer.ordered:
                break

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.5, 11.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        """Time passes."""
        clock.now += seconds

    @rule()
    def the_breaker_thread_looks(self) -> None:
        """It may be too early."""
        self.producer.cool()

    # --- the broker ---

    @precondition(lambda self: self.producer.channel)
    @rule(pick=PICK, multiple=st.booleans(), good=st.sampled_from([True, False, False]))
    def settle(self, pick: int, multiple: bool, good: bool) -> None:
        """An ack or nack for any tag: open, settled before, or never given out."""
        assert self.producer.channel is not None
        tag = pick % (self.producer.channel.last + 2)
        self.producer.settle(tag, multiple=multiple, good=good)

    @precondition(lambda self: self.producer.channel and self.producer.channel.open)
    @rule(pick=PICK, multiple=st.booleans(), good=st.booleans())
    def settle_open(self, pick: int, multiple: bool, good: bool) -> None:
        """An ack or nack for a tag that is open."""
        assert self.producer.channel is not None
        tags = list(self.producer.channel.open)
        self.producer.settle(tags[pick % len(tags)], multiple=multiple, good=good)

    @precondition(lambda self: self.producer.channel and self.producer.channel.open)
    @rule(pick=PICK)
    def return_(self, pick: int) -> None:
        """A message has no queue; its ack or nack comes later."""
        assert self.producer.channel is not None
        tags = list(self.producer.channel.open)
        self.return_tag(tags[pick % len(tags)])

    def return_tag(self, tag: int) -> None:
        """Send a message back."""
        assert self.producer.channel is not None
        self.producer.channel.returned.add(tag)
        self.producer.sender.returned(tag, 312, "NO_ROUTE")

    @precondition(lambda self: self.producer.channel)
    @rule(blocked=st.sampled_from([False, False, True]))
    def flow(self, blocked: bool) -> None:
        """The alarm comes or goes."""
        self.producer.block(blocked=blocked)

    @rule(
        seconds=st.sampled_from([1.0, 11.0, 31.0]),
        rounds=st.lists(st.sampled_from(["ack", "nack", "return", "silence"]), max_size=6),
        waits=st.booleans(),
    )
    def a_while(self, seconds: float, rounds: list[str], waits: bool) -> None:
        """A message is published, every thread does all that it has to do, the broker answers."""
        for answer in rounds:
            self.publish_one(exchange="x", retry=True, waits=waits, properties=NO_PROPERTIES)
            for _ in self.producer.work(seconds):
                self.check()
            self._answer_all(answer)
            self.check()

    def _answer_all(self, answer: str) -> None:
        channel = self.producer.channel
        if answer == "silence":
            self.everyone_expires()
            self.producer.drain(PLENTY)
        elif channel is not None:
            if answer == "return":
                for tag in list(channel.open):
                    self.return_tag(tag)
            self.producer.settle(channel.last, multiple=True, good=answer != "nack")

    # --- the connection ---

    @precondition(lambda self: not self.producer.channel)
    @rule(room=st.sampled_from([1, 10, PLENTY, PLENTY]), narrow=st.booleans())
    def up(self, room: int, narrow: bool) -> None:
        """A connection is made."""
        self.producer.up(room, narrow=narrow)

    @precondition(lambda self: self.producer.channel)
    @rule(code=st.sampled_from([403, 404, 406]))
    def channel_closed(self, code: int) -> None:
        """The broker closes the channel over a message, and opens the next."""
        self.producer.down(code)
        self.producer.up(first=False)

    @precondition(lambda self: self.producer.channel)
    @rule(code=st.sampled_from([0, 320, 501, 541]))
    def connection_lost(self, code: int) -> None:
        """The connection is gone."""
        self.producer.lose_connection(code)

    @precondition(lambda self: not self.producer.channel)
    @rule(kind=st.sampled_from([NotConnectedError, AuthenticationError]))
    def refuse(self, kind: type[PublishError]) -> None:
        """An attempt to connect failed."""
        self.producer.sender.refuse(kind("no"), clock.now)
        assert self.producer.sender.waiting == 0

    @rule(broken=st.sampled_from([True] + [False] * 5))
    def the_store(self, broken: bool) -> None:
        """The store fails, or works again."""
        self.producer.store.broken = broken

    @rule(call=st.sampled_from(CALLS))
    def the_store_stumbles(self, call: str) -> None:
        """One call to it will fail; a put may have stored everything by then."""
        self.producer.store.stumbles.add(call)

    @rule(
        before=st.lists(st.sampled_from(MOMENTS), max_size=4),
        after=st.lists(st.sampled_from(MOMENTS), max_size=4),
        claimed=st.lists(st.sampled_from(["many_submit", *MOMENTS]), max_size=3),
    )
    def the_store_is_slow(self, **steps: list[str]) -> None:
        """While the next put or claim is under way, time passes and others go on."""
        self.producer.store.meanwhile = {
            when: [getattr(self, name) for name in names] for when, names in steps.items()
        }

    @precondition(lambda self: self.producer.store.durable and self.producer.store._slots)
    @rule(pick=PICK, everything=st.booleans())
    def rows_are_gone(self, pick: int, everything: bool) -> None:
        """The store has lost a row, or starts over empty."""
        keys = list(self.producer.store._slots)
        for key in keys if everything else [keys[pick % len(keys)]]:
            self.producer.rob(key)

    @precondition(lambda self: self.producer.store.durable)
    @rule(due=st.booleans())
    def rows_are_taken_over(self, due: bool) -> None:
        """Another process claims what this one has not renewed in time, or what is due."""
        store = self.producer.store
        for key in store.lapsed() + (store.due() if due else []):
            self.producer.take_over(key)

    @precondition(lambda self: self.producer.store.durable and self.producer.channel)
    @rule(retry=st.booleans(), waits=st.booleans())
    def a_lease_runs_out(self, retry: bool, waits: bool) -> None:
        """While the broker blocks, this process, or the store, is frozen for longer than that."""
        self.producer.block(blocked=True)
        self.publish_one(exchange="x", retry=retry, waits=waits, properties=NO_PROPERTIES)
        self.the_retry_thread_works(1000)
        self.producer.drain(PLENTY)
        clock.now += LEASE
        self.producer.block(blocked=False)

    @precondition(lambda self: not self.producer.closing)
    @rule(really=st.sampled_from([False] * 5 + [True]))
    def a_close_is_cut(self, really: bool) -> None:
        """A close has had the store take what is left, and is interrupted before the next step."""
        if really:
            self.producer.store_rest()

    @precondition(lambda self: self.producer.taken)
    @rule(what=st.sampled_from(["delivers", "buries", "dies"]))
    def the_other_process(self, what: str) -> None:
        """It brings the message to its end, or comes to its own."""
        self.producer.elsewhere(what)

    # What may happen while a put or claim is under way.

    def many_submit(self) -> None:
        """The window is filled."""
        for _ in range(self.producer.setup.window):
            self.publish_one(exchange="x", retry=True, waits=False, properties=NO_PROPERTIES)

    def a_second_passes(self) -> None:
        """Time passes."""
        clock.now += 1.0

    def the_io_thread_reads(self) -> None:
        """It takes everything out of its mailbox."""
        self.producer.drain(PLENTY)

    def the_broker_confirms(self) -> None:
        """All that is in flight."""
        if self.producer.channel is not None:
            self.producer.settle(self.producer.channel.last, multiple=True, good=True)

    def the_connection_is_lost(self) -> None:
        """With all that is in flight."""
        self.producer.lose_connection(0)

    # --- what holds at every step ---

    @invariant()
    def check(self) -> None:
        """Count a step, look at everything, and at what has ended for the last time."""
        SenderMachine.steps += 1
        while self.producer.revived:
            delivery = self.producer.revived.pop()
            self.live[delivery] = self.producer.record(delivery)
        self.one_place()
        self.answers_stand()
        self.circuit()
        self.nothing_is_left_behind()
        self.flushed()
        self.forget_the_retired()

    def one_place(self) -> None:
        """I1, I6, I25: each message is in exactly one place, and within every limit."""
        producer, send_queue = self.producer, self.producer.sender._send_queue
        posted = producer.posted()
        waiting = Counter([*send_queue.backlog, *send_queue.poison.suspects])
        flying = Counter(producer.channel.open.values()) if producer.channel else Counter()
        for delivery, record in self.live.items():
            place = delivery.attempt
            assert waiting[delivery] == (place is AttemptState.QUEUED)
            assert flying[record] == delivery.in_flight
            withdrawn = place is AttemptState.QUEUED and not delivery.open
            if (place is AttemptState.QUEUED or delivery.in_flight) and not withdrawn:
                assert delivery in producer.gate._inside, "I6: inside without a slot"
            elif place is AttemptState.SCHEDULED:
                owed = delivery.row in ROW_PENDING
                owed = owed or delivery in posted
                assert owed or delivery in producer.retry_worker.stored_rows.deliveries()
                assert owed or delivery not in producer.gate._inside
        assert producer.sender.in_flight == flying.total()
        assert producer.sender.waiting == waiting.total()
        assert len(producer.gate) <= producer.setup.window
        assert producer.gate._bytes == sum(each.envelope.size for each in producer.gate.inside())
        assert producer.gate._bytes <= WINDOW_BYTES or len(producer.gate) == 1
        assert len(producer.store._slots) <= producer.setup.rows

    def answers_stand(self) -> None:
        """I4: an answer never changes; what was confirmed or given back was answered so."""
        for delivery, record in self.live.items():
            if self._answered(delivery) and not delivery.waiter.cancelled():
                answer = delivery.waiter.exception(0) or delivery.waiter.result(0)
                record.answer = record.answer or answer
                assert record.answer is answer
            assert delivery.open == (not record.ends)
            deferred = delivery.fate not in (None, delivery.waiter) and not record.ends
            if deferred and not self._goes_back(delivery) and not record.stolen:
                stored_rows = self.producer.retry_worker.stored_rows
                owed = delivery in stored_rows.rowless or delivery.row in ROW_PENDING
                stored = (
                    stored_rows.claim_of(delivery) or (record.told and owed) or record.elsewhere
                )
                assert stored, "I20: not stored"
            said = [each for each in (record.told, record.answer) if isinstance(each, Receipt)]
            deferral = any(not receipt.confirmed for receipt in said)
            assert record.retry or not deferral, "I2: retry=False, and deferred"
            assert delivery.attempts == record.sends, "I14: an attempt is a write"
            assert record.writes <= 1 + record.hits, "I12: no write without a reason"

    def _answered(self, delivery: Delivery) -> bool:
        """Whether its publisher has been told something; in a second life there is none."""
        return not isinstance(delivery.waiter, NoWaiter) and delivery.waiter.done()

    def _goes_back(self, delivery: Delivery) -> bool:
        """Whether its publisher was interrupted, and a failure ends it once its row is gone."""
        return not delivery.retry and delivery.row in ROW_PENDING

    def circuit(self) -> None:
        """I17: closed below the threshold; counted is what was told."""
        breaker = self.producer.breaker
        assert breaker.failures == breaker.in_row
        threshold = self.producer.setup.threshold
        assert breaker.state is not CircuitState.CLOSED or breaker.failures < threshold

    def nothing_is_left_behind(self) -> None:
        """I2: what has found its end has no row, or one that is about to be deleted."""
        producer = self.producer
        ordered = {
            order.delivery for order in producer.retry_worker._store_writer.pending()
        } | producer.posted()
        for record in producer.left_rows():
            ends = record.delivery in ordered or producer.stuck
            assert not record.ends or ends, "I2: it leaves a row"

    def flushed(self) -> None:
        """`flush` gives 0 only where no row is left, but for those that are about to be deleted."""
        producer = self.producer
        left = (
            producer.gate.inside()
            or producer.retry_worker.depth.total
            or not producer.retry_worker.known
        )
        if not (left or producer.ordered or producer.mailbox or producer.stuck):
            assert all(record.shared for record in producer.left_rows()), "a row is left"
            assert not producer.retry_worker.stored_rows.rowless, (
                "one that should be stored is left"
            )

    def forget_the_retired(self) -> None:
        """Look at each message once more after its end, and no longer."""
        for delivery, record in list(self.live.items()):
            if delivery.attempt in ENDED and delivery.row not in ROW_PENDING:
                assert record.ends, "I4: it has retired, and its end was not told"
                assert delivery not in self.producer.gate._inside, "I6: a slot leaks"
                del self.live[delivery]

    # --- how it ends ---

    def teardown(self) -> None:
        """Close, now or after a time without faults: everyone has been told, nothing is left."""
        producer = self.producer
        producer.store.stumbles.clear()
        producer.store.meanwhile.clear()
        self._everyone_is_told()
        self.hurried = (
            self.hurried or producer.closing
        )  # rows are verified once, when a close begins
        if self.fair and not producer.closing and not producer.setup.puts:
            self._stop_the_faults()
        producer.store_rest()
        producer.channel = None
        while producer.store.durable and producer.ordered and not self.hurried:
            producer.run_retry_thread()
        if not self.hurried:
            producer.drain(PLENTY)
        stored_rows = producer.retry_worker.stored_rows
        producer.sender.shutdown.end(
            stored_rows.deliveries(), frozenset(stored_rows.rowless), clock.now
        )
        producer.drain(PLENTY)
        producer.closed = True
        producer.store.broken = False
        while producer.ordered:
            producer.run_retry_thread()
        self._check_the_end()

    def _everyone_is_told(self) -> None:
        """I5: no call of `publish` waits beyond its time, whatever the store or connection does."""
        self.everyone_expires()
        self.producer.drain(PLENTY)
        self.the_store_is_late()
        assert not any(self._waits(delivery) for delivery in self.live), "I5: it still waits"
        self.check()

    def _stop_the_faults(self) -> None:
        """I28: with a broker that takes everything, all is confirmed or dead in bounded time."""
        producer = self.producer
        producer.store.broken = False
        producer.lose_connection(0)
        producer.up()
        for _ in range(ROUNDS):
            producer.drain(PLENTY)
            producer.look()
            producer.elsewhere("delivers")
            if producer.channel is not None and producer.channel.open:
                producer.settle(producer.channel.last, multiple=True, good=True)
            for _ in producer.work(SWEEP):
                self.check()
            if producer.breaker.state is CircuitState.OPEN:
                clock.now += COOLDOWN
                producer.cool()
            # A row that is ordered to be deleted does not count any more, and is still there.
            if not (
                producer.gate
                or producer.retry_worker.depth.stored
                or producer.mailbox
                or producer.ordered
            ):
                break
        assert not producer.gate.inside()
        assert not producer.retry_worker.depth.stored
        assert not producer.store.slots(), f"a row outlives its message {producer.store.slots()}"

    def _check_the_end(self) -> None:
        producer = self.producer
        for delivery, record in producer.records.items():
            if delivery.attempt is AttemptState.MAILBOX and not record.ends:
                assert delivery in producer.submits or self._waits(delivery), "nothing waits for it"
                producer.withdraw(delivery)  # its publisher's own wait ends
            if not record.ends and not delivery.open:
                assert producer.store.durable, "I20: entrusted to a store that does not last"
                told = delivery.fate or delivery.waiter
                assert isinstance(told, NoWaiter) or told.done(), "I4: entrusted, and not told"
                continue
            assert len(record.ends) == 1, f"I4: told {record.ends}"
            assert delivery.attempt in ENDED or record.ends == ["withdrawn"]
            told = delivery.fate or delivery.waiter
            untold = record.ends == ["withdrawn"] or isinstance(told, NoWaiter)
            assert untold or told.done()
            if record.ends == ["dead-lettered"] and not untold:
                error = told.exception(0)
                assert isinstance(error, RetriesExhaustedError)
                assert error.attempts == record.sends
                assert error.reason is not None
        assert not any(delivery.open for delivery in producer.gate.inside())
        for record in producer.left_rows():
            assert not record.ends or producer.stuck, "a row outlives its message"
        rows = {slot.record.envelope.message_id for slot in producer.store.slots().values()}
        for delivery, record in producer.records.items():
            unseen = record.stolen and (self.hurried or producer.stuck)
            if not (record.ends or record.robbed or record.elsewhere or unseen):
                assert delivery.envelope.message_id in rows, "entrusted, and lost"


QUICK = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test's clock to all that asks for the time."""
    for module in (retry_worker, store_writer, waiting):
        monkeypatch.setattr(module, "time", clock)


def test_a_few_hundred_steps() -> None:
    """What every run checks."""
    run_state_machine_as_test(SenderMachine, settings=QUICK)


def test_an_interrupt_before_the_row_is_there() -> None:
    """A message that was taken back amid its way into the store leaves no row there."""
    machine = SenderMachine()
    machine.begin(fair=True, connected=False)
    message = {"count": 1, "retry": True, "exchange": "x", "cut": ""}
    machine.publish(waits=False, properties=NO_PROPERTIES, seen=False, **message)
    machine.refuse(AuthenticationError)
    machine.publish(waits=True, properties=WIDE, seen=True, **message)  # the window has no room
    machine.interrupt(pick=1, hit=True)
    machine.teardown()
    assert [record.ends for record in machine.producer.records.values()] == [["given back"]] * 2


def stored_and_sent_again(**fields: int) -> SenderMachine:
    """Return a producer whose one message has a row, and is in flight for the second time."""
    machine = SenderMachine()
    machine.begin(fair=False, connected=True, **fields)
    message = {"count": 1, "exchange": "x", "properties": NO_PROPERTIES, "cut": ""}
    machine.publish(retry=True, seen=True, waits=True, **message)
    machine.settle(pick=1, multiple=False, good=False)
    machine.the_retry_thread_works(1000)
    clock.now += SWEEP
    machine.the_retry_thread_works(1)
    machine.the_io_thread_looks(1000)
    return machine


def test_a_put_that_never_answers() -> None:
    """What the store has lost is not forgotten where it is silent about the new row."""
    machine = stored_and_sent_again(durable=True, puts=2)
    machine.rows_are_gone(pick=0, everything=True)
    machine.settle(pick=2, multiple=False, good=False)
    for _ in range(3):
        clock.now += SWEEP
        machine.the_retry_thread_works(1000)
        machine.check()
    assert machine.producer.stuck
    machine.teardown()
    [record] = machine.producer.records.values()
    assert record.ends == ["given back"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_lease_that_runs_out_without_a_retry(waits: bool) -> None:
    """Whose row it is is not known any more: with `retry=False` it is given back, not kept."""
    machine = SenderMachine()
    machine.begin(fair=True, connected=True, durable=True, ahead=True)
    machine.a_lease_runs_out(retry=False, waits=waits)
    machine.check()
    machine.the_retry_thread_works(1000)
    machine.the_io_thread_looks(1000)
    [record] = machine.producer.records.values()
    assert record.ends == ["given back"]
    machine.teardown()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_store_that_is_silent_until_the_end(ahead: bool) -> None:
    """What was raised to its publisher leaves no row, also where no answer is heard any more."""
    machine = SenderMachine()
    machine.begin(fair=False, connected=True, durable=True, ahead=ahead, hurried=True)
    machine.a_lease_runs_out(retry=True, waits=True)
    if not ahead:
        machine.settle(pick=1, multiple=False, good=False)
    machine.the_store_is_late()
    machine.teardown()
    [record] = machine.producer.records.values()
    assert record.ends == ["given back"]
    assert not machine.producer.store.slots()


@pytest.mark.parametrize("durable", [False, True])
def test_a_refusal_that_is_heard_late(durable: bool) -> None:
    """Its publisher has left by then, and the message has got a row: it gets no second one."""
    machine = SenderMachine()
    machine.begin(fair=True, connected=True, durable=durable)
    message = {"count": 1, "exchange": "x", "properties": NO_PROPERTIES, "cut": ""}
    machine.publish(retry=True, seen=True, waits=True, **message)
    machine.the_store(broken=True)
    machine.everyone_expires()
    machine.the_io_thread_looks(1000)
    machine.the_retry_thread_works(1)  # the store refuses it
    machine.the_io_thread_is_silent()
    machine.channel_closed(403)
    machine.the_store(broken=False)
    for _ in range(2):
        machine.the_retry_thread_works(1000)
        clock.now += SWEEP
    assert len(machine.producer.store.slots()) == 1
    machine.the_io_thread_looks(1000)
    machine.the_retry_thread_works(1000)
    machine.check()
    assert len(machine.producer.store.slots()) == 1
    machine.teardown()
    [record] = machine.producer.records.values()
    assert record.ends == ["dead-lettered"]


def test_a_full_window_does_not_wait_for_a_full_store() -> None:
    """Its messages, whose publishers rely on them, wait for room there; its rows go out."""
    machine = SenderMachine()
    machine.begin(fair=True, connected=True, rows=2, threshold=1000)
    message = {"retry": True, "exchange": "x", "properties": NO_PROPERTIES, "cut": ""}
    machine.publish(count=2, seen=True, waits=True, **message)
    machine.settle(pick=2, multiple=True, good=False)
    machine.the_retry_thread_works(1000)
    machine.flow(blocked=True)
    machine.publish(count=6, seen=True, waits=True, **message)
    machine.everyone_expires()
    machine.the_io_thread_looks(1000)
    machine.the_io_thread_is_silent()
    machine.the_retry_thread_works(1000)
    producer = machine.producer
    assert (len(producer.gate), len(producer.retry_worker.stored_rows.rowless)) == (6, 6)
    assert not producer.retry_worker.known  # so that flush() says that something is left
    assert len(producer.store.slots()) == 2
    machine.teardown()
    assert [record.ends for record in producer.records.values()] == [["confirmed"]] * 8


def test_a_row_that_cannot_be_deleted_is_left() -> None:
    """Although the broker has its message, `flush` does not give 0 before the row is gone."""
    machine = stored_and_sent_again()
    machine.the_store_stumbles("done")
    machine.settle(pick=2, multiple=False, good=True)
    machine.the_retry_thread_works(1000)
    machine.check()
    known = [machine.producer.retry_worker.known]
    clock.now += SWEEP
    machine.the_retry_thread_works(1)
    assert [*known, machine.producer.retry_worker.known] == [False, True]
    assert not machine.producer.store.slots()


def in_flight_past_its_lease(*, waits: bool = True) -> SenderMachine:
    """Return a producer whose one message is in flight, and its row another process's that died."""
    machine = SenderMachine()
    machine.begin(fair=True, connected=True, durable=True, ahead=True)
    message = {"count": 1, "exchange": "x", "properties": NO_PROPERTIES, "cut": ""}
    machine.publish(retry=True, seen=True, waits=waits, **message)
    machine.the_retry_thread_works(1000)
    machine.the_io_thread_looks(1000)
    machine.everyone_expires()
    machine.the_io_thread_is_silent()
    clock.now += LEASE
    machine.rows_are_taken_over(due=False)
    return machine


def test_a_letter_that_its_row_was_not_told_of() -> None:
    """Another process had the row by then; when that has died the letter is sent, as a letter."""
    machine = in_flight_past_its_lease()
    machine.channel_closed(403)
    machine.the_other_process("dies")
    machine.the_retry_thread_works(1000)
    machine.the_io_thread_looks(1000)
    [record] = machine.producer.records.values()
    assert (record.sends, record.letters) == (1, 1)
    machine.teardown()
    assert record.ends == ["dead-lettered"]


def test_a_row_that_comes_back_while_its_message_fails() -> None:
    """It is not handed out beside the order that notes the failure, and goes out whole."""
    machine = in_flight_past_its_lease(waits=False)
    machine.the_other_process("dies")
    machine.the_store_is_slow(before=[], after=[], claimed=["the_connection_is_lost"])
    machine.the_retry_thread_works(1000)
    machine.up(room=PLENTY, narrow=False)
    machine.the_io_thread_looks(1000)
    machine.check()
    [record] = machine.producer.records.values()
    assert record.sends == 1, "its retry is due in a second"
    machine.teardown()
    assert (record.sends, record.ends) == (2, ["confirmed"])


def test_a_second_life() -> None:
    """What has ended past its lease is sent once more by the process that claims its row."""
    machine = in_flight_past_its_lease(waits=False)
    machine.settle(pick=1, multiple=False, good=True)
    machine.the_retry_thread_works(1)  # it deletes nothing: the row is another process's
    machine.the_other_process("dies")
    machine.teardown()
    first, second = machine.producer.records.values()
    assert [first.ends, second.ends] == [["confirmed"]] * 2
    assert second.delivery.doubt is Doubt.POSSIBLE, "it is told as a possible duplicate"


BATCH = 25_000
"""Steps for which Hypothesis remembers what it has tried; more would fill the memory."""


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, 60, 100, 200])
def test_a_million_steps(length: int) -> None:
    """What a change of the sender or retry worker should have passed: 250,000 for each length."""
    examples = settings(
        QUICK, max_examples=BATCH // length, stateful_step_count=length, database=None
    )
    taken = 0
    for number in itertools.count():
        before = SenderMachine.steps
        machine = seed(1000 * length + number)(SenderMachine)
        run_state_machine_as_test(machine, settings=examples)
        taken += SenderMachine.steps - before
        if taken >= 250_000:
            return
