"""The sender behind a circuit breaker, and its dead letters: what counts, who probes, who dies."""

from __future__ import annotations

import pytest

from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_states import AttemptState
from mlproducer._core.states import CircuitState
from mlproducer.errors import (
    AuthenticationError,
    BrokerRejectedError,
    CircuitOpenError,
    NackError,
    NotConnectedError,
    PublishError,
    RetriesExhaustedError,
)
from mlproducer.settings import RetryPolicy
from tests.helpers import make_delivery
from tests.pure.fakes import COOLDOWN, PATIENCE, FakeChannel, World, error_of, receipt_of

OPEN, HALF_OPEN, CLOSED = CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.CLOSED


@pytest.fixture
def world() -> World:
    """A sender with an open channel, whose breaker opens at the second failure."""
    world = World(threshold=2)
    world.up()
    return world


def state(world: World) -> CircuitState:
    """Where the breaker stands."""
    return world.sender.breaker.state


def open_circuit(world: World) -> None:
    """Fail as often as it takes, and leave nothing behind."""
    world.send("f1", "f2", retry=False)
    world.nack(0, multiple=True)
    assert state(world) is OPEN


def half_open(world: World) -> None:
    """Open it, and wait."""
    open_circuit(world)
    world.now += COOLDOWN
    world.sender.breaker.cool(world.now)
    assert state(world) is HALF_OPEN


def written(world: World) -> list[str]:
    """The ids on the wire, without those that opened the breaker."""
    return [name for name, _ in world.channel.written if not name.startswith("f")]


def settle(world: World, name: str, *, good: bool = True) -> None:
    """Ack or nack what was written last under an id."""
    tag = [tag for each, tag in world.channel.written if each == name][-1]
    (world.ack if good else world.nack)(tag)


def is_refused(delivery: Delivery) -> bool:
    """Whether its publisher was told that the breaker is open."""
    return delivery.waiter.done() and isinstance(error_of(delivery), CircuitOpenError)


# --- open --------------------------------------------------------------------------------------


def test_open(world: World) -> None:
    """Nothing is written; who comes is told how long it lasts; what is ours stays, for nothing."""
    [ours] = world.send("ours")
    settle(world, "ours", good=False)
    open_circuit_by(world, "f1")
    world.now += 10.0
    [refused] = world.send("refused")
    world.retry(ours)
    assert written(world) == ["ours"]
    error = error_of(refused)
    assert isinstance(error, CircuitOpenError)
    assert error.retry_after == COOLDOWN - 10.0
    assert (error.attempts, error.possibly_sent) == (0, False)
    assert (ours.attempt, ours.attempts) == (AttemptState.SCHEDULED, 1)


def open_circuit_by(world: World, name: str) -> None:
    """Fail once more."""
    world.send(name, retry=False)
    settle(world, name, good=False)
    assert state(world) is OPEN


def test_a_confirm_between_failures_starts_their_count_over(world: World) -> None:
    """The threshold counts failures in a row."""
    for name, good in (("a", False), ("b", True), ("c", False)):
        world.send(name, retry=False)
        settle(world, name, good=good)
    assert state(world) is CLOSED
    assert world.sender.breaker.failures == 1


def test_what_waits_stays_when_it_opens() -> None:
    """What was accepted before is not refused; one of them is the probe, then all go out."""
    world = World(threshold=1)
    world.up(FakeChannel(room=1))
    world.send("a", "b", "c", "d")
    world.channel.room_left = 1000
    settle(world, "a", good=False)
    world.now = COOLDOWN
    assert world.sender.waiting == 3
    world.sender.breaker.cool(world.now)
    world.sender.pump(world.now)
    assert written(world) == ["a", "b"]
    settle(world, "b")
    assert state(world) is CLOSED
    assert written(world) == ["a", "b", "c", "d"]


# --- half-open ---------------------------------------------------------------------------------


def test_one_probe(world: World) -> None:
    """One message goes out, others are refused meanwhile; its confirm lets all through."""
    half_open(world)
    [probe, *refused] = world.send("probe", "a", "b", retry=False)
    assert written(world) == ["probe"]
    assert all(map(is_refused, refused))
    settle(world, "probe")
    assert receipt_of(probe).confirmed
    assert state(world) is CLOSED
    world.send("c", "d")
    assert written(world) == ["probe", "c", "d"]


def test_one_place_without_a_connection(world: World) -> None:
    """While there is no channel one message may wait to be the probe, and no second one."""
    half_open(world)
    world.down()
    [probe, refused] = world.send("probe", "refused")
    assert is_refused(refused)
    assert not probe.waiter.done()
    assert world.up().written == [("probe", 1)]


def test_a_failing_probe(world: World) -> None:
    """It opens the breaker for another whole cooldown."""
    half_open(world)
    world.send("probe", retry=False)
    world.now += 5.0
    settle(world, "probe", good=False)
    assert state(world) is OPEN
    assert world.sender.breaker.reopens_at == world.now + COOLDOWN


