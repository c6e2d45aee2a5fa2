"""Every outcome of `publish()` that needs no store but memory, on a real node."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import NoneType
from typing import Any

import pytest

from mlproducer import Message, MLProducer, Outcome, Receipt
from mlproducer.errors import (
    AuthenticationError,
    BrokerBlockedError,
    BrokerRejectedError,
    BufferFullError,
    ConfirmTimeoutError,
    ConnectionLostError,
    InvalidMessageError,
    MessageTooLargeError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    PublishError,
    UnroutableError,
    WouldDeadlockError,
)
from mlproducer.stores.memory import MemoryStore
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.accounting import drain, open_channel
from tests.broker.conftest import Connect

pytestmark = pytest.mark.broker

EXCHANGE = "bookmarkai.ml"
QUEUE = "ml.embed"
HEALED = 15.0
"""Seconds within which what was deferred arrives once its fault is over, a restart included."""

both_ways = pytest.mark.parametrize("retry", [True, False], ids=["retry", "no retry"])


def message(name: str, **fields: Any) -> Message:
    """A small message to the queue of the embeddings."""
    return Message(**{"body": b"x", "routing_key": QUEUE, "message_id": name, **fields})


def failure(
    producer: MLProducer, given: Message, *, retry: bool, timeout: float = 5.0
) -> tuple[PublishError, Receipt | None]:
    """Publish what cannot be confirmed: the reason of its deferral, or the error raised.

    With ``retry`` the message must be ours, without it must be given back.
    """
    if not retry:
        with pytest.raises(PublishError) as caught:
            producer.publish(given, timeout=timeout, retry=False)
        return caught.value, None
    receipt = producer.publish(given, timeout=timeout)
    assert receipt.outcome is Outcome.DEFERRED
    assert not receipt.durable
    assert receipt.message_id == given.message_id
    assert receipt.reason is not None
    assert receipt.attempts == receipt.reason.attempts
    return receipt.reason, receipt


def assert_error(
    error: BaseException | None,
    kind: type[PublishError],
    name: str | None,
    *,
    attempts: int,
    possibly_sent: bool,
) -> None:
    """Hold an error against its row of the table."""
    assert type(error) is kind
    assert isinstance(error, PublishError)
    assert error.message_id == name
    assert (error.attempts, error.possibly_sent) == (attempts, possibly_sent)


def assert_healed(receipt: Receipt, *, attempts: int) -> None:
    """The fault is over: the message that was ours is confirmed."""
    settled = receipt.result(HEALED)
    assert settled.outcome is receipt.outcome is Outcome.CONFIRMED
    assert settled.attempts == attempts


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
    assert producer.wait_connected(5.0)
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
    assert producer.wait_connected(5.0)
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
    started = time.monotonic()
    for retry in (True, False):
        error, _ = failure(producer, message(f"first, {retry}"), retry=retry)
        assert_error(error, NotConnectedError, f"first, {retry}", attempts=0, possibly_sent=False)
    error, receipt = failure(producer, message("m"), retry=True)
    assert_error(error, NotConnectedError, "m", attempts=0, possibly_sent=False)
    assert time.monotonic() - started < 0.5
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
    started = time.monotonic()
    error, receipt = failure(producer, message("m"), retry=retry, timeout=0.4)
    assert 0.4 <= time.monotonic() - started < 0.65
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
        started = time.monotonic()
        error, receipt = failure(producer, message("m"), retry=retry, timeout=0.3)
        assert_error(error, BrokerBlockedError, "m", attempts=0, possibly_sent=False)
        assert 0.3 <= time.monotonic() - started < 0.55
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


# --- rejected: one bad message, and a hundred innocents in flight beside it -------------------


@contextmanager
def size_limit(node: RabbitMQNode, limit: int) -> Iterator[None]:
    """Lower the broker's ``max_message_size`` (bytes) for channels opened meanwhile."""
    before = node.eval("{ok, N} = application:get_env(rabbit, max_message_size), N")
    node.eval(f"application:set_env(rabbit, max_message_size, {limit})")
    try:
        yield
    finally:
        node.eval(f"application:set_env(rabbit, max_message_size, {before})")


