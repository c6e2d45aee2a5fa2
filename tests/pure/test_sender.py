"""The life of deliveries: what the sender makes of each thing that can happen."""

from __future__ import annotations

import pytest

from mlproducer import Outcome
from mlproducer._core.delivery import Doubt
from mlproducer._core.delivery_states import AttemptState, RowState
from mlproducer.errors import (
    BrokerBlockedError,
    ConfirmTimeoutError,
    NackError,
    NotConnectedError,
    UnroutableError,
)
from tests.helpers import make_delivery
from tests.pure.fakes import PLENTY, FakeChannel, World, error_of, receipt_of


@pytest.fixture
def world() -> World:
    """A sender with an open channel."""
    world = World()
    world.up()
    return world


# --- the broker's answers ----------------------------------------------------------------------


def test_confirm(world: World) -> None:
    """An ack makes a receipt, lets the next one in, and needs no retry worker."""
    [delivery] = world.send("a")
    assert world.channel.written == [("a", 1)]
    assert not delivery.waiter.done()
    world.now = 0.25
    world.ack(1)
    receipt = receipt_of(delivery)
    assert (receipt.message_id, receipt.outcome) == ("a", Outcome.CONFIRMED)
    assert (receipt.attempts, receipt.elapsed, receipt.reason) == (1, 0.25, None)
    assert receipt.durable
    assert delivery.attempt is AttemptState.CONFIRMED
    assert world.window.left == [delivery]
    assert world.retry_worker.settled == []
    assert world.events.log == [("confirmed", "a")]


def test_multiple(world: World) -> None:
    """One ack settles all up to its tag and nothing beyond."""
    deliveries = world.send("a", "b", "c")
    world.ack(2, multiple=True)
    assert [delivery.waiter.done() for delivery in deliveries] == [True, True, False]
    assert world.sender.in_flight == 1


def test_nack_with_retry(world: World) -> None:
    """A nacked message is stored first, and only then is its publisher told so."""
    [delivery] = world.send("a")
    world.nack(1)
    assert not delivery.waiter.done()
    assert list(world.retry_worker.rows) == [delivery]
    world.store(delivery)
    receipt = receipt_of(delivery)
    assert receipt.outcome is Outcome.DEFERRED
    assert isinstance(receipt.reason, NackError)
    assert receipt.reason.possibly_sent
    assert not receipt.durable
    assert world.window.left == [delivery]


def test_nack_without_retry(world: World) -> None:
    """A message that is not to be retried is its publisher's again, and never sent."""
    [delivery] = world.send("a", retry=False)
    world.nack(1)
    error = error_of(delivery)
    assert isinstance(error, NackError)
    assert (error.message_id, error.attempts, error.possibly_sent) == ("a", 1, True)
    world.down()
    world.up()
    assert world.channel.written == []
    assert world.retry_worker.rows == {}


@pytest.mark.parametrize("answer", ["ack", "nack"])
def test_return_then_answer(world: World, answer: str) -> None:
    """What was returned is unroutable, however the broker settles its tag, and was not queued."""
    [delivery, other] = world.send("a", "b", retry=False)
    world.sender.returned(1, 312, "NO_ROUTE")
    assert not delivery.waiter.done()
    getattr(world, answer)(1)
    error = error_of(delivery)
    assert isinstance(error, UnroutableError)
    assert (error.reply_code, error.reply_text) == (312, "NO_ROUTE")
    assert not error.possibly_sent
    world.ack(2)
    assert receipt_of(other).confirmed


def test_a_return_is_forgotten_with_its_attempt(world: World) -> None:
    """The next attempt of a returned message can be confirmed."""
    [delivery] = world.send("a")
    world.sender.returned(1, 312, "NO_ROUTE")
    world.ack(1)
    world.store(delivery)
    world.retry(delivery)
    world.ack(2)
    assert receipt_of(delivery).confirmed
    assert world.events.log[-1] == ("confirmed", "a")
    assert ("possible duplicate", "a") not in world.events.log


@pytest.mark.parametrize("tag", [2, 77])
@pytest.mark.parametrize("multiple", [True, False])
def test_tags_that_are_not_open_settle_nothing(world: World, tag: int, multiple: bool) -> None:
    """Unknown and future tags are reported as strays."""
    [delivery] = world.send("a")
    world.ack(tag, multiple=multiple)
    world.nack(tag, multiple=multiple)
    world.sender.returned(tag, 312, "NO_ROUTE")
    assert not delivery.waiter.done()
    assert world.events.strays == [tag, tag]
    world.ack(1)
    assert receipt_of(delivery).confirmed
    world.nack(1)
    assert world.events.strays == [tag, tag, 1]
    assert receipt_of(delivery).confirmed


def test_confirms_that_come_together(world: World) -> None:
    """They are settled in their order, each once; what settles nothing among them is told."""
    some = world.send("a", "b", "c", "d")
    world.sender.acked([(3, False), (9, False), (2, True), (1, False)], world.now)
    confirmed = [("confirmed", name) for name in ("c", "a", "b")]
    assert (world.events.log, world.events.strays) == (confirmed, [9, 1])
    assert world.window.left == [some[2], some[0], some[1]]
    world.sender.nacked([(4, False), (4, False)], world.now)
    assert world.events.log[len(confirmed) :] == [("NackError", "d")]
    assert world.events.strays == [9, 1, 4]


# --- the publisher's time is up ----------------------------------------------------------------