@pytest.mark.parametrize("end", ["returned", "rejected"])
def test_a_probe_that_says_nothing(world: World, end: str) -> None:
    """A message at fault itself neither closes nor opens; the next one is the probe."""
    half_open(world)
    [probe] = world.send("probe", retry=False)
    if end == "returned":
        world.sender.returned(world.channel.written[-1][1], 312, "NO_ROUTE")
        settle(world, "probe")
    else:
        world.down(404, "NOT_FOUND")
        world.up()
    assert probe.waiter.done()
    assert state(world) is HALF_OPEN
    world.send("next")
    assert written(world)[-1] == "next"
    settle(world, "next")
    assert state(world) is CLOSED


def test_a_probe_among_suspects() -> None:
    """A probe whose channel is closed over another message is sent again, and decides then."""
    world = World(threshold=1)
    world.up()
    world.send("old")
    open_circuit_by(world, "f1")
    world.now = COOLDOWN
    world.sender.breaker.cool(world.now)
    world.send("probe")
    world.down(404, "NOT_FOUND")
    world.up()
    assert written(world) == ["old"]
    settle(world, "old")
    settle(world, "probe")
    assert state(world) is CLOSED


def test_time_runs_out_for_the_probe(world: World) -> None:
    """Its confirm timeout is a failure; its late ack closes the breaker all the same."""
    half_open(world)
    [probe] = world.send("probe")
    world.sender.expire(probe, world.now)
    assert state(world) is OPEN
    settle(world, "probe")
    assert receipt_of(probe).confirmed
    assert state(world) is CLOSED
    assert world.sender.breaker.failures == 0


def test_a_probe_that_nobody_waits_for(world: World) -> None:
    """A submit() that is never confirmed is given up as a probe, and the next message is one."""
    half_open(world)
    probe = make_delivery("probe", answers_deferral=False)
    world.sender.accept([probe], world.now)
    world.sender.pump(world.now)
    assert world.wakes[-1] == world.now + PATIENCE
    world.now += PATIENCE - 0.01
    world.sender.breaker.cool(world.now)
    assert state(world) is HALF_OPEN
    world.now += 0.01
    world.sender.breaker.cool(world.now)
    assert state(world) is OPEN
    world.down()
    assert world.sender.breaker.failures == 3  # the two that opened it, and the probe, once
    world.up()
    world.now += COOLDOWN
    world.sender.breaker.cool(world.now)
    world.send("next")
    settle(world, "next")
    assert state(world) is CLOSED


@pytest.mark.parametrize("mark", [OPEN, HALF_OPEN])
def test_a_late_confirm_closes_it(mark: CircuitState) -> None:
    """Messages that were late when it opened are confirmed: the broker is well."""
    world = World(threshold=2)
    world.up()
    late = world.send("a", "b", "c")
    for delivery in late:
        world.sender.expire(delivery, world.now)
    assert state(world) is OPEN
    if mark is HALF_OPEN:
        world.now += COOLDOWN
        world.sender.breaker.cool(world.now)
        world.send("probe")
    settle(world, "c")
    assert state(world) is CLOSED


# --- what counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["nack", "loss"])
def test_an_attempt_counts_once(late: str) -> None:
    """A timeout, and the nack or loss that follows it, are one failure."""
    world = World()
    world.up()
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    if late == "nack":
        world.nack(1)
    else:
        world.down()
    assert world.sender.breaker.failures == 1


def test_each_attempt_counts() -> None:
    """A message that fails twice is two failures."""
    world = World()
    world.up()
    exhausted(world, "a", 2)
    assert world.sender.breaker.failures == 2


@pytest.mark.parametrize("late", ["nack", "loss"])
def test_given_back_is_counted_all_the_same(late: str) -> None:
    """The failure of an attempt says as much where no publisher waits any more."""
    world = World()
    world.up()
    [delivery] = world.send("a", retry=False)
    world.sender.not_stored(delivery, PublishError("taken back", message_id="a"), 0.0)
    if late == "nack":
        world.nack(1)
    else:
        world.down()
    assert world.sender.breaker.failures == 1


def test_an_attempt_to_connect_counts_once() -> None:
    """However many messages it fails, those included whose time ran out while it went on."""
    world = World()
    waiting = world.send("a", "b", "c")
    for delivery in waiting[:2]:
        world.sender.expire(delivery, 5.0)
    assert world.sender.breaker.failures == 1
    world.sender.refuse(NotConnectedError("no"), 10.0)
    assert world.sender.breaker.failures == 1
    [later] = world.send("later")
    world.retry(later)
    assert world.sender.breaker.failures == 1
    world.sender.refuse(NotConnectedError("no"), 20.0)
    assert world.sender.breaker.failures == 2


def test_an_attempt_after_a_connection_is_another_one() -> None:
    """It counts as such, also where the one before it had been counted and then succeeded."""
    world = World()
    [first] = world.send("a")
    world.sender.expire(first, 5.0)
    world.up()
    world.down()
    [second] = world.send("b")
    world.sender.expire(second, 9.0)
    assert world.sender.breaker.failures == 2


def test_refused_credentials_do_not_count() -> None:
    """They say nothing of the broker's health."""
    world = World()
    world.sender.refuse(AuthenticationError("no"), 0.0)
    assert world.sender.breaker.failures == 0