def check_rejected(
    producer: MLProducer, vhost: VirtualHost, guilty: Message, reply_code: int, *, retry: bool
) -> None:
    """The guilty message alone is rejected, alone and in company; innocents are confirmed."""
    with pytest.raises(BrokerRejectedError) as caught:
        producer.publish(guilty, retry=retry)
    assert_error(
        caught.value, BrokerRejectedError, guilty.message_id, attempts=1, possibly_sent=False
    )
    assert caught.value.reply_code == reply_code
    assert caught.value.reply_text
    innocents = [message(f"innocent {n}") for n in range(100)]
    with vhost.node.frozen():  # so that all are in flight when the channel closes
        futures = [producer.submit(each, retry=retry) for each in innocents[:50]]
        rejected = producer.submit(guilty, retry=retry)
        futures += [producer.submit(each, retry=not retry) for each in innocents[50:]]
        # written last, so that the others are in flight once its time is up
        failure(producer, message("last"), retry=True, timeout=0.3)
    error = rejected.exception(HEALED)
    assert isinstance(error, BrokerRejectedError)
    assert (error.reply_code, error.message_id) == (reply_code, guilty.message_id)
    assert [future.result(HEALED).outcome for future in futures] == [Outcome.CONFIRMED] * 100
    assert producer.flush(HEALED) == 0
    found = drain(vhost.url)
    assert found.keys() == {f"innocent {n}" for n in range(100)} | {"last"}
    assert max(found.values()) <= 2


@both_ways
def test_rejected_for_a_missing_exchange(
    rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool
) -> None:
    """A missing exchange is 404, for the message that names it and for no other."""
    guilty = message("guilty", exchange="missing")
    check_rejected(connect(), rabbitmq_vhost, guilty, 404, retry=retry)


@both_ways
def test_rejected_for_lack_of_permission(
    rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool
) -> None:
    """An exchange to which the user may not write is 403, for the message that names it alone."""
    name, node = secrets.token_hex(4), rabbitmq_vhost.node
    node.add_user(name, "secret")
    node.set_permissions(rabbitmq_vhost.name, name, write=r"^(bookmarkai\.ml|ml\..*)$")
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.exchange_declare("forbidden", "topic")
    producer = connect(node.url_for(rabbitmq_vhost.name, name, "secret"))
    guilty = message("guilty", exchange="forbidden")
    check_rejected(producer, rabbitmq_vhost, guilty, 403, retry=retry)


@both_ways
def test_rejected_for_its_size(
    rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool
) -> None:
    """A body over the broker's own limit is 406, for the large message alone."""
    with size_limit(rabbitmq_vhost.node, 1000):
        guilty = message("guilty", body=b"x" * 1001)
        check_rejected(connect(), rabbitmq_vhost, guilty, 406, retry=retry)


