"""The sender when the connection goes, when the store fails, and at the end."""

from __future__ import annotations

import pytest

from mlproducer._core import sender
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_states import AnswerState, AttemptState, RowState
from mlproducer.errors import (
    AuthenticationError,
    BrokerRejectedError,
    BufferFullError,
    ConnectionLostError,
    MessageTooLargeError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    StoreError,
    UnroutableError,
)
from mlproducer.message import Envelope, Fate
from tests.helpers import make_delivery
from tests.pure.fakes import FakeChannel, World, error_of, receipt_of


@pytest.fixture
def world() -> World:
    """A sender with an open channel."""
    world = World()
    world.up()
    return world


# --- losses ------------------------------------------------------------------------------------


def test_loss(world: World) -> None:
    """What was written is possibly sent, what was not stays and goes out on the next channel."""
    world.channel.room_left = 1
    [written, unwritten] = world.send("a", "b")
    world.channel.room_left = 0
    world.down()
    world.down()
    world.store(written)
    reason = receipt_of(written).reason
    assert isinstance(reason, ConnectionLostError)
    assert (reason.attempts, reason.possibly_sent) == (1, True)
    assert not unwritten.waiter.done()
    assert world.up().written == [("b", 1)]
    assert [name for event, name in world.events.log if event == "ConnectionLostError"] == ["a"]


def test_tags_of_a_lost_channel_are_dead(world: World) -> None:
    """A new channel counts from 1; an old tag in mind settles nothing of it."""
    world.send("a", "b")
    world.down()
    world.up()
    world.send("c")
    assert world.channel.written == [("c", 1)]
    world.ack(2)
    assert world.events.strays == [2]


def test_returned_then_lost(world: World) -> None:
    """A return is known to be unroutable even if the ack never came."""
    [delivery] = world.send("a", retry=False)
    world.sender.returned(1, 312, "NO_ROUTE")
    world.down()
    assert isinstance(error_of(delivery), UnroutableError)
    assert not error_of(delivery).possibly_sent


@pytest.mark.parametrize("retry", [True, False])
def test_no_connection(retry: bool) -> None:
    """Once an attempt has failed no message waits: neither one that is there nor one that comes."""
    world = World()
    [early] = world.send("a", retry=retry)
    world.sender.refuse(NotConnectedError("not connected: refused"), 0.1)
    [late] = world.send("b", retry=retry)
    for delivery in (early, late):
        if retry:
            world.store(delivery)
            error = receipt_of(delivery).reason
        else:
            error = error_of(delivery)
        assert isinstance(error, NotConnectedError)
        assert (error.message_id, error.attempts) == (delivery.envelope.message_id, 0)
        assert not error.possibly_sent
    assert world.sender.waiting == 0


def test_refused_credentials() -> None:
    """They are raised to publishers, each its own; an owned message stays until they are right."""
    world = World()
    world.up()
    [owned] = world.send("owned")
    world.nack(1)
    world.store(owned)
    world.down()
    world.sender.refuse(AuthenticationError("refused by the broker: 403"), 1.0)
    [one, two] = world.send("a", "b")
    assert isinstance(error_of(one), AuthenticationError)
    assert error_of(one) is not error_of(two)
    assert not error_of(one).possibly_sent
    world.retry(owned)
    assert owned.attempt is AttemptState.SCHEDULED
    assert not receipt_of(owned).confirmed
    world.up()
    world.retry(owned)
    world.ack(1)
    assert receipt_of(owned).confirmed


def test_refused_credentials_and_a_durable_store() -> None:
    """They may be wrong for long: what such a store holds waits until they are right."""
    world = World()
    world.retry_worker.durable = True
    world.sender.refuse(AuthenticationError("refused by the broker: 403"), 1.0)
    [kept] = world.send("a")
    [given] = world.send("b", retry=False)
    assert isinstance(error_of(given), AuthenticationError)
    world.store(kept)
    assert isinstance(receipt_of(kept).reason, AuthenticationError)


def return_(world: World, tag: int) -> None:
    """Send a message back, as a broker does: a return, then the ack."""
    world.sender.returned(tag, 312, "NO_ROUTE")
    world.ack(tag)