def test_it_confirms_until_three_timeouts_in_a_row() -> None:
    """A confirm in between starts over, a late one too; a message that waits is none."""
    world = World()
    world.up()
    sent = world.send("a", "b", "c", "d")
    for delivery in sent[:2]:
        world.sender.expire(delivery, 5.0)
    settle(world, "a")
    world.sender.expire(sent[2], 5.0)
    assert world.sender.confirming
    [fifth, sixth] = world.send("e", "f")
    world.sender.expire(fifth, 5.0)
    assert world.sender.confirming
    world.sender.expire(sixth, 5.0)
    assert not world.sender.confirming
    settle(world, "b")
    assert world.sender.confirming


# --- dead letters ------------------------------------------------------------------------------


def exhausted(world: World, name: str, attempts: int) -> Delivery:
    """Let a message fail, again and again."""
    [delivery] = world.send(name)
    for left in reversed(range(attempts)):
        settle(world, name, good=False)
        world.store(delivery)
        if left:
            assert not delivery.dead
            world.retry(delivery)
    return delivery


def test_buried_after_the_last_retry() -> None:
    """Not before: with 3 retries the fourth failure makes a dead letter, whose ack is the end."""
    world = World(max_retries=3)
    world.up()
    delivery = exhausted(world, "a", 4)
    assert delivery.dead
    assert delivery.envelope.exchange == "dead"
    assert not receipt_of(delivery).confirmed
    world.retry(delivery)
    settle(world, "a")
    with pytest.raises(RetriesExhaustedError) as caught:
        receipt_of(delivery).result(0)
    assert (caught.value.attempts, caught.value.message_id) == (4, "a")
    assert isinstance(caught.value.reason, NackError)
    assert world.events.log[-1] == ("dead-lettered", "a")
    assert world.retry_worker.settled == [delivery]
    assert world.window.left.count(delivery) == 5  # stored four times, then delivered


@pytest.mark.parametrize("retries", [0, 1, 5])
def test_buried_by_its_own_policy(retries: int) -> None:
    """A message with a policy of its own has as many retries as that says."""
    world = World(max_retries=3)
    world.up()
    delivery = make_delivery("a")
    delivery.policy = RetryPolicy(retries, 1.0, 10.0)
    world.sender.accept([delivery], world.now)
    world.sender.pump(world.now)
    for _ in range(retries):
        settle(world, "a", good=False)
        assert not delivery.dead
        world.store(delivery)
        world.retry(delivery)
    settle(world, "a", good=False)
    assert delivery.dead


@pytest.mark.parametrize("end", ["nack", "return", "loss", "reject", "timeout"])
def test_a_letter_is_no_message(end: str) -> None:
    """However it fails, it stays a letter, keeps its reason and its attempts, and is kept."""
    world = World(max_retries=0)
    world.up()
    delivery = exhausted(world, "a", 1)
    letter = delivery.envelope
    world.retry(delivery)
    if end == "nack":
        settle(world, "a", good=False)
    elif end == "return":
        world.sender.returned(world.channel.written[-1][1], 312, "NO_ROUTE")
        settle(world, "a")
    elif end == "timeout":
        world.sender.expire(delivery, 5.0)
        world.down()
    else:
        world.down(404 if end == "reject" else 0)
    assert delivery.attempt is AttemptState.SCHEDULED
    assert delivery.envelope is letter
    assert delivery.attempts == 1
    assert isinstance(delivery.reason, NackError)
    assert world.retry_worker.settled == []
    world.up()
    world.retry(delivery)
    settle(world, "a")
    assert world.events.log[-1] == ("dead-lettered", "a")


def test_not_buried_while_its_tag_is_open() -> None:
    """The last attempt's timeout is not its end; its late ack confirms it."""
    world = World(max_retries=0)
    world.up()
    [delivery] = world.send("a")
    world.sender.expire(delivery, 5.0)
    assert not delivery.dead
    world.store(delivery)
    settle(world, "a")
    assert receipt_of(delivery).confirmed


def test_hopeless_and_ours() -> None:
    """What can never be delivered is buried at once if it is ours, else given back."""
    world = World(max_retries=3)
    world.up()
    ours = exhausted(world, "ours", 1)
    world.retry(ours)
    world.down(406, "PRECONDITION_FAILED")
    assert ours.dead
    world.up()
    [theirs] = world.send("theirs")
    world.down(406, "PRECONDITION_FAILED")
    assert isinstance(error_of(theirs), BrokerRejectedError)
    assert not theirs.dead


def test_never_by_the_outage_alone() -> None:
    """Without a connection, and while blocked, no time and no number of looks buries a message."""
    world = World(max_retries=0)
    world.sender.refuse(NotConnectedError("no"), 0.0)
    delivery = make_delivery("a")
    world.sender.accept([delivery], 0.0)
    for _ in range(20):
        world.retry(delivery)
    assert not delivery.dead
    world.up()
    world.sender.block(blocked=True)
    world.retry(delivery)
    world.sender.expire(delivery, 1e6)
    assert delivery.attempts == 0
    assert not delivery.dead
