"""The nemesis's runs: a short one without the end of the node, and a long one with all faults.

``MLPRODUCER_NEMESIS_SEED`` is for other faults than those that are always played;
``MLPRODUCER_NEMESIS_SECONDS`` is the length of the long one.
"""

from __future__ import annotations

import os
import threading

import pytest

from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.faults.nemesis import ALL, LIGHT, Decision, Nemesis, Victims, failures
from tests.faults.traffic import FIGURES, LIMIT

pytestmark = pytest.mark.broker

SEED = int(os.environ.get("MLPRODUCER_NEMESIS_SEED", "307"))
"""By default one that plays each light fault within `SHORT`, and none of the long ones."""

SECONDS = float(os.environ.get("MLPRODUCER_NEMESIS_SECONDS", "600"))
SHORT = 8.0

TIMEOUT = 1.5
SLACK = 0.75
"""Two cores carry the broker and nine threads; a publish's slack of 0.25 s is reported as seen."""

HASTY = {
    "publish_timeout": TIMEOUT,
    "circuit_breaker_threshold": 10,
    "circuit_breaker_cooldown": 1.0,
    "max_message_retries": 3,
    "message_retry_base_delay": 0.5,
    "message_retry_max_delay": 2.0,
    "reconnect_initial_delay": 0.1,
    "reconnect_max_delay": 1.0,
    "max_reconnect_attempts": 10,
    "health_check_interval": 5.0,
    "confirm_give_up": 20.0,
}
"""The documented limits, with shorter times."""


def torment(
    vhost: VirtualHost, connect: Connect, proxy: Proxy, faults: dict[str, int], seconds: float
) -> tuple[Victims, Decision]:
    """Let the nemesis loose, and check what became of every message."""
    print(f"\nMLPRODUCER_NEMESIS_SEED={SEED}")
    producer = connect(proxy.url(vhost.url), **HASTY)
    losses: list[None] = []
    producer.on("disconnected", lambda: losses.append(None))
    assert producer.wait_connected(LIMIT)
    nemesis, victims = Nemesis(vhost, proxy, SEED), Victims(producer, SEED)
    victims.start()
    try:
        nemesis.play(faults, seconds)
    finally:
        proxy.heal()
        victims.stop()
    verdict = failures(victims, vhost.url)
    faults_played = ", ".join(f"{n} {name}" for name, n in sorted(nemesis.played.items()))
    FIGURES[f"nemesis for {seconds:g} s"] = (
        f"seed {SEED}, {len(victims.journal)} messages, {nemesis.played.total()} faults "
        f"({faults_played}), {len(losses)} connections lost, lost {len(verdict.account.lost)}, "
        f"leaked {len(verdict.account.leaked)}, duplicates {verdict.account.duplicates} of "
        f"{verdict.in_flight} re-sent after a loss, dead letters {len(verdict.buried)}, "
        f"longest publish {victims.longest:.3f} s (timeout {TIMEOUT:g} s)"
    )
    print(FIGURES[f"nemesis for {seconds:g} s"])
    return victims, verdict


def check(victims: Victims, verdict: Decision) -> None:
    """Nothing lost or leaked; each copy too many belongs to a message that was written again."""
    assert victims.left == 0
    assert verdict.account.lost == verdict.account.leaked == frozenset()
    assert verdict.account.foreign == frozenset()
    assert verdict.undecided == frozenset()
    assert verdict.unexplained == frozenset()
    assert verdict.account.duplicates <= verdict.resent
    assert verdict.buried == verdict.dead.keys()
    assert victims.own < TIMEOUT + SLACK
    left = [each.name for each in threading.enumerate() if each.name.startswith("test-")]
    assert left == []


def test_short_run(rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy) -> None:
    """Faults at random for some seconds: nothing lost, nothing leaked, each copy explained."""
    check(*torment(rabbitmq_vhost, connect, proxy, LIGHT, SHORT))


@pytest.mark.slow
def test_long_run(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, mortal_node: RabbitMQNode
) -> None:
    """The same for ten minutes, in which the node is also stopped and killed."""
    check(*torment(rabbitmq_vhost, connect, proxy, ALL, SECONDS))
