"""Which delivery belongs to which row, by the shelf itself."""

from __future__ import annotations

import math

import pytest

from mlproducer.engine.shelf import Shelf, record_of
from mlproducer.stores.protocol import Claim, Record, Row
from tests.helpers import make_delivery


def test_a_claim_that_was_lost_comes_back() -> None:
    """The delivery is found by its row's key, and keeps what is known of it here."""
    shelf = Shelf(30.0, durable=True)
    delivery = make_delivery()
    delivery.attempts, delivery.doubtful = 2, True
    shelf.hold(delivery, Claim(1, 1), 0.0)
    shelf.ahead.add(delivery)
    shelf.renewed([Claim(1, 1)], 10.0)
    assert (list(shelf.astray), shelf.claims, shelf.ahead) == ([delivery], {}, set())
    assert delivery.leased_until == -math.inf
    row = Row(Claim(1, 3), Record(delivery.envelope, attempts=1))
    assert shelf.take(row, 20.0, 0.0) is delivery
    assert (delivery.attempts, delivery.doubtful) == (2, True)
    assert (shelf.astray, shelf.claims) == ({}, {delivery: Claim(1, 3)})
    assert 40.0 < delivery.leased_until < 50.0


@pytest.mark.parametrize("dead", [False, True])
def test_attempts_are_the_same_after_the_store(dead: bool) -> None:
    """Those by another message's fault are not in the row of a message, and are in a letter's."""
    shelf = Shelf(30.0, durable=True)
    delivery = make_delivery()
    delivery.attempts, delivery.innocent, delivery.dead = 3, 1, dead
    shelf.park(delivery, Claim(1, 1))
    shelf.take(Row(Claim(1, 2), record_of(delivery, 0.0)), 1.0, 0.0)
    assert delivery.attempts == 3


def test_what_has_found_its_end_is_forgotten() -> None:
    """Also in memory, where deliveries are held for as long as their rows wait."""
    shelf = Shelf(math.inf, durable=False)
    delivery = make_delivery()
    shelf.hold(delivery, Claim(1, 1), 0.0)
    shelf.park(delivery, Claim(1, 1))
    assert shelf.deliveries() == [delivery]
    assert shelf.drop(delivery) == Claim(1, 1)
    assert shelf.deliveries() == []
