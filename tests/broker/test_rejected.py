"""One bad message closes the channel under a hundred others: it alone is rejected."""

from __future__ import annotations

import secrets

import pytest

from mlproducer import Message, MLProducer, Outcome
from mlproducer.errors import BrokerRejectedError
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import STRICT_LIMIT, Connect
from tests.broker.rows import HEALED, assert_error, both_ways, failure, message

pytestmark = pytest.mark.broker


def check_rejected(
    producer: MLProducer, vhost: VirtualHost, guilty: Message, reply_code: int, *, retry: bool
) -> None:
    """The guilty message alone is rejected, alone and in company; innocents are confirmed."""
    assert producer.wait_connected(HEALED)
    with pytest.raises(BrokerRejectedError) as caught:
        producer.publish(guilty, retry=retry, timeout=HEALED)  # however slow the machine is
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
    node.set_permissions(rabbitmq_vhost.name, name, write=r"^(bookmarkai\.ml(\.dlx)?|ml\..*)$")
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.exchange_declare("forbidden", "topic")
    producer = connect(node.url_for(rabbitmq_vhost.name, name, "secret"))
    guilty = message("guilty", exchange="forbidden")
    check_rejected(producer, rabbitmq_vhost, guilty, 403, retry=retry)


@both_ways
def test_rejected_for_its_size(strict_vhost: VirtualHost, connect: Connect, *, retry: bool) -> None:
    """A body over the broker's own limit is 406, for the large message alone."""
    guilty = message("guilty", body=b"x" * (STRICT_LIMIT + 1))
    check_rejected(connect(strict_vhost.url), strict_vhost, guilty, 406, retry=retry)


def test_rejected_several_at_once(strict_vhost: VirtualHost, connect: Connect) -> None:
    """Guilty messages of two kinds among innocents: each is found, and no other message with it."""
    node = strict_vhost.node
    producer = connect(strict_vhost.url)
    assert producer.wait_connected(HEALED)
    with node.frozen():
        innocents, guilty = [], {}
        for n in range(100):
            innocents.append(producer.submit(message(f"innocent {n}"), retry=n % 2 == 0))
            if n % 20 == 0:
                lost, large = f"lost {n}", f"large {n}"
                guilty[lost] = producer.submit(message(lost, exchange=f"missing {n}")), 404
                guilty[large] = (
                    producer.submit(message(large, body=b"x" * (STRICT_LIMIT + 1 + n))),
                    406,
                )
        # written last, so that the others are in flight once its time is up
        failure(producer, message("last"), retry=True, timeout=0.3)
    for name, (future, reply_code) in guilty.items():
        error = future.exception(HEALED)
        assert isinstance(error, BrokerRejectedError)
        assert (error.message_id, error.reply_code) == (name, reply_code)
    assert [each.result(HEALED).outcome for each in innocents] == [Outcome.CONFIRMED] * 100
    assert producer.flush(HEALED) == 0
    found = drain(strict_vhost.url)
    assert found.keys() == {f"innocent {n}" for n in range(100)} | {"last"}
    assert max(found.values()) <= 2
