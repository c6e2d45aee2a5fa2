"""A channel that the broker closes over one bad message, among many good ones."""

from __future__ import annotations

import pytest

from mlproducer._core.delivery import NO_WAITER, Delivery
from mlproducer._core.delivery_states import AttemptState, RowState
from mlproducer.errors import (
    BrokerRejectedError,
    BufferFullError,
    ConfirmTimeoutError,
    NotConnectedError,
    RetriesExhaustedError,
)
from mlproducer.message import Outcome
from tests.pure.fakes import World, error_of, receipt_of

GOOD = [f"g{number}" for number in range(5)]


def close_over(world: World, code: int = 406, text: str = "PRECONDITION_FAILED") -> None:
    """Close the channel and open the next one, as a broker does."""
    world.down(code, text)
    world.up()


def is_settled(delivery: Delivery) -> bool:
    """Whether its publisher has an answer."""
    return delivery.waiter.done()


@pytest.fixture
def world() -> World:
    """A sender with an open channel."""
    world = World()
    world.up()
    return world


@pytest.mark.parametrize("retry", [True, False])
def test_alone_is_guilty(world: World, retry: bool) -> None:
    """A message that is alone on the channel when it closes is rejected at once."""
    [delivery] = world.send("bad", retry=retry)
    close_over(world, 404, "NOT_FOUND - no exchange 'x' in vhost '/'")
    error = error_of(delivery)
    assert isinstance(error, BrokerRejectedError)
    assert (error.reply_code, error.reply_text) == (404, "NOT_FOUND - no exchange 'x' in vhost '/'")
    assert (error.attempts, error.possibly_sent) == (1, False)
    assert world.retry_worker.rows == {}


@pytest.mark.parametrize("code", [403, 404, 406, 501, 541])
def test_only_the_guilty_is_rejected(world: World, code: int) -> None:
    """Suspects go out one at a time until the channel closes again; then the others are free."""
    good = world.send(*GOOD[:2], retry=False)
    [bad] = world.send("bad", exchange="other", retry=False)
    good += world.send(*GOOD[2:], retry=False)
    close_over(world, code)
    assert not any(map(is_settled, [*good, bad]))
    assert world.channel.written == [("g0", 1)]
    world.ack(1)
    world.ack(2)
    assert world.channel.written == [("g0", 1), ("g1", 2), ("bad", 3)]
    close_over(world, code)
    assert isinstance(error_of(bad), BrokerRejectedError)
    assert world.channel.written == [("g2", 1), ("g3", 2), ("g4", 3)]
    world.ack(3, multiple=True)
    assert all(receipt_of(delivery).confirmed for delivery in good)
    duplicates = [name for event, name in world.events.log if event == "possible duplicate"]
    assert duplicates == ["g0", "g1", "bad", "g2", "g3", "g4"]


def test_what_others_are_guilty_of_uses_up_no_retry() -> None:
    """However often a channel was closed over others, a message is tried again as often as any."""
    world = World(max_retries=1)
    world.up()
    for number in range(5):
        world.send(f"bad {number}", exchange=f"missing {number}")
    [good] = world.send("good")
    for _ in range(5):
        close_over(world, 404)  # under all
        close_over(world, 404)  # under the first alone, which is guilty
    assert (good.attempts, good.attempt) == (6, AttemptState.IN_FLIGHT)
    world.down(320)
    world.store(good)
    assert receipt_of(good).outcome is Outcome.DEFERRED
    assert not good.dead


@pytest.mark.parametrize(("first", "possibly_sent"), [(406, False), (501, True)])
def test_a_guilty_suspect_was_never_routed(world: World, first: int, possibly_sent: bool) -> None:
    """Also where its first attempt went down with a channel that another closed.

    Where a connection was lost under it, that attempt may have been routed.
    """
    [other, bad] = world.send("other", "bad", retry=False)
    close_over(world, first)
    world.ack(1)
    assert receipt_of(other).confirmed
    close_over(world, 406)
    assert (error_of(bad).attempts, error_of(bad).possibly_sent) == (2, possibly_sent)


@pytest.mark.parametrize(("code", "elsewhere"), [(404, "x"), (403, "x"), (404, "y"), (403, "y")])
def test_a_suspect_whose_route_was_there(world: World, code: int, elsewhere: str) -> None:
    """It was taken away under messages that were routed, whose confirms never came."""
    world.send("before")
    world.ack(1)
    suspects = world.send("a", "b", retry=False, exchange=elsewhere)
    close_over(world, code)  # under both
    close_over(world, code)  # under the first, which answers for the other
    for each in suspects:
        assert isinstance(error_of(each), BrokerRejectedError)
        assert error_of(each).possibly_sent is (elsewhere == "x")


@pytest.mark.parametrize(("code", "possibly_sent"), [(404, False), (501, False), (541, True)])
def test_what_the_broker_fails_over_may_be_routed(
    world: World, code: int, possibly_sent: bool
) -> None:
    """A frame that it does not take is not; an internal error may come after that."""
    [alone] = world.send("alone")
    world.down(code)
    assert isinstance(error_of(alone), BrokerRejectedError)
    assert error_of(alone).possibly_sent is possibly_sent


