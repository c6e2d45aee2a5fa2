"""The courier against a model of broker, store and publishers, in any order of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlproducer.core.breaker import Breaker
from mlproducer.core.courier import Courier
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Loss
from mlproducer.errors import (
    AuthenticationError,
    BufferFullError,
    NotConnectedError,
    PublishError,
)
from mlproducer.message import Envelope
from mlproducer.observe.events import EventSink
from tests.helpers import make_delivery
from tests.pure.fakes import FakeUndertaker

INSIDE = {Place.WAITING, Place.IN_FLIGHT}


class Channel:
    """The broker's side of one channel: its tags, and that nobody is on it twice at a time."""

    def __init__(self, machine: CourierMachine) -> None:
        self._machine = machine
        self.last = 0
        self.open: dict[int, Delivery] = {}
        self.returned: set[int] = set()

    def room(self) -> int:
        """As much as the test gives."""
        return self._machine.room

    def fits(self, envelope: Envelope) -> bool:
        """Everything does."""
        return True

    def carry(self, batch: list[tuple[Envelope, int]]) -> None:
        """Check each message on the wire, while it is ours, against the invariants."""
        for envelope, tag in batch:
            delivery = self._machine.known[envelope.message_id]
            self.last += 1
            assert tag == self.last, "I7: tags count from 1 in the order of writing"
            assert delivery not in self.open.values(), "I11: twice at once on one channel"
            assert delivery not in self._machine.given_back, "I2: sent after it was given back"
            self.open[tag] = delivery
            self._machine.sends[delivery] += 1

    def settle(self, tag: int, *, multiple: bool) -> list[tuple[Delivery, bool]]:
        """Give who was settled, and whether it had been returned."""
        if tag > self.last:
            return []
        tags = [t for t in self.open if t == tag or (multiple and (t < tag or tag == 0))]
        return [(self.open.pop(each), each in self.returned) for each in tags]


class Sink(EventSink):
    """Notes who was confirmed and who was given back, each once."""

    def __init__(self, machine: CourierMachine) -> None:
        self._machine = machine

    def confirmed(self, delivery: Delivery) -> None:
        """Check that the broker has said so."""
        assert delivery in self._machine.acked, "I3: confirmed without an ack, or returned"
        assert delivery not in self._machine.confirmed, "I4: confirmed twice"
        self._machine.confirmed.add(delivery)

    def dead_lettered(self, delivery: Delivery) -> None:
        """Note the end of a message that was ours."""
        assert delivery.kept, "only what is ours is buried"
        self._machine.buried.add(delivery)

    def given_back(self, delivery: Delivery, error: PublishError) -> None:
        """Check that nobody gets a message back that we told him was confirmed."""
        assert delivery not in self._machine.given_back, "I4: given back twice"
        assert error.message_id in (delivery.envelope.message_id, None)
        assert error.possibly_sent or delivery not in self._machine.hidden, "I13: it may be there"
        self._machine.given_back.add(delivery)