def test_expire_in_flight_then_late_ack(world: World) -> None:
    """A late ack confirms the receipt and settles the row once; nothing is sent again."""
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    world.store(delivery)
    receipt = receipt_of(delivery)
    assert receipt.outcome is Outcome.DEFERRED
    assert isinstance(receipt.reason, ConfirmTimeoutError)
    assert receipt.reason.possibly_sent
    assert delivery.attempt is AttemptState.LATE
    assert world.window.left == []
    world.ack(1)
    assert receipt.confirmed
    assert receipt.result(0).confirmed
    assert world.retry_worker.settled == [delivery]
    assert world.window.left == [delivery]
    world.sender.expire(delivery, 6.0)
    world.ack(1)
    assert world.retry_worker.settled == [delivery]
    assert world.channel.written == [("a", 1)]


def test_late_ack_before_the_row_is_written(world: World) -> None:
    """Where the ack overtakes the store, the publisher hears CONFIRMED, once."""
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    world.ack(1)
    assert receipt_of(delivery).confirmed
    world.store(delivery)
    assert set(world.retry_worker.settled) == {delivery}
    assert ("deferred", "a") not in world.events.log


def test_expire_in_flight_without_retry(world: World) -> None:
    """The message is its publisher's again, and a late confirm changes no answer."""
    [delivery] = world.send("a", retry=False)
    world.sender.expire(delivery, 5.0)
    error = error_of(delivery)
    assert isinstance(error, ConfirmTimeoutError)
    assert isinstance(error, TimeoutError)
    assert (error.attempts, error.possibly_sent) == (1, True)
    assert world.window.left == []
    world.nack(1)
    assert error_of(delivery) is error
    assert world.window.left == [delivery]
    assert delivery.attempt is AttemptState.RETIRED
    assert world.retry_worker.rows == {}


def test_expire_is_sent_again_only_after_a_loss(world: World) -> None:
    """What was unconfirmed when its channel was lost goes out again, a possible duplicate."""
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    world.store(delivery)
    world.down()
    assert delivery.attempt is AttemptState.SCHEDULED
    world.up()
    assert world.channel.written == []
    world.retry(delivery)
    assert world.channel.written == [("a", 1)]
    assert ("possible duplicate", "a") in world.events.log
    world.ack(1)
    assert receipt_of(delivery).confirmed


@pytest.mark.parametrize("kind", [NotConnectedError, BrokerBlockedError, ConfirmTimeoutError])
def test_expire_while_waiting(kind: type[Exception]) -> None:
    """What was never written says why, was not sent, and counts no attempt."""
    world = World()
    if kind is BrokerBlockedError:
        world.up()
        world.sender.block(blocked=True)
    elif kind is ConfirmTimeoutError:
        world.up(FakeChannel(room=0))
    [kept] = world.send("a")
    [given] = world.send("b", retry=False)
    for delivery in (kept, given):
        world.sender.expire(delivery, 5.0)
    world.store(kept)
    reason = receipt_of(kept).reason
    for error in (reason, error_of(given)):
        assert type(error) is kind
        assert (error.attempts, error.possibly_sent) == (0, False)
    assert world.sender.waiting == 0
    assert set(world.window.left) == {kept, given}


def test_turned_away_by_a_full_window(world: World) -> None:
    """A message for which there was no room is judged like one that waited."""
    delivery = make_delivery("a", retry=False)
    world.sender.turn_away(delivery, 5.0)
    assert isinstance(error_of(delivery), ConfirmTimeoutError)
    assert not error_of(delivery).possibly_sent
    withdrawn = make_delivery("b")
    withdrawn.waiter.cancel()
    world.sender.turn_away(withdrawn, 5.0)
    assert world.retry_worker.rows == {}


def test_submit_waits_for_the_fate(world: World) -> None:
    """A publisher that wants the fate is not told of a deferral, and its time is never up."""
    delivery = make_delivery("a", answers_deferral=False)
    world.sender.accept([delivery], 0.0)
    world.sender.pump(0.0)
    world.sender.expire(delivery, 5.0)
    world.nack(1)
    world.store(delivery)
    assert not delivery.waiter.done()
    world.retry(delivery)
    world.ack(2)
    assert receipt_of(delivery).confirmed
    assert receipt_of(delivery).attempts == 2


def test_not_sent_after_its_lease(world: World) -> None:
    """A process that was frozen sends nothing that another may have taken over by now (I21)."""
    world.channel.room_left = 0
    delivery = make_delivery("a")
    delivery.row = RowState.HELD
    delivery.leased_until = 5.0
    world.retry_worker.rows[delivery] = 0
    world.sender.readmit(delivery, 1.0)
    world.channel.room_left = PLENTY
    world.sender.pump(5.1)
    assert world.channel.written == []
    assert delivery.attempt is AttemptState.SCHEDULED
    assert world.window.left == [delivery]
    assert delivery.doubt is Doubt.POSSIBLE


@pytest.mark.parametrize("good", [True, False])
def test_what_waits_to_be_written_is_told(world: World, good: bool) -> None:
    """Also that a suspect does: the I/O thread writes on then, and else not."""
    settle = world.sender.acked if good else world.sender.nacked
    world.send("a")
    assert not settle([(1, False)], 0.0)
    world.channel.room_left = 1
    world.send("b", "c", "c2")
    assert settle([(2, False)], 0.0)
    assert world.sender.pump(0.0), "there was room for one"
    world.channel.room_left = PLENTY
    assert not world.sender.pump(0.0)
    assert not world.sender.pump(0.0), "there is nothing"
    world.send("d")
    world.down(403)
    world.up()
    assert world.sender.pump(0.0), "one suspect at a time"
    world.channel.room_left = 0
    assert settle([(1, False)], 0.0)
