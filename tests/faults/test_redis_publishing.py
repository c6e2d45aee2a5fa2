"""Producers with a Redis store: what it keeps, and what they do while it is away.

Runs on: pytest's main thread.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlproducer import Outcome
from mlproducer.errors import StoreError
from mlproducer.stores.redis import RedisStore
from mlproducer.testing import Proxy
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.redis_server import RedisServer
from tests.broker.conftest import Connect
from tests.broker.rows import message
from tests.faults.traffic import LIMIT
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker

TIMEOUT = 3.0
SLACK = 1.0

Open = Callable[..., RedisStore]


def test_what_one_process_stored_another_delivers(
    rabbitmq_vhost: VirtualHost,
    connect: Connect,
    proxy: Proxy,
    redis_server: RedisServer,
    prefix: str,
) -> None:
    """A producer without a broker stores and ends; another one, elsewhere, delivers."""
    proxy.refuse()
    names = [f"m{number}" for number in range(20)]
    first = connect(
        proxy.url(rabbitmq_vhost.url), store=RedisStore(redis_server.url, prefix=prefix)
    )
    receipts = [first.publish(message(name)) for name in names]
    assert {each.outcome for each in receipts} == {Outcome.DEFERRED}
    assert all(each.durable for each in receipts)
    report = first.close(1.0)
    assert not report.abandoned
    second = connect(store=RedisStore(redis_server.url, prefix=prefix))
    second.start()
    assert second.flush(LIMIT) == 0
    assert drain(rabbitmq_vhost.url) == dict.fromkeys(names, 1)


def test_a_healthy_broker_does_not_need_the_retry_store(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_redis: RedisServer
) -> None:
    """With Redis gone or frozen, what the broker confirms is published as ever (100)."""
    producer = connect(store=RedisStore(mortal_redis.url), publish_timeout=TIMEOUT)
    assert producer.publish(message("before")).confirmed
    with mortal_redis.frozen(), in_time(SLACK):
        assert producer.publish(message("frozen")).confirmed
    mortal_redis.kill()
    assert producer.publish(message("killed")).confirmed
    assert drain(rabbitmq_vhost.url) == {"before": 1, "frozen": 1, "killed": 1}


def test_a_refused_message_is_never_sent(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_redis: RedisServer
) -> None:
    """Written ahead to a frozen Redis: an error within the timeout, and no copy afterwards."""
    store = RedisStore(f"{mortal_redis.url}?write_ahead=1", lease=1.0)
    producer = connect(store=store, publish_timeout=TIMEOUT, store_lease=1.0)
    assert producer.publish(message("before")).confirmed
    within, refused = in_time(TIMEOUT + SLACK), pytest.raises(StoreError, match=store.name)
    with mortal_redis.frozen(), within, refused:
        producer.publish(message("refused"))
    assert producer.publish(message("after")).confirmed
    assert producer.flush(LIMIT) == 0
    assert drain(rabbitmq_vhost.url) == {"before": 1, "after": 1}


def test_a_lost_answer_of_the_store_leaves_no_message(
    rabbitmq_vhost: VirtualHost, connect: Connect, redis_server: RedisServer, prefix: str
) -> None:
    """Redis has stored it and its answer is lost: the publisher's error holds."""
    with Proxy((redis_server.host, redis_server.port)) as between:
        url = f"redis://127.0.0.1:{between.port}?write_ahead=1"
        producer = connect(store=RedisStore(url, prefix=prefix), publish_timeout=TIMEOUT)
        assert producer.publish(message("before")).confirmed
        between.hole("s2c")
        with pytest.raises(StoreError):
            producer.publish(message("refused"))
        between.heal()
        assert producer.publish(message("after")).confirmed
        other = connect(store=RedisStore(redis_server.url, prefix=prefix))
        other.start()
        assert producer.flush(LIMIT) == other.flush(LIMIT) == 0
        assert drain(rabbitmq_vhost.url) == {"before": 1, "after": 1}
