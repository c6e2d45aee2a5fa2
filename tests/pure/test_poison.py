"""Who closed the channel."""

from __future__ import annotations

import pytest

from mlproducer._core.delivery import Delivery
from mlproducer._core.send_queue import PoisonIsolation
from tests.helpers import make_delivery


def ids(deliveries: list[Delivery]) -> list[str]:
    """Their message ids, which read better."""
    return [delivery.envelope.message_id for delivery in deliveries]


def test_suspects_keep_their_order() -> None:
    """They are tried in the order in which the broker has read them: the oldest first."""
    poison = PoisonIsolation()
    poison.isolate([make_delivery("a"), make_delivery("b"), make_delivery("c")])
    assert len(poison) == 3
    assert ids(poison.release()) == ["a", "b", "c"]
    assert poison.release() == []


def test_newly_lost_are_tried_before_the_others() -> None:
    """What was in flight when the channel closed again stands before the rest."""
    poison = PoisonIsolation()
    poison.isolate([make_delivery("a"), make_delivery("b")])
    poison.isolate([make_delivery("c"), make_delivery("d")])
    assert ids(poison.release()) == ["c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("code", "refused", "free"),
    [
        pytest.param(404, ["guilty", "same exchange", "same route"], ["other"], id="404"),
        pytest.param(403, ["guilty", "same route"], ["same exchange", "other"], id="403"),
        pytest.param(406, ["guilty"], ["same exchange", "same route", "other"], id="406"),
    ],
)
def test_shared_guilt(code: int, refused: list[str], free: list[str]) -> None:
    """A missing exchange is missing for all, a permission for all of one route, a size for one."""
    poison = PoisonIsolation()
    guilty = make_delivery("guilty", exchange="gone", routing_key="r")
    others = [
        make_delivery("same exchange", exchange="gone", routing_key="s"),
        make_delivery("same route", exchange="gone", routing_key="r"),
        make_delivery("other", exchange="x", routing_key="r"),
    ]
    poison.isolate(others)
    assert ids(poison.reject(guilty, code)) == refused
    assert ids(poison.release()) == free
