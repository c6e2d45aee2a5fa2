"""What never gets in: refused at the broker's door, or by ourselves before anything is sent."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from mlproducer import MLProducer, Outcome
from mlproducer.errors import (
    AuthenticationError,
    BufferFullError,
    InvalidMessageError,
    MessageTooLargeError,
    NotConnectedError,
    ProducerClosedError,
    PublishError,
    WouldDeadlockError,
)
from mlproducer.stores.memory import MemoryStore
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.broker.conftest import Connect
from tests.broker.rows import HEALED, assert_error, assert_healed, both_ways, failure, message
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker


def check_locked_out(producer: MLProducer, mend: Callable[[], object]) -> None:
    """Every publish raises at once, with no secret in its text, until the fault is mended."""
    let_in = threading.Event()
    producer.on("connected", let_in.set)
    for retry in (True, False):
        with in_time(1.0), pytest.raises(AuthenticationError) as caught:
            producer.publish(message(f"refused, {retry}"), retry=retry)
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


@both_ways
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"routing_key": "k" * 256}, InvalidMessageError),
        ({"body": b"x" * 1001}, MessageTooLargeError),
        ({"headers": {"h": "x" * 140_000}}, MessageTooLargeError),
    ],
    ids=["routing key", "body's size", "headers' size"],
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
    with in_time(0.5), pytest.raises(kind) as caught:
        producer.publish(message("bad", **fields), retry=retry)
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
