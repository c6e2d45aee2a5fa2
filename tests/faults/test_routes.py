"""What stands on the broker goes: a binding, the exchange; or one message is poison for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone

import pytest

from mlproducer import CeleryTask, Message, Outcome
from mlproducer.errors import BrokerRejectedError, RetriesExhaustedError, UnroutableError
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import STRICT_LIMIT, Connect
from tests.broker.rows import EXCHANGE, QUEUE, message
from tests.faults.traffic import FIGURES, LIMIT, Traffic, balance, tell

pytestmark = pytest.mark.broker

DEAD_LETTERS = "ml.dead_letter"

THREE_RETRIES = {
    "max_message_retries": 3,
    "message_retry_base_delay": 0.2,
    "message_retry_max_delay": 2.0,
}
"""Due 0.2, 0.4 and 0.8 s after the failures."""


def unbind(url: str) -> None:
    """Take away the way to the queue of the embeddings."""
    with open_channel(url) as channel:
        channel.queue_unbind(QUEUE, EXCHANGE, QUEUE)


def bind(url: str) -> None:
    """Give it back."""
    with open_channel(url) as channel:
        channel.queue_bind(QUEUE, EXCHANGE, QUEUE)


def test_unroutable_healed(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Unbound in a burst and bound again before the retries end: all arrive, once (40)."""
    producer = connect(
        max_message_retries=3, message_retry_base_delay=1.0, message_retry_max_delay=4.0
    )
    deferred = threading.Event()
    producer.on("deferred", deferred.set)
    with Traffic(producer, threads=8) as traffic:
        traffic.more(200)
        unbind(rabbitmq_vhost.url)
        assert deferred.wait(LIMIT)
        traffic.more(100)
        bind(rabbitmq_vhost.url)
        traffic.more(200)
    account = balance(traffic, rabbitmq_vhost.url)
    healed = sum(each.reason is not None for each in traffic.journal.receipts)
    tell("unroutable, healed", traffic, account, f", {healed} healed")
    assert healed > 0
    assert account.duplicates == 0
    assert drain(rabbitmq_vhost.url, [DEAD_LETTERS]) == {}


@pytest.mark.parametrize("way", ["publish", "submit"])
def test_unroutable_for_good(rabbitmq_vhost: VirtualHost, connect: Connect, way: str) -> None:
    """After the last retry it is a dead letter: the same body and id, and why it is there.

    The producer has never seen the route; for one that it has, the message would wait.
    """
    producer = connect(**THREE_RETRIES)
    told = threading.Event()
    producer.on("dead_lettered", told.set)
    assert producer.wait_connected(LIMIT)
    unbind(rabbitmq_vhost.url)
    before = datetime.now(timezone.utc)
    given = message("lost", body=b"the body", headers={"mine": "kept"}, priority=3)
    started = time.monotonic()
    owed = producer.publish(given) if way == "publish" else producer.submit(given)
    with pytest.raises(RetriesExhaustedError) as caught:
        owed.result(LIMIT)
    took = time.monotonic() - started
    assert (caught.value.message_id, caught.value.attempts) == ("lost", 4)
    assert isinstance(caught.value.reason, UnroutableError)
    assert told.wait(LIMIT)
    assert producer.flush(LIMIT) == 0
    assert producer.status().dead_letters == 0
    assert took >= 0.2 + 0.4 + 0.8
    with open_channel(rabbitmq_vhost.url) as channel:
        method, properties, body = channel.basic_get(DEAD_LETTERS, auto_ack=True)
        assert channel.basic_get(DEAD_LETTERS, auto_ack=True) == (None, None, None)
    assert method is not None
    assert properties is not None
    assert (body, properties.message_id, properties.priority) == (b"the body", "lost", 3)
    assert (method.exchange, method.routing_key) == ("bookmarkai.ml.dlx", QUEUE)
    headers = properties.headers or {}
    assert headers["mine"] == "kept"
    assert headers["x-death-reason"].startswith("UnroutableError")
    assert headers["x-attempts"] == 4
    assert headers["x-original-exchange"] == EXCHANGE
    assert headers["x-original-routing-key"] == QUEUE
    failed = datetime.fromisoformat(headers["x-first-failed-at"])
    assert timedelta(seconds=-0.1) < failed - before < timedelta(seconds=LIMIT)
    assert drain(rabbitmq_vhost.url) == {}