def test_a_route_that_was_there_comes_back() -> None:
    """A message that is returned from it waits, however often; another one is buried (312)."""
    world = World(max_retries=1)
    world.up()
    world.send("known")
    world.ack(1)
    [waits] = world.send("waits")
    [lost] = world.send("lost", exchange="y")
    for tag in (2, 3):
        return_(world, tag)
    for delivery in (waits, lost):
        world.store(delivery)
    for attempt in range(2, 6):
        channel = world.up()
        world.retry(waits)
        if not lost.dead:
            world.retry(lost)
        for _, tag in list(channel.written):
            return_(world, tag)
        assert (waits.dead, lost.dead) == (False, True)
        assert waits.attempts == attempt
    world.up()
    world.retry(waits)
    world.nack(world.channel.written[-1][1])
    assert not waits.dead, "what was returned used up none of its retries"
    assert waits.attempt is AttemptState.SCHEDULED


def test_returned_in_another_life() -> None:
    """What was waiting for its route, as its row says, goes on waiting."""
    world = World(max_retries=1)
    world.up()
    [delivery] = world.send("a")
    delivery.attempts, delivery.unrouted, delivery.row = 7, 6, RowState.HELD
    world.retry_worker.rows[delivery] = 7
    return_(world, 1)
    assert not delivery.dead
    assert delivery.attempt is AttemptState.SCHEDULED


def test_a_route_that_never_was_does_not_come_back() -> None:
    """Too many attempts do not show that it was there; and others do not wait for it either.

    There are too many where the last attempt was under way at the end of another process, or where
    that one permitted more.
    """
    world = World(max_retries=1)
    world.up()
    [delivery, other] = world.send("a", "b")
    for each, attempts in ((delivery, 7), (other, 2)):
        each.attempts, each.row = attempts, RowState.HELD
        world.retry_worker.rows[each] = attempts
    return_(world, 1)
    return_(world, 2)
    assert (delivery.dead, other.dead) == (True, True)


def test_routes_that_are_remembered_have_a_limit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many, and no more (I25)."""
    monkeypatch.setattr(sender, "MAX_ROUTES", 2)
    for exchange in "xyz":
        world.send("a", exchange=exchange)
        world.ack(len(world.channel.written))
    assert world.sender.failures.routes == {("x", "k"), ("y", "k")}


def test_interrupted_after_it_was_promised(world: World) -> None:
    """An interrupt of publish_many comes too late for what has its answer: that is delivered."""
    [delivery] = world.send("a")
    world.nack(1)
    world.store(delivery)
    delivery.recall()
    world.retry(delivery)
    world.ack(2)
    assert receipt_of(delivery).confirmed


def test_blocked_then_unblocked(world: World) -> None:
    """While the broker blocks nothing is written; then all goes out in order."""
    [first] = world.send("a")
    world.sender.block(blocked=True)
    assert not world.sender.able
    world.send("b", "c")
    assert world.channel.written == [("a", 1)]
    world.ack(1)
    assert receipt_of(first).confirmed
    world.sender.block(blocked=True)
    world.sender.block(blocked=False)
    world.sender.block(blocked=False)
    world.sender.pump(1.0)
    assert world.channel.written == [("a", 1), ("b", 2), ("c", 3)]


def test_a_new_connection_is_not_blocked(world: World) -> None:
    """The alarm's word ends with the connection on which it came."""
    world.sender.block(blocked=True)
    world.send("a")
    world.down()
    world.sender.disconnected()
    assert world.up().written == [("a", 1)]


# --- withdrawn, too large, stores that fail, the end -------------------------------------------


def test_withdrawn_is_never_sent(world: World) -> None:
    """A future that was cancelled before the hand-over takes its message along."""
    delivery = make_delivery("a")
    assert delivery.waiter.cancel()
    world.sender.accept([delivery], 0.0)
    world.sender.pump(0.0)
    assert world.channel.written == []
    assert world.window.left == [delivery]
    assert delivery.attempt is AttemptState.RETIRED


