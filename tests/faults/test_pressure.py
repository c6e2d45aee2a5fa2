"""A broker that has no room: it blocks its publishers, or a queue of it rejects."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from mlproducer import Message, MLProducer, Outcome
from mlproducer.errors import NackError, ProducerClosedError
from mlproducer.observe.callbacks import DeliveryFuture
from mlproducer.testing.audit import Journal, drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.rows import EXCHANGE, message
from tests.faults.traffic import LIMIT, SLACK, Traffic, balance, tell
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker


def submit_until_blocked(producer: MLProducer) -> list[DeliveryFuture]:
    """Submit until the broker blocks; its alarm takes a moment, and is told to who publishes."""
    blocked = threading.Event()
    producer.on("blocked", blocked.set)
    early: list[DeliveryFuture] = []
    deadline = time.monotonic() + LIMIT
    while not blocked.wait(0.1):
        assert time.monotonic() < deadline
        early.append(producer.submit(message(f"early {len(early)}")))
    return early


def take(url: str, queue: str) -> Counter[str]:
    """Empty a queue that may be too full for a marker."""
    found: Counter[str] = Counter()
    with open_channel(url) as channel:
        while (got := channel.basic_get(queue, auto_ack=True))[0] is not None:
            found[got[1].message_id] += 1
    return found


def test_memory_alarm(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """An alarm of 3 s in a burst: nothing lost, nothing twice, and no new connection (32)."""
    producer = connect(publish_timeout=1.0, health_check_interval=0.5)
    disconnected = threading.Event()
    blocked = threading.Event()
    producer.on("disconnected", disconnected.set)
    producer.on("blocked", blocked.set)
    with Traffic(producer) as traffic:
        traffic.more(500)
        with rabbitmq_vhost.node.memory_alarm():
            assert blocked.wait(LIMIT)
            assert not producer.is_healthy()
            traffic.last(3.0)
        traffic.more(500)
    account = balance(traffic, rabbitmq_vhost.url)
    tell("memory alarm for 3 s", traffic, account)
    assert not disconnected.is_set()
    assert account.duplicates == 0
    assert traffic.own < 1.0 + SLACK


def test_close_while_blocked(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """close() is back in time although the broker reads nothing, and names what is left (35)."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with rabbitmq_vhost.node.memory_alarm():
        early = submit_until_blocked(producer)
        waits = producer.submit(message("waits"))
        with in_time(1.5, 1.0):
            report = producer.close(1.0)
    unconfirmed = {each.message_id for each in early if each.exception(0) is not None}
    assert len(unconfirmed) >= 1
    assert set(report.abandoned) == unconfirmed | {"waits"}
    assert isinstance(waits.exception(0), ProducerClosedError)
    found = drain(rabbitmq_vhost.url)
    assert found.keys() >= {each.message_id for each in early} - unconfirmed
    assert "waits" not in found


def test_queue_full(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """What a full queue rejects waits until it is drained; the others go on meanwhile (36)."""
    producer = connect(message_retry_base_delay=0.2, message_retry_max_delay=0.5)
    assert producer.wait_connected(LIMIT)
    journal = Journal()
    limits = {"x-max-length": 10, "x-overflow": "reject-publish"}
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_declare("small", durable=True, arguments=limits)
        channel.queue_bind("small", EXCHANGE, "small")
    for n in range(30):
        journal.publish(producer, message(f"small {n}", routing_key="small"))
    rejected = [each for each in journal.receipts if each.outcome is Outcome.DEFERRED]
    assert len(rejected) == 20
    assert {type(each.reason) for each in rejected} == {NackError}
    with Traffic(producer, threads=4) as traffic:
        traffic.more(200)
    assert traffic.journal.count(Outcome.CONFIRMED) == len(traffic.journal)
    found = take(rabbitmq_vhost.url, "small")
    deadline = time.monotonic() + LIMIT
    while producer.flush(0.3):
        assert time.monotonic() < deadline
        found += take(rabbitmq_vhost.url, "small")
    found += take(rabbitmq_vhost.url, "small")
    account = journal.check(found)
    assert account.lost == account.leaked == account.foreign == frozenset()
    assert account.duplicates == 0
    assert balance(traffic, rabbitmq_vhost.url).duplicates == 0


def test_drop_head_is_not_seen(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A queue that drops its head confirms what it then forgets: no publisher can know (37)."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_declare("forgets", durable=True, arguments={"x-max-length": 1})
        channel.queue_bind("forgets", EXCHANGE, "forgets")
    for n in range(3):
        assert producer.publish(message(f"m{n}", routing_key="forgets")).confirmed
    with open_channel(rabbitmq_vhost.url) as channel:
        _, properties, _ = channel.basic_get("forgets", auto_ack=True)
    assert properties is not None
    assert properties.message_id == "m2"


def test_large_bodies_under_an_alarm(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """200 bodies of 64 kB submitted under an alarm wait unwritten, and arrive once each."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with rabbitmq_vhost.node.memory_alarm():
        early = submit_until_blocked(producer)
        pending = producer.status().pending_confirms
        large = Message(body=b"x" * 65_536, routing_key="ml.embed")
        late = [producer.submit(large) for _ in range(200)]
        assert producer.status().pending_confirms == pending
    assert [each.result(LIMIT).attempts for each in early + late] == [1] * (len(early) + 200)
    assert drain(rabbitmq_vhost.url) == {each.message_id: 1 for each in early + late}
