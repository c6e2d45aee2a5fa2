"""Who closed the channel."""

from __future__ import annotations

import pytest

from mlproducer.core.delivery import Delivery
from mlproducer.core.trial import Trial
from tests.helpers import make_delivery


def ids(deliveries: list[Delivery]) -> list[str]:
    """Their message ids, which read better."""
    return [delivery.envelope.message_id for delivery in deliveries]


def test_suspects_keep_their_order() -> None:
    """They are tried in the order in which the broker has read them: the oldest first."""
    trial = Trial()
    trial.summon([make_delivery("a"), make_delivery("b"), make_delivery("c")])
    assert len(trial) == 3
    assert ids(trial.discharge()) == ["a", "b", "c"]
    assert trial.discharge() == []


def test_newly_lost_are_tried_before_the_others() -> None:
    """Whoever was in flight when the channel closed again stands before the rest."""
    trial = Trial()
    trial.summon([make_delivery("a"), make_delivery("b")])
    trial.summon([make_delivery("c"), make_delivery("d")])
    assert ids(trial.discharge()) == ["c", "d", "a", "b"]


@pytest.mark.parametrize(
    ("code", "convicted", "free"),
    [
        pytest.param(404, ["guilty", "same exchange", "same route"], ["other"], id="404"),
        pytest.param(403, ["guilty", "same route"], ["same exchange", "other"], id="403"),
        pytest.param(406, ["guilty"], ["same exchange", "same route", "other"], id="406"),
    ],
)
def test_shared_guilt(code: int, convicted: list[str], free: list[str]) -> None:
    """A missing exchange is missing for all, a permission for all of one route, a size for one."""
    trial = Trial()
    guilty = make_delivery("guilty", exchange="gone", routing_key="r")
    others = [
        make_delivery("same exchange", exchange="gone", routing_key="s"),
        make_delivery("same route", exchange="gone", routing_key="r"),
        make_delivery("other", exchange="x", routing_key="r"),
    ]
    trial.summon(others)
    assert ids(trial.convict(guilty, code)) == convicted
    assert ids(trial.discharge()) == free
