"""What the broker, or the lack of one, makes of a `publish()`, each with and without retry."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import NoneType

import pytest

from mlproducer import Outcome, Receipt
from mlproducer.errors import (
    BrokerBlockedError,
    BrokerRejectedError,
    BufferFullError,
    ConfirmTimeoutError,
    ConnectionLostError,
    InvalidMessageError,
    NackError,
    NotConnectedError,
    UnroutableError,
)
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.broker.conftest import Connect
from tests.broker.rows import (
    EXCHANGE,
    HEALED,
    QUEUE,
    assert_error,
    assert_healed,
    both_ways,
    failure,
    message,
)
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker


@both_ways
def test_confirmed(rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """An ack without a return is CONFIRMED, and the message is in the queue once."""
    producer = connect()
    receipt = producer.publish(message("m"), retry=retry)
    assert receipt.outcome is Outcome.CONFIRMED
    assert (receipt.attempts, receipt.reason, receipt.durable) == (1, None, True)
    assert receipt.result(0) is receipt
    assert drain(rabbitmq_vhost.url) == {"m": 1}


@both_ways
def test_unroutable(rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """Without a binding the message comes back with 312; after the re-bind a sweep delivers it."""
    producer = connect()
    assert producer.wait_connected(30.0)
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_unbind(QUEUE, EXCHANGE, QUEUE)
        error, receipt = failure(producer, message("m"), retry=retry)
        assert_error(error, UnroutableError, "m", attempts=1, possibly_sent=False)
        assert isinstance(error, UnroutableError)
        assert (error.reply_code, error.reply_text) == (312, "NO_ROUTE")
        channel.queue_bind(QUEUE, EXCHANGE, QUEUE)
    if receipt is not None:
        assert_healed(receipt, attempts=2)
    assert producer.flush(HEALED) == 0
    assert drain(rabbitmq_vhost.url) == ({"m": 1} if retry else {})


@both_ways
def test_nacked(rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """A full queue that rejects is a NackError; once there is room a sweep delivers the message."""
    producer = connect()
    assert producer.wait_connected(30.0)
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.queue_declare("small", durable=True, arguments=limits)
        channel.queue_bind("small", EXCHANGE, "small")
        assert producer.publish(message("fills", routing_key="small")).confirmed
        error, receipt = failure(producer, message("m", routing_key="small"), retry=retry)
        assert_error(error, NackError, "m", attempts=1, possibly_sent=True)
        channel.queue_purge("small")
        if receipt is not None:
            assert_healed(receipt, attempts=2)
        assert producer.flush(HEALED) == 0
        _, properties, _ = channel.basic_get("small", auto_ack=True)
        assert (properties and properties.message_id) == ("m" if retry else None)


@both_ways
def test_confirm_timeout(rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """A frozen broker is a ConfirmTimeoutError; thawed, its late ack settles the only copy."""
    producer = connect()
    assert producer.publish(message("before")).confirmed
    with rabbitmq_vhost.node.frozen():
        error, receipt = failure(producer, message("m"), retry=retry, timeout=0.3)
        assert_error(error, ConfirmTimeoutError, "m", attempts=1, possibly_sent=True)
        assert isinstance(error, TimeoutError)
        if receipt is not None:
            with pytest.raises(TimeoutError):  # sweeps pass meanwhile, and must leave it alone
                receipt.result(0.8)
    if receipt is not None:
        assert_healed(receipt, attempts=1)
    assert producer.flush(HEALED) == 0
    assert drain(rabbitmq_vhost.url) == {"before": 1, "m": 1}


def test_a_killed_broker(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_node: RabbitMQNode
) -> None:
    """What was in flight is lost with the connection; after the restart all that was ours arrives.

    The broker was frozen before it was killed, so it has seen nothing, and no copy is there twice.
    """
    producer = connect()
    assert producer.publish(message("before")).confirmed
    mortal_node.save_queues()  # they were declared a moment ago
    mortal_node.freeze()
    kept = [producer.submit(message(f"kept {n}")) for n in range(50)]
    back = [producer.submit(message(f"given back {n}"), retry=False) for n in range(50)]
    # Written after all the others, so that they are in flight once its time is up.
    error, _ = failure(producer, message("last"), retry=False, timeout=0.3)
    assert_error(error, ConfirmTimeoutError, "last", attempts=1, possibly_sent=True)
    mortal_node.kill()
    for n, future in enumerate(back):
        lost = future.exception(HEALED)
        assert_error(lost, ConnectionLostError, f"given back {n}", attempts=1, possibly_sent=True)
    mortal_node.restart()
    assert [future.result(HEALED).attempts for future in kept] == [2] * 50
    assert drain(rabbitmq_vhost.url) == {"before": 1} | {f"kept {n}": 1 for n in range(50)}


def reset_on_arrival(url: str, proxy: Proxy, name: str) -> None:
    """Reset the proxy's connections once the queue holds a message, whose ack is swallowed."""
    proxy.hole("s2c")
    with open_channel(url) as channel:
        for _, properties, _ in channel.consume(QUEUE, inactivity_timeout=HEALED):
            if properties is None or properties.message_id == name:
                break
    proxy.refuse()
    proxy.reset()
    proxy.heal()
    proxy.accept()