@pytest.mark.parametrize("row", [RowState.NONE, RowState.AHEAD])
def test_withdrawn_in_the_mailbox(world: World, row: RowState) -> None:
    """It has no slot any more, and no row."""
    delivery = make_delivery("a")
    delivery.row = row
    assert delivery.withdraw()
    world.sender.accept([delivery], 0.0)
    world.sender.pump(0.0)
    assert world.channel.written == []
    assert world.window.left == [delivery]
    assert delivery.attempt is AttemptState.RETIRED
    assert world.retry_worker.settled == ([] if row is RowState.NONE else [delivery])


def test_accepted_cannot_be_withdrawn(world: World) -> None:
    """Once the sender has it, it is too late to cancel."""
    [delivery] = world.send("a")
    assert not delivery.waiter.cancel()
    world.ack(1)
    assert receipt_of(delivery).confirmed


def test_headers_over_the_frame() -> None:
    """A header that the negotiated frame cannot hold is given back; the next one goes."""
    world = World()
    world.up(FakeChannel(longest_properties=1))
    [delivery] = world.send("a")
    error = error_of(delivery)
    assert isinstance(error, MessageTooLargeError)
    assert (error.attempts, error.possibly_sent) == (0, False)
    world.channel.longest_properties = 2
    world.send("b")
    assert world.channel.written == [("b", 1)]


def test_a_letter_over_the_frame_of_the_next_broker() -> None:
    """It stays where it is, and an operator is told so."""
    world = World(max_retries=0)
    world.up()
    [delivery] = world.send("a")
    world.nack(1)
    world.sender.stored([delivery], world.now)
    assert delivery.dead
    world.down()
    world.up(FakeChannel(longest_properties=1))
    world.sender.readmit(delivery, world.now)
    world.sender.pump(world.now)
    assert world.channel.written == []
    assert world.events.log[-1] == ("letter kept", "a")
    assert delivery.attempt is AttemptState.SCHEDULED


@pytest.mark.parametrize("error", [BufferFullError("full"), StoreError("locked")])
def test_store_fails(world: World, error: Exception) -> None:
    """What could not be stored is its publisher's again, and is not sent later."""
    [delivery] = world.send("a")
    world.nack(1)
    world.sender.not_stored(delivery, error, 0.0)  # type: ignore[arg-type]
    assert error_of(delivery) is error
    assert error_of(delivery).possibly_sent
    assert delivery.attempt is AttemptState.RETIRED
    assert world.window.left == [delivery]


def test_stored_after_it_was_refused(world: World) -> None:
    """Its publisher has got it back: the row that is there after all is deleted."""
    [delivery] = world.send("a")
    world.nack(1)
    world.sender.not_stored(delivery, StoreError("locked"), 0.0)
    assert world.retry_worker.settled == []
    world.sender.stored([delivery], 1.0)
    assert world.retry_worker.settled == [delivery]


def test_the_store_does_not_answer_before_the_first_attempt(world: World) -> None:
    """What was to be stored before it is sent goes back when its time is up, not sent."""
    delivery = make_delivery("a")
    world.sender.expire(delivery, 5.0)
    error = error_of(delivery)
    assert isinstance(error, StoreError)
    assert "not answered in time" in str(error)
    assert not error.possibly_sent


@pytest.mark.parametrize("gone", [True, False])
def test_given_back_while_it_is_being_stored(world: World, gone: bool) -> None:
    """Its row comes too late for a promise; the error is told once the row is gone again.

    If it is another process's by then, that one may send it.
    """
    world.retry_worker.durable = True
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    delivery.retry = False  # its publisher was interrupted
    world.down(403, "refused")
    assert world.retry_worker.withdrawn == [delivery]
    world.sender.stored([delivery], 5.0)
    assert not delivery.waiter.done()
    world.sender.withdrawn([delivery], 5.0, gone=gone)
    assert isinstance(error_of(delivery), BrokerRejectedError)
    assert error_of(delivery).possibly_sent != gone
    assert delivery.row is (RowState.GONE if gone else RowState.DELETING)