def test_route_that_was_there(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A message waits for a route that has been confirmed, beyond its retries, and arrives once."""
    producer = connect(
        max_message_retries=1, message_retry_base_delay=0.1, message_retry_max_delay=0.3
    )
    assert producer.publish(message("before")).confirmed
    unbind(rabbitmq_vhost.url)
    receipt = producer.publish(message("waits"))
    assert isinstance(receipt.reason, UnroutableError)
    with pytest.raises(TimeoutError):
        receipt.result(2.0)
    bind(rabbitmq_vhost.url)
    settled = receipt.result(LIMIT)
    assert settled.confirmed
    assert settled.attempts > 2
    assert drain(rabbitmq_vhost.url) == {"before": 1, "waits": 1}
    assert drain(rabbitmq_vhost.url, [DEAD_LETTERS]) == {}


def test_dead_letter_of_a_celery_task(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A task's dead letter keeps the task's headers and body, so that it can be replayed."""
    producer = connect(**THREE_RETRIES)
    task = CeleryTask("some.task", ["argument"], routing_key="nowhere", task_id="task-1")
    with pytest.raises(RetriesExhaustedError):
        producer.publish(task).result(LIMIT)
    with open_channel(rabbitmq_vhost.url) as channel:
        _, properties, body = channel.basic_get(DEAD_LETTERS, auto_ack=True)
    assert properties is not None
    headers = properties.headers or {}
    assert (headers["task"], headers["id"]) == ("some.task", "task-1")
    assert properties.correlation_id == properties.message_id == "task-1"
    assert body is not None
    assert b'"argument"' in body
    assert headers["x-original-routing-key"] == "nowhere"


def test_dead_letter_that_nobody_takes(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Without a queue for dead letters it stays in the store as dead, until there is one (102)."""
    producer = connect(
        max_message_retries=0, message_retry_base_delay=0.1, message_retry_max_delay=0.5
    )
    assert producer.publish(message("before")).confirmed
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_unbind(DEAD_LETTERS, "bookmarkai.ml.dlx", "#")
    receipt = producer.publish(message("lost", routing_key="nowhere"))
    assert receipt.outcome is Outcome.DEFERRED
    with pytest.raises(TimeoutError):
        receipt.result(1.5)
    status = producer.status()
    assert (status.dead_letters, status.retry_queue_size) == (1, 0)
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_bind(DEAD_LETTERS, "bookmarkai.ml.dlx", "#")
    with pytest.raises(RetriesExhaustedError):
        receipt.result(LIMIT)
    assert producer.status().dead_letters == 0
    assert drain(rabbitmq_vhost.url, [DEAD_LETTERS]) == {"lost": 1}


def elsewhere(number: int) -> Message:
    """A message by the default exchange, which cannot be deleted."""
    return Message(body=b"x", exchange="", routing_key=QUEUE, message_id=f"other{number}")


def test_exchange_deleted(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Deleted in a burst, it is declared again; who uses another is held up for < 1 s (43)."""
    producer = connect()
    busy = Traffic(producer, threads=8)
    bystanders = Traffic(producer, threads=2, make=elsewhere)
    with busy, bystanders:
        for _ in range(3):
            busy.more(200)
            with open_channel(rabbitmq_vhost.url) as channel:
                channel.exchange_delete(EXCHANGE)
            busy.more(200)
            bystanders.more(20)
    assert producer.flush(LIMIT) == 0
    found = drain(rabbitmq_vhost.url)
    theirs = Counter({name: n for name, n in found.items() if name.startswith("other")})
    account, other = busy.journal.check(found - theirs), bystanders.journal.check(theirs)
    refused = busy.journal.given_back
    tell("exchange deleted x 3", busy, account, f", {len(refused)} refused with 404")
    FIGURES["exchange deleted, others"] = f"longest publish {bystanders.longest:.3f} s"
    assert account.lost == account.leaked == other.lost == other.leaked == frozenset()
    assert account.foreign == other.foreign == frozenset()
    assert {getattr(error, "reply_code", None) for error in refused} <= {404}
    assert account.duplicates + other.duplicates <= 3 * 10
    assert bystanders.journal.given_back == []
    assert bystanders.own < 1.0


def test_poison_in_a_burst(strict_vhost: VirtualHost, connect: Connect) -> None:
    """Ten bodies over the broker's limit, one by one: each alone is refused, with 406 (70)."""
    producer = connect(strict_vhost.url)
    with Traffic(producer, threads=8) as traffic:
        for n in range(10):
            traffic.more(30)
            with pytest.raises(BrokerRejectedError) as caught:
                producer.publish(message(f"poison {n}", body=b"x" * (STRICT_LIMIT + 1)))
            assert (caught.value.message_id, caught.value.reply_code) == (f"poison {n}", 406)
        traffic.more(30)
    assert producer.flush(LIMIT) == 0
    account = traffic.journal.check(drain(strict_vhost.url))
    tell("poison x 10", traffic, account)
    assert traffic.journal.given_back == []
    assert account.lost == account.foreign == frozenset()
    assert account.duplicates <= 10 * 8
    assert traffic.own < 1.0
