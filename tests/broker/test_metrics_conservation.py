"""No message is lost from the books: what was accepted has ended, is in flight, or is stored.

The nemesis of the fault suite plays faults while threads publish in every way; then the metrics are
held against what each call said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlproducer import MLProducer, Settings
from mlproducer.errors import CircuitOpenError
from mlproducer.observe import metrics
from mlproducer.testing import Proxy
from mlproducer.testing.audit import Journal
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import CLOSE_TIMEOUT
from tests.faults.nemesis import LIGHT, Decision, Nemesis, Victims, failures
from tests.faults.test_nemesis import HASTY
from tests.faults.traffic import LIMIT, Traffic

pytestmark = pytest.mark.broker

SEED, SECONDS = 568, 8.0
"""Each light fault is played within these seconds, and none of the long ones."""


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def producer(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, registry: CollectorRegistry
) -> Iterator[MLProducer]:
    """A producer whose connection the test can break."""
    hasty: dict[str, Any] = dict(HASTY)
    settings = Settings(url=proxy.url(rabbitmq_vhost.url), **hasty)
    with MLProducer(settings, registry=registry) as producer:
        assert producer.wait_connected(LIMIT)
        yield producer
        producer.close(CLOSE_TIMEOUT)


def total(registry: CollectorRegistry, name: str, label: str = "") -> Counter[str]:
    """Add up the series of a name, by the values of one label."""
    counts: Counter[str] = Counter()
    for series, labels, number in metrics.samples(registry):
        if series == f"ml_producer_{name}":
            counts[labels.get(label, "")] += int(number)
    return counts


def said(journal: Journal, verdict: Decision) -> Counter[str]:
    """Count the statuses that the calls' own answers amount to."""
    refused = sum(isinstance(error, CircuitOpenError) for error in journal.given_back)
    return +Counter(
        success=len(journal.receipts) - len(verdict.buried),
        failure=len(verdict.buried),
        circuit_breaker_open=refused,
        rejected=len(journal.given_back) - refused,
    )


def test_after_faults(
    rabbitmq_vhost: VirtualHost, producer: MLProducer, proxy: Proxy, registry: CollectorRegistry
) -> None:
    """Each status counts as many messages as there were calls that said so; nothing is left."""
    nemesis, victims = Nemesis(rabbitmq_vhost, proxy, SEED), Victims(producer, SEED)
    victims.start()
    try:
        nemesis.play(LIGHT, SECONDS)
    finally:
        proxy.heal()
        victims.stop()
    verdict = failures(victims, rabbitmq_vhost.url)
    counted = +total(registry, "tasks_sent_total", "status")
    print(counted, nemesis.played)
    assert counted == said(victims.journal, verdict)
    assert counted.total() == len(victims.journal)
    assert +total(registry, "task_publish_duration_seconds_count", "status") == counted
    assert total(registry, "message_size_bytes_count")[""] == counted["success"]
    assert total(registry, "dead_lettered_total")[""] == counted["failure"]
    assert total(registry, "task_retries_total")[""] == verdict.resent
    assert total(registry, "possible_duplicates_total")[""] >= verdict.account.duplicates
    assert total(registry, "pending_confirms")[""] == 0
    assert total(registry, "retry_queue_size")[""] == 0


def test_during_an_outage_and_after(
    producer: MLProducer, proxy: Proxy, registry: CollectorRegistry
) -> None:
    """With the broker out of reach, what has not ended is stored; closing ends it."""
    with Traffic(producer, threads=4) as traffic:
        traffic.more(50)
        proxy.refuse()
        proxy.reset()
        traffic.more(50)
    journal = traffic.journal
    ended = total(registry, "tasks_sent_total", "status").total()
    status = producer.status()
    assert (status.retry_queue_size > 0, status.pending_confirms) == (True, 0)
    assert len(journal) == ended + status.retry_queue_size
    assert total(registry, "retry_queue_size")[""] == status.retry_queue_size
    report = producer.close(CLOSE_TIMEOUT)
    counted = total(registry, "tasks_sent_total", "status")
    assert counted.total() == len(journal)
    given_back = sum(not isinstance(e, CircuitOpenError) for e in journal.given_back)
    assert counted["rejected"] == given_back + len(report.abandoned)
    assert len(report.abandoned) == status.retry_queue_size