@both_ways
def test_connection_lost(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, *, retry: bool
) -> None:
    """A connection lost between write and ack may have delivered: what was ours is sent again."""
    producer = connect(proxy.url(rabbitmq_vhost.url))
    assert producer.publish(message("before")).confirmed
    with ThreadPoolExecutor(1) as pool:
        resetting = pool.submit(reset_on_arrival, rabbitmq_vhost.url, proxy, "m")
        error, receipt = failure(producer, message("m"), retry=retry, timeout=HEALED)
        resetting.result(HEALED)
    assert_error(error, ConnectionLostError, "m", attempts=1, possibly_sent=True)
    assert isinstance(error, ConnectionLostError)
    assert error.address == f"127.0.0.1:{proxy.port}"
    if receipt is not None:
        assert_healed(receipt, attempts=2)
    assert producer.flush(HEALED) == 0
    assert drain(rabbitmq_vhost.url) == {"before": 1, "m": 1 + retry}


def test_not_connected(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_node: RabbitMQNode
) -> None:
    """With the broker stopped every publish is answered at once; what was ours arrives once."""
    mortal_node.stop()
    producer = connect()
    with in_time(0.5):
        for retry in (True, False):
            error, _ = failure(producer, message(f"first, {retry}"), retry=retry)
            assert_error(
                error, NotConnectedError, f"first, {retry}", attempts=0, possibly_sent=False
            )
        error, receipt = failure(producer, message("m"), retry=True)
        assert_error(error, NotConnectedError, "m", attempts=0, possibly_sent=False)
    mortal_node.restart()
    assert receipt is not None
    assert_healed(receipt, attempts=1)
    assert producer.flush(HEALED) == 0
    assert drain(rabbitmq_vhost.url) == {"first, True": 1, "m": 1}


@both_ways
def test_still_connecting(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, *, retry: bool
) -> None:
    """While the first attempt goes on a publish waits its time, and then is as not connected."""
    proxy.deaf()
    producer = connect(proxy.url(rabbitmq_vhost.url), connection_timeout=1.0)
    with in_time(0.65, 0.4):
        error, receipt = failure(producer, message("m"), retry=retry, timeout=0.4)
    assert_error(error, NotConnectedError, "m", attempts=0, possibly_sent=False)
    proxy.accept()
    if receipt is not None:
        assert_healed(receipt, attempts=1)
    assert producer.wait_connected(HEALED)
    assert producer.flush(HEALED) == 0
    assert drain(rabbitmq_vhost.url) == ({"m": 1} if retry else {})


