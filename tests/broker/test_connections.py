"""Several connections of one producer: one that the broker refuses, and an outage of all."""

from __future__ import annotations

import threading
import time

import pytest

from mlproducer import Message, Outcome
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.audit import Journal, drain
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.users import delete_user, limit_user

pytestmark = pytest.mark.broker

LIMIT = 60.0
USER, PASSWORD = "lone", "secret-of-lone"


def message(number: int) -> Message:
    """Return a small one that is routed."""
    return Message(body=b"x", routing_key="ml.embed", message_id=f"m{number}")


def test_the_user_has_room_for_one(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A second connection that the broker refuses for good takes no message with it."""
    node = rabbitmq_vhost.node
    node.add_user(USER, PASSWORD)
    try:
        node.set_permissions(rabbitmq_vhost.name, user=USER)
        limit_user(node, USER, "max-connections", 1)
        url = node.url_for(rabbitmq_vhost.name, USER, PASSWORD)
        producer = connect(url, connections=2, max_reconnect_attempts=3)
        receipts = []
        threads = [
            threading.Thread(target=lambda n=n: receipts.append(producer.publish(message(n))))
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        receipts += producer.publish_many(message(n) for n in range(16, 500))
        assert {receipt.outcome for receipt in receipts} == {Outcome.CONFIRMED}
        assert producer.is_healthy()
        assert producer.flush(LIMIT) == 0
        producer.close(1.0)
    finally:
        delete_user(node, USER)
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(500)}


def test_an_outage_of_all(
    mortal_node: RabbitMQNode, rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """What each connection held is delivered once the broker is back, by one further publish."""
    producer = connect(connections=3, max_reconnect_attempts=2, publish_timeout=0.5)
    journal = Journal()
    for n in range(100):
        journal.publish(producer, message(n))
    gave_up = threading.Semaphore(0)
    producer.on("gave_up", lambda _event: gave_up.release())
    mortal_node.stop()
    for n in range(100, 200):
        journal.publish(producer, message(n))
    for _ in range(3):
        assert gave_up.acquire(timeout=LIMIT)
    for n in range(200, 220):
        journal.publish(producer, message(n))
    mortal_node.restart()
    started = time.monotonic()
    journal.publish(producer, message(220))
    assert producer.flush(LIMIT) == 0
    print(f"\noutage of three connections: all delivered {time.monotonic() - started:.2f} s later")
    arrived = drain(rabbitmq_vhost.url)
    assert arrived.keys() == {f"m{n}" for n in range(221)}
