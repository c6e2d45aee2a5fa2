"""Which delivery belongs to which row, by the stored rows itself."""

from __future__ import annotations

import math

import pytest
from attrs import evolve

from mlproducer._core.delivery import Doubt
from mlproducer._engine.store_orders import Put
from mlproducer._engine.stored_rows import Reason, StoredRows, read_reason, record_of
from mlproducer.errors import NackError, PublishError, UnroutableError
from mlproducer.stores.protocol import LATEST, MOST_ATTEMPTS, Claim, Entry, Record, Row
from tests.helpers import make_delivery


def test_a_claim_that_was_lost_comes_back() -> None:
    """The delivery is found by its row's key, and keeps what is known of it here."""
    stored_rows = StoredRows(30.0, durable=True)
    delivery = make_delivery()
    delivery.attempts, delivery.doubt = 2, Doubt.POSSIBLE
    stored_rows.hold(delivery, Claim(1, 1), 0.0)
    stored_rows.ahead.add(delivery)
    stored_rows.renewed([Claim(1, 1)], 10.0)
    assert (list(stored_rows.lost_rows), stored_rows.claims, stored_rows.ahead) == (
        [delivery],
        {},
        set(),
    )
    assert delivery.leased_until == -math.inf
    row = Row(Claim(1, 3), Record(delivery.envelope, attempts=1))
    assert stored_rows.take(row, 20.0, 0.0) is delivery
    assert (delivery.attempts, delivery.doubt) == (2, Doubt.POSSIBLE)
    assert (stored_rows.lost_rows, stored_rows.claims) == ({}, {delivery: Claim(1, 3)})
    assert 40.0 < delivery.leased_until < 50.0


def test_a_row_comes_back_whose_delivery_is_with_its_connection() -> None:
    """It is held again, and its delivery stays as it is: what comes of it is still to be noted."""
    stored_rows = StoredRows(30.0, durable=True)
    delivery = make_delivery()
    envelope = delivery.envelope
    stored_rows.hold(delivery, Claim(1, 1), 0.0)
    stored_rows.lose(delivery)
    put = Put(delivery, Entry(record_of(delivery, 0.0), None), restores=True)
    row = Row(Claim(1, 3), Record(make_delivery().envelope, attempts=9, dead=True))
    for noted in (None, put):  # the second one has its tag open
        stored_rows.lost_rows[delivery].put = noted
        assert stored_rows.regain(row, 20.0)
        assert (delivery.envelope, delivery.attempts, delivery.dead) == (envelope, 0, False)
        assert delivery.doubt is Doubt.NONE
        assert (stored_rows.lost_rows, stored_rows.claims) == ({}, {delivery: Claim(1, 3)})
        assert delivery.leased_until == 20.0 + 27.0
        assert not stored_rows.regain(row, 30.0), "its key is known no more"
        stored_rows.lose(delivery)
    assert stored_rows.regain(Row(Claim(1, 5), Record(envelope, doubtful=True)), 30.0)
    assert delivery.doubt is Doubt.POSSIBLE
    stored_rows.lose(delivery)
    assert delivery.withdraw()
    assert not stored_rows.regain(row, 40.0), "it has ended: its row is to be taken, and deleted"


def test_a_row_comes_back_whose_delivery_waits() -> None:
    """It is to be taken: nothing about it is still to come from its connection."""
    stored_rows = StoredRows(30.0, durable=True)
    delivery = make_delivery()
    row = Row(Claim(1, 3), Record(delivery.envelope))
    assert not stored_rows.regain(row, 20.0), "of another process"
    stored_rows.hold(delivery, Claim(1, 1), 0.0)
    stored_rows.lose(delivery)
    put = Put(delivery, Entry(record_of(delivery, 0.0), 1.0), restores=True)
    stored_rows.lost_rows[delivery].put = put
    assert not stored_rows.regain(row, 20.0)
    assert stored_rows.take(row, 20.0, 0.0) is delivery
    stored_rows.park(delivery, Claim(1, 3))
    row = Row(Claim(1, 4), evolve(row.record, doubtful=True))
    assert not stored_rows.regain(row, 21.0)
    assert delivery.doubt is Doubt.NONE
    assert stored_rows.take(row, 21.0, 0.0) is delivery
    assert delivery.doubt is Doubt.POSSIBLE, "as another process has noted"


def test_a_letter_that_could_not_be_noted_stays_one() -> None:
    """The row still says what it was before; only a delivery without its body takes that over."""
    stored_rows = StoredRows(30.0, durable=True)
    delivery = make_delivery()
    row = Row(Claim(1, 3), Record(delivery.envelope, attempts=1))
    letter = evolve(delivery.envelope, exchange="dead")
    delivery.envelope, delivery.dead = letter, True
    stored_rows.hold(delivery, Claim(1, 1), 0.0)
    stored_rows.lose(delivery)
    stored_rows.take(row, 20.0, 0.0)
    assert (delivery.envelope, delivery.dead) == (letter, True)
    stored_rows.park(delivery, Claim(1, 3))  # and the store is put back to an earlier state
    stored_rows.take(evolve(row, claim=Claim(1, 4)), 30.0, 0.0)
    assert (delivery.envelope, delivery.dead) == (row.record.envelope, False)