def test_interrupted_while_it_is_being_stored(world: World) -> None:
    """Its row comes too late, and is deleted; a store in memory is not waited for."""
    [delivery] = world.send("a")
    world.nack(1)
    delivery.recall()
    world.store(delivery)
    assert world.retry_worker.settled == [delivery]
    assert isinstance(error_of(delivery), NackError)
    assert delivery.row is RowState.DELETING


def test_store_fails_for_what_is_in_flight(world: World) -> None:
    """The tag stays open, but the message is not ours any more."""
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    world.sender.not_stored(delivery, StoreError("locked"), 5.0)
    assert error_of(delivery).possibly_sent
    world.down()
    assert delivery.attempt is AttemptState.RETIRED
    assert world.up().written == []
    assert world.window.left == [delivery]


@pytest.mark.parametrize("buried", [False, True])
def test_the_store_refuses_what_its_publisher_relies_on(buried: bool) -> None:
    """It stays ours: dead-lettered once where its last attempt is over, else sent again."""
    world = World(max_retries=0)
    world.up()
    [delivery, _] = world.send("a", "b")
    if buried:
        world.nack(1)
    else:
        world.sender.expire(delivery, 5.0)
        world.down(403)  # both of them are suspects
    delivery.stop_waiting(heir := Fate())
    world.retry_worker.rows.clear()
    world.sender.not_stored(delivery, StoreError("locked"), 5.0)
    assert list(world.retry_worker.rows) == [delivery]
    exchange = "dead" if buried else "x"
    assert (delivery.envelope.exchange, delivery.attempt) == (exchange, AttemptState.SCHEDULED)
    assert world.sender.waiting == (0 if buried else 1)
    assert not heir.done()


def test_the_store_is_silent_about_what_its_publisher_relies_on(world: World) -> None:
    """It is not stored twice, and its fate is told."""
    [delivery] = world.send("a")
    world.nack(1)
    delivery.stop_waiting(heir := Fate())
    world.sender.store_is_late(delivery, 5.2)
    assert delivery.attempt is AttemptState.SCHEDULED
    world.store(delivery)
    world.retry(delivery)
    world.ack(2)
    assert heir.result(0).confirmed
    assert world.retry_worker.rows == {}


class Leaving(Delivery):
    """One whose publisher leaves at the very moment at which it is decided what it is told."""

    __slots__ = ()

    def may_fail(self) -> bool:
        """Have it leave first."""
        if not self.relied_on:
            self.stop_waiting(Fate())
        return super().may_fail()


@pytest.mark.parametrize("suspect", [False, True])
def test_its_publisher_leaves_while_the_store_is_silent(world: World, suspect: bool) -> None:
    """The order to store it stands: a second one would make a second row, which is sent, too."""
    [delivery, _] = world.send("a", "b")
    if suspect:
        world.sender.expire(delivery, 5.0)
        world.down(403)
    else:
        world.nack(1)
    delivery.__class__ = Leaving
    world.sender.store_is_late(delivery, 5.2)  # FakeRetryWorker would notice a second order
    heir = delivery.successor
    assert isinstance(heir, Fate)
    world.store(delivery)
    if suspect:
        world.up()
        world.ack(1)
    else:
        world.retry(delivery)
        world.ack(3)
    assert heir.result(0).confirmed
    assert world.retry_worker.rows == {}


@pytest.mark.parametrize(
    ("retries", "ended", "dead"), [(0, True, True), (1, True, False), (0, False, False)]
)
def test_its_publisher_leaves_before_it_is_told(retries: int, ended: bool, dead: bool) -> None:
    """It relies on the library then: a retry is left, the tag is open, or a letter is made."""
    world = World(max_retries=retries)
    world.up()
    [delivery] = world.send("a", retry=False)
    delivery.__class__ = Leaving
    if ended:
        world.nack(1)
    else:
        world.sender.expire(delivery, 5.0)
    assert delivery.dead == dead
    assert list(world.retry_worker.rows) == [delivery]
    assert not delivery.waiter.done()