def test_rejected_several_at_once(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Guilty messages of two kinds among innocents: each is found, and nobody else punished."""
    node = rabbitmq_vhost.node
    with size_limit(node, 1000):
        producer = connect()
        assert producer.wait_connected(HEALED)
        with node.frozen():
            innocents, guilty = [], {}
            for n in range(100):
                innocents.append(producer.submit(message(f"innocent {n}"), retry=n % 2 == 0))
                if n % 20 == 0:
                    lost, large = f"lost {n}", f"large {n}"
                    guilty[lost] = producer.submit(message(lost, exchange=f"missing {n}")), 404
                    guilty[large] = producer.submit(message(large, body=b"x" * (1001 + n))), 406
            # written last, so that the others are in flight once its time is up
            failure(producer, message("last"), retry=True, timeout=0.3)
        for name, (future, reply_code) in guilty.items():
            error = future.exception(HEALED)
            assert isinstance(error, BrokerRejectedError)
            assert (error.message_id, error.reply_code) == (name, reply_code)
        assert [each.result(HEALED).outcome for each in innocents] == [Outcome.CONFIRMED] * 100
        assert producer.flush(HEALED) == 0
        found = drain(rabbitmq_vhost.url)
    assert found.keys() == {f"innocent {n}" for n in range(100)} | {"last"}
    assert max(found.values()) <= 2


# --- refused at the door ----------------------------------------------------------------------


def check_locked_out(producer: MLProducer, mend: Callable[[], object]) -> None:
    """Every publish raises at once, with no secret in its text, until the fault is mended."""
    let_in = threading.Event()
    producer.on("connected", let_in.set)
    for retry in (True, False):
        started = time.monotonic()
        with pytest.raises(AuthenticationError) as caught:
            producer.publish(message(f"refused, {retry}"), retry=retry)
        assert time.monotonic() - started < 1.0
        assert_error(
            caught.value,
            AuthenticationError,
            f"refused, {retry}",
            attempts=0,
            possibly_sent=False,
        )
        assert "wrong-secret" not in str(caught.value)
    mend()
    assert let_in.wait(HEALED)
    assert producer.publish(message("m")).confirmed


def test_wrong_password(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A wrong password is an AuthenticationError at once; once it is right, messages arrive."""
    name, node = secrets.token_hex(4), rabbitmq_vhost.node
    node.add_user(name, "another")
    node.set_permissions(rabbitmq_vhost.name, name)
    change = (
        f'rabbit_auth_backend_internal:change_password(<<"{name}">>,<<"wrong-secret">>,<<"t">>)'
    )
    producer = connect(node.url_for(rabbitmq_vhost.name, name, "wrong-secret"))
    check_locked_out(producer, lambda: node.eval(change))
    assert drain(rabbitmq_vhost.url) == {"m": 1}


def test_wrong_virtual_host(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A virtual host that is not there is an AuthenticationError; once it is, messages arrive."""
    node, name = rabbitmq_vhost.node, f"late-{secrets.token_hex(4)}"
    url = node.url_for(name)
    try:
        check_locked_out(connect(url), lambda: node.add_vhost(name))
        assert drain(url) == {"m": 1}
    finally:
        node.delete_vhost(name)


# --- refused by ourselves ---------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"routing_key": "k" * 256}, InvalidMessageError),
        ({"body": "text"}, InvalidMessageError),
        ({"body": b"x" * 1001}, MessageTooLargeError),
        ({"headers": {"h": "x" * 140_000}}, MessageTooLargeError),
    ],
    ids=["routing key", "body's type", "body's size", "headers' size"],
)
def test_invalid(
    rabbitmq_vhost: VirtualHost,
    connect: Connect,
    fields: dict[str, object],
    kind: type[PublishError],
    *,
    retry: bool,
) -> None:
    """What AMQP or our limit does not carry is refused on the caller's thread, others pass."""
    producer = connect(max_message_bytes=1000)
    assert producer.publish(message("before")).confirmed
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        producer.publish(message("bad", **fields), retry=retry)
    assert time.monotonic() - started < 0.1
    assert type(caught.value) is kind
    assert (caught.value.attempts, caught.value.possibly_sent) == (0, False)
    assert producer.status().retry_queue_size == 0
    assert producer.publish(message("after")).confirmed
    assert drain(rabbitmq_vhost.url) == {"before": 1, "after": 1}


def test_store_full(rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy) -> None:
    """Without room in the store a message is given back; what the store holds is delivered."""
    proxy.refuse()
    producer = connect(proxy.url(rabbitmq_vhost.url), store=MemoryStore(max_rows=2))
    held = [producer.publish(message(f"held {n}")) for n in range(2)]
    assert [each.outcome for each in held] == [Outcome.DEFERRED] * 2
    with pytest.raises(BufferFullError) as caught:
        producer.publish(message("no room"))
    assert_error(caught.value, BufferFullError, "no room", attempts=0, possibly_sent=False)
    error, _ = failure(producer, message("needs no room"), retry=False)
    assert_error(error, NotConnectedError, "needs no room", attempts=0, possibly_sent=False)
    proxy.accept()
    for each in held:
        assert_healed(each, attempts=1)
    assert producer.publish(message("room again")).confirmed
    assert drain(rabbitmq_vhost.url) == {"held 0": 1, "held 1": 1, "room again": 1}


@both_ways
@pytest.mark.parametrize("used", [True, False], ids=["used", "never used"])
def test_closed(rabbitmq_vhost: VirtualHost, connect: Connect, *, used: bool, retry: bool) -> None:
    """After `close` every publish raises, also that of a message which is wrong anyway."""
    producer = connect()
    if used:
        assert producer.publish(message("before")).confirmed
    producer.close()
    for each in (message("m"), message("invalid", routing_key="k" * 256)):
        with pytest.raises(ProducerClosedError) as caught:
            producer.publish(each, retry=retry)
        assert (caught.value.attempts, caught.value.possibly_sent) == (0, False)
    if used:
        assert drain(rabbitmq_vhost.url) == {"before": 1}


def test_invalid_comes_before_not_connected(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy
) -> None:
    """A message that is wrong is refused as such, also without a connection."""
    proxy.refuse()
    producer = connect(proxy.url(rabbitmq_vhost.url))
    error, _ = failure(producer, message("m"), retry=True)
    assert type(error) is NotConnectedError
    with pytest.raises(InvalidMessageError):
        producer.publish(message("bad", routing_key="k" * 256))


@both_ways
def test_called_in_a_callback(
    rabbitmq_vhost: VirtualHost, connect: Connect, *, retry: bool
) -> None:
    """A publish in a callback would wait for itself: it raises, and the producer goes on."""
    producer = connect()
    raised: list[Future[PublishError]] = [Future(), Future()]

    def publish_in(outcome: Future[PublishError]) -> None:
        try:
            producer.publish(message("in a callback"), retry=retry)
        except PublishError as error:
            outcome.set_result(error)

    producer.on("connected", lambda: publish_in(raised[0]))
    producer.submit(message("before")).add_done_callback(lambda _: publish_in(raised[1]))
    for outcome in raised:
        error = outcome.result(HEALED)
        assert type(error) is WouldDeadlockError
        assert (error.attempts, error.possibly_sent) == (0, False)
    assert producer.publish(message("after"), retry=retry).confirmed
    assert drain(rabbitmq_vhost.url) == {"before": 1, "after": 1}


# --- many at once -----------------------------------------------------------------------------


def test_a_full_window(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Who finds no room in the window in time is told so, unsent; what is inside arrives once."""
    producer = connect(max_in_flight=2, publish_timeout=0.3)
    assert producer.publish(message("before")).confirmed
    with rabbitmq_vhost.node.frozen():
        inside = [producer.submit(message(f"inside {n}")) for n in range(2)]
        started = time.monotonic()
        with pytest.raises(BufferFullError) as caught:
            producer.submit(message("no room"))
        assert 0.3 <= time.monotonic() - started < 0.55
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


def test_close_gives_back_what_only_memory_held(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy
) -> None:
    """A deferred message that `close` cannot deliver is named, and its waiters are told."""
    proxy.refuse()
    producer = connect(proxy.url(rabbitmq_vhost.url))
    _, receipt = failure(producer, message("published"), retry=True)
    future = producer.submit(message("submitted"))
    report = producer.close(0.3)
    assert set(report.abandoned) == {"published", "submitted"}
    assert (report.confirmed, report.stored) == (0, 0)
    assert receipt is not None
    with pytest.raises(ProducerClosedError) as caught:
        receipt.result(HEALED)
    assert_error(caught.value, ProducerClosedError, "published", attempts=0, possibly_sent=False)
    error = future.exception(HEALED)
    assert_error(error, ProducerClosedError, "submitted", attempts=0, possibly_sent=False)
    assert receipt.outcome is Outcome.DEFERRED