class CourierMachine(RuleBasedStateMachine):
    """All that can happen, in any order."""

    durable = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.room = 1 << 20
        self.channel: Channel | None = None
        self.known: dict[str, Delivery] = {}
        self.inside: set[Delivery] = set()
        self.rows: dict[Delivery, bool] = {}  # whether the store has answered
        self.settled_rows: set[Delivery] = set()
        self.sends: Counter[Delivery] = Counter()
        self.hits: Counter[Delivery] = Counter()
        self.acked: set[Delivery] = set()
        self.hidden: set[Delivery] = set()  # written, fate unknown: a queue may hold it
        self.confirmed: set[Delivery] = set()
        self.given_back: set[Delivery] = set()
        self.buried: set[Delivery] = set()
        self.answers: dict[Delivery, object] = {}
        self.courier = Courier(
            1000, Breaker(1000, 30.0, lambda _state: None), self, FakeUndertaker(), self, Sink(self)
        )
        self.up(self.room)

    # --- the keeper's and the door's part ---

    def keep(self, delivery: Delivery, now: float) -> None:
        """Take a message in; the store's answer follows by a rule of its own."""
        assert delivery not in self.settled_rows, "kept after its end"
        self.rows.setdefault(delivery, False)

    def settle(self, delivery: Delivery) -> None:
        """Delete a row, once."""
        assert delivery not in self.settled_rows, "a row is settled exactly once"
        self.settled_rows.add(delivery)

    def leave(self, deliveries: list[Delivery]) -> None:
        """Free slots."""
        self.inside.difference_update(deliveries)

    # --- publishers ---

    @rule(
        count=st.integers(1, 4),
        retry=st.booleans(),
        waits=st.booleans(),
        exchange=st.sampled_from("xy"),
        withdrawn=st.sampled_from([False] * 7 + [True]),
    )
    def accept(self, count: int, retry: bool, waits: bool, exchange: str, withdrawn: bool) -> None:
        """Some publish or submit; now and then they have thought better of it."""
        for _ in range(count):
            delivery = make_delivery(exchange=exchange, retry=retry, answer_deferral=waits)
            self.known[delivery.envelope.message_id] = delivery
            self.inside.add(delivery)
            if withdrawn:
                delivery.answer.cancel()
                self.given_back.add(delivery)
            self.courier.accept(delivery, self.now)
        self.courier.pump(self.now)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """Somebody's time is up."""
        delivery = data.draw(st.sampled_from(list(self.known.values())))
        self.courier.expire(delivery, self.now)
        if not delivery.answer.done() and delivery.answer_deferral:
            assert delivery in self.rows, "who waits is answered, or will be by the store"

    # --- the broker ---

    @precondition(lambda self: self.channel)
    @rule(data=st.data(), multiple=st.booleans(), good=st.booleans())
    def settle_tag(self, data: st.DataObject, multiple: bool, good: bool) -> None:
        """An ack or nack, for an open tag or any other."""
        assert self.channel is not None
        tag = data.draw(st.integers(0, self.channel.last + 1))
        for delivery, returned in self.channel.settle(tag, multiple=multiple):
            self.hits[delivery] += 1
            if not returned:
                (self.acked if good else self.hidden).add(delivery)
        judge = self.courier.acked if good else self.courier.nacked
        judge(tag, self.now, multiple=multiple)
        self.courier.pump(self.now)

    @precondition(lambda self: self.channel and self.channel.open)
    @rule(data=st.data())
    def return_(self, data: st.DataObject) -> None:
        """A message has no queue; its ack or nack comes later."""
        assert self.channel is not None
        tag = data.draw(st.sampled_from(sorted(self.channel.open)))
        self.channel.returned.add(tag)
        self.courier.returned(tag, 312, "NO_ROUTE")

    @rule(blocked=st.sampled_from([False, False, True]))
    def flow(self, blocked: bool) -> None:
        """The alarm comes or goes."""
        self.courier.block(blocked=blocked)
        self.courier.pump(self.now)

    # --- the link ---

    @precondition(lambda self: not self.channel)
    @rule(room=st.sampled_from([1, 10, 1 << 20]))
    def up(self, room: int) -> None:
        """A channel is open."""
        self.room = room
        self.channel = Channel(self)
        self.courier.up(self.channel)
        self.courier.pump(self.now)

    @precondition(lambda self: self.channel)
    @rule(code=st.sampled_from([403, 404, 406]))
    def channel_closed(self, code: int) -> None:
        """The broker closes the channel over a message, and opens the next."""
        self._down(code)
        self.up(self.room)

    @precondition(lambda self: self.channel)
    @rule(code=st.sampled_from([0, 320, 501, 541]))
    def connection_lost(self, code: int) -> None:
        """The connection is gone, and with it the channel and the alarm."""
        self._down(code)
        self.courier.disconnected()

    def _down(self, code: int) -> None:
        assert self.channel is not None
        for tag, delivery in self.channel.open.items():
            self.hits[delivery] += 1
            alone = len(self.channel.open) == 1
            if tag not in self.channel.returned and not (alone and code not in (0, 320)):
                self.hidden.add(delivery)
        self.channel = None
        self.courier.down(Loss("gone", code), self.now)
        self.courier.down(Loss("gone", code), self.now)

    @precondition(lambda self: not self.channel)
    @rule(kind=st.sampled_from([NotConnectedError, AuthenticationError]))
    def refuse(self, kind: type[PublishError]) -> None:
        """An attempt to connect failed."""
        self.courier.refuse(kind("no"), self.now)
        assert self.courier.waiting == 0

    # --- the store ---

    @precondition(lambda self: not all(self.rows.values()))
    @rule(fails=st.sampled_from([False, False, False, True]))
    def store_answers(self, fails: bool) -> None:
        """The store has written a row, or cannot."""
        delivery = next(each for each, stored in self.rows.items() if not stored)
        if fails:
            del self.rows[delivery]
            error = BufferFullError("full", message_id=delivery.envelope.message_id)
            self.courier.not_kept(delivery, error)
        else:
            self.rows[delivery] = True
            self.courier.kept(delivery, self.now, durable=False)

    @precondition(lambda self: self._due())
    @rule()
    def sweep(self) -> None:
        """What is due goes out."""
        for delivery in self._due():
            self.inside.add(delivery)
            self.courier.readmit(delivery, self.now)
        self.courier.pump(self.now)

    def _due(self) -> list[Delivery]:
        stored = [each for each, stored in self.rows.items() if stored]
        return [each for each in stored if each.place is Place.STORED]

    # --- what holds at every step ---

    @invariant()
    def one_place(self) -> None:
        """I1, I6: each message is in exactly one place, and holds a slot only while inside."""
        waiting = Counter([*self.courier._lanes._backlog, *self.courier._lanes.trial.suspects])
        flying = Counter(self.channel.open.values()) if self.channel else Counter()
        for delivery in self.known.values():
            assert waiting[delivery] == (delivery.place is Place.WAITING)
            assert flying[delivery] == (delivery.place is Place.IN_FLIGHT)
            assert (delivery in self.inside) == (delivery.place in INSIDE)
            if delivery.place is Place.STORED:
                assert delivery in self.rows
                assert delivery not in self.settled_rows
        assert self.courier.in_flight == flying.total()
        assert self.courier.waiting == waiting.total()

    @invariant()
    def answers_stand(self) -> None:
        """I4: an answer never changes, and confirmed and given back exclude each other."""
        for delivery in self.known.values():
            if delivery.answer.done() and not delivery.answer.cancelled():
                answer = delivery.answer.exception(0) or delivery.answer.result(0)
                assert self.answers.setdefault(delivery, answer) is answer
            if delivery in self.confirmed and delivery not in self.given_back:
                assert (delivery.fate or delivery.answer).result(0).confirmed

    @invariant()
    def attempts_are_honest(self) -> None:
        """I12, I14: an attempt is a write, and there is none without a reason."""
        for delivery in self.known.values():
            if not delivery.dead:  # a dead letter's own journeys are no attempts
                assert delivery.attempts == self.sends[delivery] <= 1 + self.hits[delivery]

    def teardown(self) -> None:
        """After the end everyone has been told, and nothing is left anywhere."""
        self.channel = None
        self.courier.abandon([d for d in self.rows if d not in self.settled_rows])
        for delivery in self.known.values():
            assert delivery.place is Place.RETIRED
            assert (delivery.fate or delivery.answer).done()
            ends = self.confirmed, self.given_back, self.buried
            assert sum(delivery in end for end in ends) == 1
        assert not self.inside
        assert set(self.rows) <= self.settled_rows


QUICK = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_few_hundred_steps() -> None:
    """What every run checks."""
    run_state_machine_as_test(CourierMachine, settings=QUICK)


@pytest.mark.slow
def test_a_hundred_thousand_steps() -> None:
    """What a change of the courier should have passed."""
    long = settings(QUICK, max_examples=2000, stateful_step_count=50)
    run_state_machine_as_test(CourierMachine, settings=long)