def test_a_doubt_outlives_a_later_poison(world: World) -> None:
    """What went down with a connection may be there, also if a channel is closed over it later."""
    world.send("bad", exchange="missing")
    [delivery] = world.send("a")
    close_over(world, 501)  # the connection, under both
    close_over(world, 404)  # "bad" was alone
    world.send("b")
    close_over(world, 406)  # under "a" and "b"
    close_over(world, 406)  # "a" was alone
    assert error_of(delivery).possibly_sent


def test_what_was_raised_is_no_suspect(world: World) -> None:
    """Its publisher has left, and does not want it sent again."""
    [delivery, _] = world.send("a", "b", retry=False)
    delivery.recall()
    delivery.stop_waiting(NO_WAITER)
    world.down(406)
    assert world.up().written == [("b", 1)]
    assert not delivery.open


def test_later_messages_wait_for_the_poison(world: World) -> None:
    """While suspects are tried no other message is written, or it would be a suspect too."""
    world.send("a", "b")
    close_over(world)
    [late] = world.send("late")
    assert world.channel.written == [("a", 1)]
    world.ack(1)
    world.ack(2)
    assert world.channel.written == [("a", 1), ("b", 2), ("late", 3)]
    world.ack(3)
    assert receipt_of(late).confirmed


def test_a_missing_exchange_is_missing_for_all(world: World) -> None:
    """With the guilty one all suspects of its exchange are rejected, and no other."""
    bad = world.send("bad1", "bad2", "bad3", exchange="gone")
    good = world.send("g0", "g1")
    text = "NOT_FOUND - no exchange 'gone' in vhost '/'"
    close_over(world, 404, text)
    close_over(world, 404, text)
    assert all(isinstance(error_of(delivery), BrokerRejectedError) for delivery in bad)
    assert world.channel.written == [("g0", 1), ("g1", 2)]
    world.ack(2, multiple=True)
    assert all(receipt_of(delivery).confirmed for delivery in good)


def test_guilty_after_its_publisher_has_gone(world: World) -> None:
    """A deferred message that turns out guilty is ours to bury: its receipt says so."""
    [delivery] = world.send("bad")
    world.sender.expire(delivery, 5.0)
    world.store(delivery)
    receipt = receipt_of(delivery)
    close_over(world, 406)
    assert delivery.attempt is AttemptState.SCHEDULED
    world.retry(delivery)
    world.ack(1)
    with pytest.raises(RetriesExhaustedError) as caught:
        receipt.result(0)
    assert isinstance(caught.value.reason, BrokerRejectedError)
    assert world.retry_worker.settled == [delivery]


def test_time_runs_out_during_the_poison(world: World) -> None:
    """A suspect whose publisher's time is up leaves the trial for the store."""
    [first, second] = world.send("a", "b")
    close_over(world)
    world.sender.expire(second, 5.0)
    world.store(second)
    reason = receipt_of(second).reason
    assert reason is not None
    assert reason.possibly_sent  # it was written once, before the channel closed
    world.ack(1)
    assert world.sender.waiting == 0
    assert receipt_of(first).confirmed


def test_connection_lost_during_the_poison(world: World) -> None:
    """A loss of the other kind accuses no message: the rest of the trial goes on afterwards."""
    [first, second] = world.send("a", "b")
    close_over(world)
    world.down()
    world.store(first)
    assert not receipt_of(first).confirmed
    world.up()
    assert world.channel.written == [("b", 1)]
    world.ack(1)
    assert receipt_of(second).confirmed


def test_nobody_is_left_in_a_poison_without_a_connection(world: World) -> None:
    """When no connection comes, suspects are failed like all that waits, and may have been sent."""
    deliveries = world.send("a", "b", retry=False)
    world.down(541, "INTERNAL_ERROR")
    world.sender.refuse(NotConnectedError("not connected"), 1.0)
    for delivery in deliveries:
        assert isinstance(error_of(delivery), NotConnectedError)
        assert error_of(delivery).possibly_sent


def test_given_back_is_no_suspect(world: World) -> None:
    """What was raised to its publisher is never sent again, not even to find who is guilty."""
    [given, other] = world.send("a", "b", retry=False)
    world.sender.expire(given, 5.0)
    assert error_of(given).possibly_sent
    close_over(world)
    assert world.channel.written == [("b", 1)]
    assert world.window.left == [given]
    world.ack(1)
    assert receipt_of(other).confirmed


def test_not_kept_is_no_suspect(world: World) -> None:
    """A suspect that the store could not take goes back to its publisher, and out of the trial."""
    [given, other] = world.send("a", "b")
    world.sender.expire(given, 5.0)
    world.down(406)
    world.sender.not_stored(given, BufferFullError("full"), 5.0)
    assert error_of(given).possibly_sent
    assert world.up().written == [("b", 1)]
    world.ack(1)
    assert receipt_of(other).confirmed


def test_going_back_is_no_suspect(world: World) -> None:
    """One whose row is being deleted, since it goes back, is not sent again, and has no slot."""
    world.retry_worker.durable = True
    late, other = world.send("late", "other", retry=False)
    late.row = RowState.AHEAD  # ahead of its first attempt
    world.sender.expire(late, world.now)
    assert world.retry_worker.withdrawn == [late]
    assert not is_settled(late)
    close_over(world, 404)
    assert world.channel.written == [("other", 1)]
    assert world.window.left == [late]
    world.sender.withdrawn([late], world.now, gone=True)
    assert late.attempt is AttemptState.RETIRED
    assert isinstance(error_of(late), ConfirmTimeoutError)
    world.ack(1)
    assert receipt_of(other).confirmed