def test_a_row_says_that_its_message_waits_for_a_route() -> None:
    """In another process it has all its retries, and in this one those that are left."""
    delivery = make_delivery()
    delivery.attempts, delivery.unrouted = 6, 5
    delivery.reason = UnroutableError("NO_ROUTE" * 100)
    record = record_of(delivery, 0.0)
    elsewhere = StoredRows(30.0, durable=True)
    revived = elsewhere.take(Row(Claim(1, 2), record), 1.0, 0.0)
    assert (revived.attempts, revived.unrouted) == (6, 6)
    assert isinstance(revived.reason, UnroutableError)
    assert str(revived.reason) == ("NO_ROUTE" * 100)[:255]
    assert (revived.reason.message_id, revived.reason.attempts) == (delivery.envelope.message_id, 6)
    here = StoredRows(30.0, durable=True)
    here.park(delivery, Claim(1, 1))
    here.take(Row(Claim(1, 2), record), 1.0, 0.0)
    assert (delivery.attempts, delivery.unrouted) == (6, 5)
    here.park(delivery, Claim(1, 2))
    here.take(Row(Claim(1, 4), evolve(record, attempts=9)), 2.0, 0.0)
    assert (delivery.attempts, delivery.unrouted) == (9, 8), "another process sent it in between"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (
            "UnroutableError: NO_ROUTE: a (its route was there before)",
            Reason(UnroutableError, "NO_ROUTE: a", True),
        ),
        ("NackError: the broker nacked it", Reason(NackError, "the broker nacked it", False)),
        ("ErrorOfAnEarlierVersion: text", Reason(PublishError, "text", False)),
        ("MLProducerError: not of a message", Reason(PublishError, "not of a message", False)),
        ("annotations: no class", Reason(PublishError, "no class", False)),
        ('{"error": "NackError", "text": "a: b"}', Reason(NackError, "a: b", False)),
        ('{"error": ["NackError"], "text": 1}', Reason(PublishError, "1", False)),
        ('{"error": "NackError"', Reason(PublishError, '"NackError"', False)),
        ("[" * 100_000, Reason(PublishError, "", False)),
        *((json, Reason(PublishError, "", False)) for json in ("", "1", "[1]", "null", "{}")),
    ],
)
def test_reasons_of_any_row_are_read(stored: str, expected: Reason) -> None:
    """Those of earlier versions, which had no JSON, and those that users have written."""
    assert read_reason(stored) == expected


def test_a_row_of_an_earlier_version_is_taken() -> None:
    """It waits for its route as it did, and its reason is what the broker said."""
    stored = "UnroutableError: NO_ROUTE (its route was there before)"
    record = Record(make_delivery().envelope, attempts=7, reason=stored)
    revived = StoredRows(30.0, durable=True).take(Row(Claim(1, 2), record), 1.0, 0.0)
    assert (revived.attempts, revived.unrouted) == (7, 7)
    assert isinstance(revived.reason, UnroutableError)
    assert str(revived.reason) == "NO_ROUTE"


@pytest.mark.parametrize("attempts", [4, 9])
def test_attempts_alone_do_not_show_that_a_route_was_there(attempts: int) -> None:
    """A last attempt may have been under way when its process ended."""
    delivery = make_delivery()
    delivery.attempts, delivery.reason = attempts, UnroutableError("NO_ROUTE")
    record = record_of(delivery, 0.0)
    revived = StoredRows(30.0, durable=True).take(Row(Claim(1, 2), record), 1.0, 0.0)
    assert (revived.attempts, revived.unrouted) == (attempts, 0)


@pytest.mark.parametrize("dead", [False, True])
def test_attempts_are_the_same_after_the_store(dead: bool) -> None:
    """Those by another message's fault are not in the row of a message, and are in a letter's."""
    stored_rows = StoredRows(30.0, durable=True)
    delivery = make_delivery()
    delivery.attempts, delivery.innocent, delivery.dead = 3, 1, dead
    stored_rows.park(delivery, Claim(1, 1))
    stored_rows.take(Row(Claim(1, 2), record_of(delivery, 0.0)), 1.0, 0.0)
    assert delivery.attempts == 3


@pytest.mark.parametrize(("now", "time"), [(1e11, 0.0), (-1e11, LATEST)])
def test_no_store_takes_a_row_of_ours_for_damaged(now: float, time: float) -> None:
    """Nor after the wall clock was set while the message waited, nor at the last attempt."""
    delivery = make_delivery(started=1.0)
    delivery.first_failed, delivery.attempts = 2.0, 2**31
    record = record_of(delivery, now)
    assert (record.first_failed_at, record.accepted_at) == (time, time)
    assert record.attempts == MOST_ATTEMPTS


def test_what_has_found_its_end_is_forgotten() -> None:
    """Also in memory, where deliveries are held for as long as their rows wait."""
    stored_rows = StoredRows(math.inf, durable=False)
    delivery = make_delivery()
    stored_rows.hold(delivery, Claim(1, 1), 0.0)
    stored_rows.park(delivery, Claim(1, 1))
    assert stored_rows.deliveries() == [delivery]
    assert stored_rows.drop(delivery) == Claim(1, 1)
    assert stored_rows.deliveries() == []