@both_ways
def test_blocked(rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """Under a memory alarm a publish waits its time, unwritten; afterwards it arrives once.

    RabbitMQ says Blocked when it is given a message, so the first one of the alarm is written.
    """
    producer = connect()
    assert producer.publish(message("before")).confirmed
    with rabbitmq_vhost.node.memory_alarm():
        error, early = failure(producer, message("early"), retry=True, timeout=0.3)
        assert_error(error, ConfirmTimeoutError, "early", attempts=1, possibly_sent=True)
        assert producer.status().blocked
        assert not producer.is_healthy()
        with in_time(0.55, 0.3):
            error, receipt = failure(producer, message("m"), retry=retry, timeout=0.3)
            assert_error(error, BrokerBlockedError, "m", attempts=0, possibly_sent=False)
    for each in filter(None, (early, receipt)):
        assert_healed(each, attempts=1)
    assert producer.flush(HEALED) == 0
    assert producer.is_healthy()
    expected = {"before": 1, "early": 1} | ({"m": 1} if retry else {})
    assert drain(rabbitmq_vhost.url) == expected


def test_a_publish_waits_for_the_end_of_an_alarm(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """An alarm that ends within a publish's time costs it only the wait."""
    producer = connect()
    blocked = threading.Event()
    producer.on("blocked", blocked.set)
    with ThreadPoolExecutor(2) as pool:
        with rabbitmq_vhost.node.memory_alarm():
            calls = [pool.submit(producer.publish, message("early"))]
            assert blocked.wait(HEALED)
            calls.append(pool.submit(producer.publish, message("m")))
        receipts = [call.result(HEALED) for call in calls]
    assert [(each.outcome, each.reason) for each in receipts] == [(Outcome.CONFIRMED, None)] * 2
    assert drain(rabbitmq_vhost.url) == {"early": 1, "m": 1}


def test_a_full_window(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Who finds no room in the window in time is told so, unsent; what is inside arrives once."""
    producer = connect(max_in_flight=2, publish_timeout=0.3)
    assert producer.publish(message("before"), timeout=HEALED).confirmed  # it connects first
    with rabbitmq_vhost.node.frozen():
        inside = [producer.submit(message(f"inside {n}")) for n in range(2)]
        with in_time(0.55, 0.3), pytest.raises(BufferFullError) as caught:
            producer.submit(message("no room"))
        assert_error(caught.value, BufferFullError, "no room", attempts=0, possibly_sent=False)
        error, waits = failure(producer, message("waits"), retry=True, timeout=0.3)
        assert_error(error, ConfirmTimeoutError, "waits", attempts=0, possibly_sent=False)
        error, _ = failure(producer, message("given back"), retry=False, timeout=0.3)
        assert_error(error, ConfirmTimeoutError, "given back", attempts=0, possibly_sent=False)
    assert waits is not None
    assert_healed(waits, attempts=1)
    assert [each.result(HEALED).attempts for each in inside] == [1, 1]
    expected = dict.fromkeys(["before", "inside 0", "inside 1", "waits"], 1)
    assert drain(rabbitmq_vhost.url) == expected


def test_not_mandatory(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A message that asks for no return is confirmed although no queue gets it."""
    producer = connect()
    many = [message(f"m{n}", routing_key="nowhere", mandatory=n % 2 == 0) for n in range(4)]
    many.append(message("routed", mandatory=False))
    answers = producer.publish_many(many, retry=False)
    assert [type(each) for each in answers] == [UnroutableError, Receipt] * 2 + [Receipt]
    assert drain(rabbitmq_vhost.url) == {"routed": 1}


def test_publish_many_answers_each_in_its_place(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """What is wrong with one message does not touch its neighbours, and order is kept."""
    wrong = {
        1: ({"routing_key": "k" * 256}, InvalidMessageError),
        3: ({"routing_key": "nowhere"}, UnroutableError),
        5: ({"exchange": "missing"}, BrokerRejectedError),
    }
    tasks = (message(f"m{n}", **wrong.get(n, ({}, None))[0]) for n in range(8))
    answers = connect().publish_many(tasks, retry=False)
    for n, answer in enumerate(answers):
        if n in wrong:
            assert type(answer) is wrong[n][1]
        else:
            assert isinstance(answer, Receipt)
            assert (answer.message_id, answer.outcome) == (f"m{n}", Outcome.CONFIRMED)
    assert drain(rabbitmq_vhost.url).keys() == {f"m{n}" for n in range(8)} - {"m1", "m3", "m5"}


def test_two_messages_of_one_id(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Messages in flight that share an id each get their own outcome."""
    producer = connect()
    assert producer.wait_connected(HEALED)
    with rabbitmq_vhost.node.frozen():
        keys = [QUEUE, "nowhere"] * 10
        futures = [producer.submit(message("m", routing_key=key), retry=False) for key in keys]
    for key, future in zip(keys, futures, strict=True):
        expected = NoneType if key == QUEUE else UnroutableError
        assert type(future.exception(HEALED)) is expected
    assert drain(rabbitmq_vhost.url) == {"m": 10}
