"""The nemesis's runs: a short one without the end of the node, and a long one with all faults.

``MLPRODUCER_NEMESIS_SEED`` is for other faults than those that the short one always plays; the
long one is ``python -m tests.long nemesis``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from mlproducer import MLProducer, Settings
from mlproducer.status import CloseReport
from mlproducer.testing import Proxy, RabbitMQCluster, RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import QUICK, Connect
from tests.faults.nemesis import ALL, LIGHT, Decision, Nemesis, Victims, failures
from tests.faults.traffic import FIGURES, LIMIT
from tests.long import GIVEN

pytestmark = pytest.mark.broker

SEED = int(os.environ.get("MLPRODUCER_NEMESIS_SEED", "307"))
"""By default one that plays each light fault within `SHORT`, and none of the long ones."""

SHORT = 8.0
MINUTES = 10.0

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
    vhost: VirtualHost,
    producer: MLProducer,
    nemesis: Nemesis,
    faults: dict[str, int],
    seconds: float,
) -> tuple[Victims, Decision]:
    """Let the nemesis loose, and check what became of every message."""
    print(f"\nseed {nemesis.seed}")
    losses: list[None] = []
    producer.on("disconnected", lambda: losses.append(None))
    assert producer.wait_connected(LIMIT)
    victims = Victims(producer, nemesis.seed)
    victims.start()
    try:
        nemesis.play(faults, seconds)
    finally:
        nemesis.heal()
        victims.stop()
    verdict = failures(victims, vhost.url)
    faults_played = ", ".join(f"{n} {name}" for name, n in sorted(nemesis.played.items()))
    FIGURES[f"nemesis for {seconds:g} s"] = (
        f"seed {nemesis.seed}, {len(victims.journal)} messages, {nemesis.played.total()} faults "
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
    producer = connect(proxy.url(rabbitmq_vhost.url), **HASTY)
    nemesis = Nemesis(rabbitmq_vhost, proxy, SEED)
    check(*torment(rabbitmq_vhost, producer, nemesis, LIGHT, SHORT))


@pytest.mark.slow
def test_long_run(store_url: str) -> None:
    """The same for minutes, in which nodes are also stopped and killed; with any store."""
    with ExitStack() as stack:
        if GIVEN.nodes == 1:
            nodes: Sequence[RabbitMQNode] = [stack.enter_context(RabbitMQNode())]
        else:
            nodes = stack.enter_context(RabbitMQCluster(GIVEN.nodes)).nodes
        vhost = VirtualHost("/", nodes[0], nodes[0].url)
        proxies = [stack.enter_context(Proxy((node.host, node.port))) for node in nodes]
        places = list(zip(nodes, proxies, strict=True))
        urls = ",".join(between.url(node.url) for node, between in places)
        producer = MLProducer(Settings(url=urls, store_url=store_url, **{**QUICK, **HASTY}))
        nemesis = Nemesis(vhost, proxies[0], GIVEN.seed, *places[1:])
        seconds = 60.0 * (GIVEN.minutes or MINUTES)
        victims, decision = torment(vhost, producer, nemesis, ALL, seconds)
        left = producer.close(LIMIT)
    check(victims, decision)
    assert left == CloseReport()