def test_its_publisher_leaves_while_it_is_to_be_stored_ahead(world: World) -> None:
    """It is sent once it is stored; until then there is nothing to be done."""
    delivery = make_delivery("a")
    delivery.__class__ = Leaving
    world.sender.expire(delivery, 5.0)
    assert (delivery.open, delivery.relied_on, delivery.attempt) == (
        True,
        True,
        AttemptState.MAILBOX,
    )
    assert world.retry_worker.rows == {}


def test_the_store_is_silent_about_a_suspect(world: World) -> None:
    """It was sent again meanwhile, and its error counts that attempt."""
    [delivery, other] = world.send("a", "b")
    for each in (delivery, other):
        world.sender.expire(each, 5.0)
    world.down(403)
    world.up()
    world.sender.store_is_late(other, 5.2)
    assert (error_of(other).attempts, world.sender.waiting) == (1, 0)
    world.sender.store_is_late(delivery, 5.2)
    error = error_of(delivery)
    assert isinstance(error, StoreError)
    assert (error.attempts, error.possibly_sent) == (2, True)


def written_ahead(world: World, *, leased_until: float) -> Delivery:
    """Return a message that was stored before it was sent, and is in flight."""
    world.retry_worker.durable = True
    delivery = make_delivery("a")
    delivery.claim()
    delivery.row, delivery.leased_until = RowState.AHEAD, leased_until
    world.retry_worker.rows[delivery] = 0
    world.sender.readmit(delivery, 0.0)
    world.sender.pump(0.0)
    return delivery


def test_whose_row_it_is_has_to_be_known(world: World) -> None:
    """Nothing is promised after the end of a lease before the store has been asked."""
    for leased_until in (4.0, 6.0):
        delivery = written_ahead(world, leased_until=leased_until)
        world.now = 5.0
        world.nack(len(world.channel.written))
        assert delivery.waiter.done() == (leased_until > world.now)
        world.sender.stored([delivery], world.now)
        assert not receipt_of(delivery).confirmed
        world.now = 0.0


def test_rejected_while_its_row_comes_back(world: World) -> None:
    """The row of what goes back to its publisher promises nothing, and is deleted."""
    delivery = written_ahead(world, leased_until=20.0)
    world.down(404)
    assert world.retry_worker.withdrawn == [delivery]
    assert world.window.left == [delivery]
    world.sender.readmit(delivery, 1.0)
    assert world.window.left == [delivery] * 2, "for the sweep had let it in again"
    assert not delivery.waiter.done()
    world.sender.withdrawn([delivery], 1.0, gone=True)
    assert isinstance(error_of(delivery), BrokerRejectedError)
    assert world.sender.waiting == 0


@pytest.mark.parametrize("leased_until", [5.1, 5.2])
def test_the_store_is_silent_about_what_was_never_written(
    world: World, leased_until: float
) -> None:
    """It was not sent here; once its row is not this process's any more, another may send it."""
    world.sender.block(blocked=True)
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    delivery.lease(leased_until)
    world.sender.store_is_late(delivery, 5.2)
    assert error_of(delivery).possibly_sent == (leased_until < 5.2)


def test_a_row_that_is_gone_was_not_sent(world: World) -> None:
    """Although its lease was over: another process has had nothing that it could send."""
    world.sender.block(blocked=True)
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    delivery.lease(5.1)
    world.sender.withdrawn([delivery], 5.2, gone=True)
    assert not error_of(delivery).possibly_sent


def test_taken_over_while_it_is_being_stored(world: World) -> None:
    """Another process has its row, so it was stored, and its publisher is told at once."""
    world.retry_worker.durable = True
    [delivery] = world.send("a")
    world.nack(1)
    assert not delivery.waiter.done()
    world.sender.taken_over([delivery], 1.0)
    assert receipt_of(delivery).durable


def test_taken_over_while_it_is_in_flight(world: World) -> None:
    """It stays there, since its confirm would come first; but another process may have sent it."""
    delivery = written_ahead(world, leased_until=9.0)
    world.sender.taken_over([delivery], 1.0)
    assert delivery.in_flight
    assert delivery.doubt is Doubt.POSSIBLE


def test_taken_over_after_it_was_told(world: World) -> None:
    """That it is deferred is no news."""
    [delivery] = world.send("a")
    world.nack(1)
    world.store(delivery)
    before = list(world.events.log)
    world.sender.taken_over([delivery], 1.0)
    assert world.events.log == before


def test_ended_elsewhere_while_it_waits(world: World) -> None:
    """It leaves the queue, and is confirmed without being written here."""
    world.channel.room_left = 0
    delivery = written_ahead(world, leased_until=9.0)
    assert world.sender.waiting == 1
    world.sender.ended_elsewhere([delivery], 1.0, dead=False)
    assert world.sender.waiting == 0
    assert receipt_of(delivery).confirmed


def test_its_lease_ends_while_it_waits(world: World) -> None:
    """It is to be seen whose row it is; until then it does not go back to its publisher."""
    world.channel.room_left = 0
    delivery = written_ahead(world, leased_until=4.0)
    world.channel.room_left = 100
    world.sender.pump(4.1)
    assert (delivery.attempt, delivery.row) == (AttemptState.SCHEDULED, RowState.WRITING)
    assert world.retry_worker.withdrawn == []


def test_vanished(world: World) -> None:
    """The store has lost a message of which no copy is here, and its publisher is told."""
    [delivery] = world.send("a")
    world.nack(1)
    world.store(delivery)
    receipt = receipt_of(delivery)
    for _ in range(2):
        world.sender.vanished([delivery])
    with pytest.raises(StoreError, match="gone from the store") as caught:
        receipt.result(0)
    assert caught.value.possibly_sent, "another process may have claimed its row"
    assert delivery.row is RowState.GONE
    assert [event for event, _ in world.events.log if event == "given back"] == ["given back"]


def test_promised_and_interrupted_at_the_end(world: World) -> None:
    """What its publisher relies on goes into the store, whatever befell the call after that."""
    world.sender.shutdown._durable = True
    [delivery] = world.send("a")
    delivery.stop_waiting(Fate())
    delivery.retry = False
    world.sender.shutdown.store_rest(1.0)
    assert list(world.retry_worker.rows) == [delivery]


def test_handed_in_after_the_end(world: World) -> None:
    """It is given back, since no answer of a durable store would be heard any more."""
    world.sender.shutdown._durable = True
    world.sender.shutdown.end([], (), 1.0)
    [delivery] = world.send("a")
    assert isinstance(error_of(delivery), ProducerClosedError)


def test_time_is_up_amid_a_close(world: World) -> None:
    """The store is about to answer: what is in flight is not counted as unconfirmed."""
    world.retry_worker.durable = True
    world.sender.shutdown._durable = True
    [delivery] = world.send("a")
    world.sender.shutdown.store_rest(4.9)
    world.sender.expire(delivery, 5.0)
    assert (world.sender.timeouts, delivery.attempt) == (0, AttemptState.IN_FLIGHT)
    world.store(delivery)
    assert receipt_of(delivery).durable


def test_room_behind_what_was_withdrawn(world: World) -> None:
    """What has been withdrawn while it waited takes no room from those behind it."""
    world.channel.room_left = 0
    [withdrawn, _] = world.send("a", "b")
    assert withdrawn.withdraw()  # as by its publisher, whose call was interrupted
    world.channel.room_left = 1
    world.sender.pump(0.0)
    assert world.channel.written == [("b", 1)]


def test_what_is_entrusted_keeps_its_row(world: World) -> None:
    """It was claimed a moment before the end, and comes back only after it."""
    world.retry_worker.durable = True
    [delivery] = world.send("a")
    world.nack(1)
    world.store(delivery)
    shutdown = world.sender.shutdown
    shutdown._durable = True
    shutdown.end([delivery], (), 1.0)
    assert not delivery.open
    world.sender.readmit(delivery, 1.0)
    assert list(world.retry_worker.rows) == [delivery]
    assert world.retry_worker.settled == []


@pytest.mark.parametrize("answers_deferral", [False, True])
def test_what_is_entrusted_is_told(world: World, answers_deferral: bool) -> None:
    """It is in the store, and what becomes of it is not to be learned here any more."""
    world.retry_worker.durable = True
    delivery = make_delivery("a", answers_deferral=answers_deferral)
    world.sender.accept([delivery], 0.0)
    world.sender.pump(0.0)
    world.nack(1)
    world.store(delivery)
    assert delivery.waiter.done() == answers_deferral
    assert (delivery.answer is AnswerState.DEFERRED) == (delivery.row is RowState.HELD)
    world.sender.shutdown._durable = True
    world.sender.shutdown.end([delivery], (), 3.0)
    receipt = receipt_of(delivery)
    assert (receipt.confirmed, receipt.durable, receipt.attempts) == (False, True, 1)
    assert isinstance(receipt.reason, NackError)
    assert receipt.elapsed == (0.0 if answers_deferral else 3.0)
    with pytest.raises(TimeoutError):
        receipt.result(60)  # at once


def test_nothing_is_sent_once_a_close_has_begun(world: World) -> None:
    """What comes then goes into the store, like what was there."""
    world.retry_worker.durable = True
    world.sender.shutdown._durable = True
    world.sender.shutdown.store_rest(0.0)
    [late] = world.send("late")
    assert world.channel.written == []
    assert list(world.retry_worker.rows) == [late]


def test_abandon_at_close(world: World) -> None:
    """Publishers that wait are told that the producer was closed, and what may have been sent."""
    world.channel.room_left = 1
    [in_flight, waiting] = world.send("a", "b")
    world.channel.room_left = 0
    stored = make_delivery("c")
    world.sender.accept([stored], 0.0)
    world.sender.refuse(NotConnectedError("not connected"), 0.0)
    world.store(stored)
    world.store(waiting)
    receipt = receipt_of(stored)
    world.sender.shutdown.end(list(world.retry_worker.rows), (), 0.0)
    assert isinstance(error_of(in_flight), ProducerClosedError)
    assert error_of(in_flight).possibly_sent
    with pytest.raises(ProducerClosedError) as caught:
        receipt.result(0)
    assert not caught.value.possibly_sent
    assert world.retry_worker.rows == {}
    assert world.sender.in_flight == world.sender.waiting == 0
    [late] = world.send("late")
    assert isinstance(error_of(late), ProducerClosedError)


def test_tags_that_are_settled_singly() -> None:
    """The channel says which: a confirm of several does not speak of them."""

    class Apart(FakeChannel):
        def publish(self, batch: list[tuple[Envelope, int]]) -> list[int]:
            super().publish(batch)
            return [2]

    world = World()
    world.up(Apart())
    [one, two, three] = world.send("a", "b", "c")
    world.ack(3, multiple=True)
    assert (one.waiter.done(), two.waiter.done(), three.waiter.done()) == (True, False, True)
    world.ack(2)
    assert receipt_of(two).confirmed


def test_overdue(world: World) -> None:
    """A channel is overdue from when its oldest open tag has waited for the limit."""
    assert not world.sender.overdue(1000.0, 60.0)
    world.send("a")
    world.now = 30.0
    world.send("b")
    assert not world.sender.overdue(59.9, 60.0)
    assert world.sender.overdue(60.0, 60.0)
    world.ack(1)
    assert not world.sender.overdue(60.0, 60.0)


def test_room(world: World) -> None:
    """Writing stops when the buffer is full, and goes on with the next ack."""
    world.channel.room_left = 10
    world.send("a", "b", "c")
    assert world.channel.written == [("a", 1), ("b", 2)]  # 6 bytes each
    world.ack(1)
    assert world.channel.written == [("a", 1), ("b", 2), ("c", 3)]


def test_what_was_accepted_by_half_is_sent(world: World) -> None:
    """A callback failed before it was queued; what was not accepted yet is in the mailbox."""
    half, still = make_delivery("half"), make_delivery("still")
    assert half.claim()
    world.sender.recover([half, still], world.now)
    world.sender.pump(world.now)
    assert [name for name, _ in world.channel.written] == ["half"]
