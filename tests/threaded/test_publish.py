"""Confirms, nacks and returns in every order that a broker may choose."""

from __future__ import annotations

import random

import pytest

from mlproducer import Message, Outcome, Receipt
from mlproducer.errors import (
    ConfirmTimeoutError,
    ConnectionLostError,
    NackError,
    UnroutableError,
)
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, make_message
from tests.threaded.brokers import Silent, ack, give_back, nack
from tests.threaded.conftest import Connect, Serve

SHORT = 0.15


def test_confirmed(connect: Connect, serve: Serve) -> None:
    """The broker's ack is the receipt, and what it got is what was published."""
    broker = serve()
    message = Message(
        body=b"\x00body", routing_key="ml.k", exchange="x", headers={"n": 1}, message_id="m"
    )
    receipt = connect(broker).publish(message)
    assert (receipt.message_id, receipt.outcome, receipt.attempts) == ("m", Outcome.CONFIRMED, 1)
    assert 0 < receipt.elapsed < LIMIT
    [arrived] = broker.messages
    assert (arrived.exchange, arrived.routing_key, arrived.body) == ("x", "ml.k", b"\x00body")
    assert (arrived.properties.message_id, arrived.properties.headers) == ("m", {"n": 1})
    assert arrived.mandatory
    assert arrived.properties.delivery_mode == 2


def test_ack_before_the_write_returns(connect: Connect, serve: Serve) -> None:
    """Acks that are there at once, by the hundred, are all taken (53)."""
    producer = connect(serve())
    assert all(producer.publish(make_message()).confirmed for _ in range(300))
    assert producer.status().pending_confirms == 0


def test_late_ack(connect: Connect, serve: Serve) -> None:
    """An ack after the deadline makes the receipt CONFIRMED; nothing is sent again (31)."""
    broker = serve(Silent())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    receipt = producer.publish(make_message("m"), timeout=SHORT)
    assert receipt.outcome is Outcome.DEFERRED
    assert isinstance(receipt.reason, ConfirmTimeoutError)
    assert receipt.reason.possibly_sent
    with pytest.raises(TimeoutError):
        receipt.result(SHORT)
    status = producer.status()
    assert (status.pending_confirms, status.retry_queue_size) == (1, 1)
    [message] = broker.wait_for_messages(1, LIMIT)
    ack(message)
    assert receipt.result(LIMIT).confirmed
    assert receipt.confirmed
    assert producer.flush(LIMIT) == 0
    assert len(broker.messages) == 1
    status = producer.status()
    assert (status.pending_confirms, status.retry_queue_size) == (0, 0)


def test_late_ack_without_retry(connect: Connect, serve: Serve) -> None:
    """The error stands, and its message is never sent again, even when the channel is lost."""
    broker = serve(Silent())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    with pytest.raises(ConfirmTimeoutError) as caught:
        producer.publish(make_message("m"), timeout=SHORT, retry=False)
    assert (caught.value.message_id, caught.value.possibly_sent) == ("m", True)
    broker.connections[0].reset()
    assert broker.wait_for_connections(1, LIMIT)
    later = producer.submit(make_message("later"))
    broker.wait_for_messages(2, LIMIT)
    assert [each.properties.message_id for each in broker.messages] == ["m", "later"]
    ack(broker.messages[1])
    assert later.result(LIMIT).confirmed


def test_deadline_and_ack_at_the_same_time(connect: Connect, serve: Serve) -> None:
    """Around the deadline the answer and what becomes of the message agree (30)."""
    timeout = 0.1

    class AtTheEdge(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            delay = timeout + random.uniform(-0.02, 0.02)
            connection.later(delay, connection.ack, channel, tag)

    broker = serve(AtTheEdge())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    receipts = [
        each
        for _ in range(10)
        for each in producer.publish_many([make_message() for _ in range(20)], timeout=timeout)
    ]
    for receipt in receipts:
        assert isinstance(receipt, Receipt)
        assert receipt.result(LIMIT).confirmed
        assert receipt.outcome is Outcome.CONFIRMED
    assert producer.flush(LIMIT) == 0
    assert len(broker.messages) == 200


def test_multiple_acks(connect: Connect, serve: Serve) -> None:
    """One ack for a range settles that range (50)."""
    broker = serve(Silent())
    producer = connect(broker)
    futures = [producer.submit(make_message()) for _ in range(5)]
    messages = broker.wait_for_messages(5, LIMIT)
    ack(messages[2], multiple=True)
    assert all(future.result(LIMIT).confirmed for future in futures[:3])
    assert not any(future.done() for future in futures[3:])
    messages[0].connection.ack(messages[0].channel, 0, multiple=True)
    assert all(future.result(LIMIT).confirmed for future in futures)


def test_acks_out_of_order(connect: Connect, serve: Serve) -> None:
    """Each ack settles its own message, whatever came before it (51)."""
    broker = serve(Silent())
    producer = connect(broker)
    futures = {}
    for _ in range(50):
        future = producer.submit(make_message())
        futures[future.message_id] = future
    messages = broker.wait_for_messages(50, LIMIT)
    random.shuffle(messages)
    for message in messages:
        ack(message)
        receipt = futures.pop(message.properties.message_id).result(LIMIT)
        assert receipt.message_id == message.properties.message_id
        assert not any(future.done() for future in futures.values())


def test_foreign_tags(connect: Connect, serve: Serve) -> None:
    """Duplicate, unknown and future tags settle nothing, and the connection lives on (52)."""
    broker = serve(Silent())
    producer = connect(broker)
    first, second = producer.submit(make_message()), producer.submit(make_message())
    one, two = broker.wait_for_messages(2, LIMIT)
    connection, channel = one.connection, one.channel
    for multiple in (True, False):
        connection.ack(channel, 3, multiple=multiple)
        connection.nack(channel, 2**63, multiple=multiple)
    connection.ack(channel, 0)
    ack(one)
    nack(one)
    ack(one)
    assert first.result(LIMIT).confirmed
    assert not second.done()
    ack(two)
    assert second.result(LIMIT).confirmed
    assert broker.accepted == 1


def test_nack(connect: Connect, serve: Serve) -> None:
    """A refused message is its publisher's, or is sent again until it is taken (51)."""

    class TakesNothingTwice(Behaviour):
        refusals = 2

        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            self.refusals -= 1
            (connection.ack if self.refusals < 0 else connection.nack)(channel, tag)

    broker = serve(TakesNothingTwice())
    producer = connect(broker)
    with pytest.raises(NackError) as caught:
        producer.publish(make_message(), retry=False)
    assert (caught.value.attempts, caught.value.possibly_sent) == (1, True)
    receipt = producer.publish(make_message("kept"))
    assert receipt.outcome is Outcome.DEFERRED
    assert isinstance(receipt.reason, NackError)
    assert receipt.result(LIMIT).attempts == 2
    assert receipt.confirmed
    ids = [each.properties.message_id for each in broker.messages]
    assert ids[1:] == ["kept", "kept"]


def test_nack_inside_a_range(connect: Connect, serve: Serve) -> None:
    """A nack picks one out of what a multiple ack then settles (51)."""
    broker = serve(Silent())
    producer = connect(broker)
    futures = [producer.submit(make_message(), retry=False) for _ in range(5)]
    messages = broker.wait_for_messages(5, LIMIT)
    nack(messages[2])
    ack(messages[3], multiple=True)
    nack(messages[4], multiple=True)
    errors = [future.exception(LIMIT) for future in futures]
    assert [type(error) for error in errors] == [
        type(None),
        type(None),
        NackError,
        type(None),
        NackError,
    ]


def test_returns_among_many(connect: Connect, serve: Serve) -> None:
    """With 500 in flight, half of them returned and ids used twice, each gets its own (41)."""
    broker = serve(Silent())
    producer = connect(broker)
    tasks = [
        Message(body=b"%d" % number, routing_key="k", message_id=f"same-{number // 4}")
        for number in range(500)
    ]
    futures = [producer.submit(task, retry=False) for task in tasks]
    messages = broker.wait_for_messages(500, LIMIT)
    lost = {number for number in range(500) if number % 2}
    for message in messages:
        if int(message.body) in lost:
            give_back(message)
        if message.tag % 50 == 0:
            ack(message, multiple=True)
    for number, future in enumerate(futures):
        error = future.exception(LIMIT)
        assert (type(error) is UnroutableError) == (number in lost)
        if isinstance(error, UnroutableError):
            assert (error.reply_code, error.reply_text) == (312, "NO_ROUTE")
            assert error.message_id == f"same-{number // 4}"
            assert not error.possibly_sent


def test_a_return_is_no_property_of_the_user(connect: Connect, serve: Serve) -> None:
    """What a return is matched by does not come from the user, and a foreign one is ignored."""
    broker = serve(Silent())
    producer = connect(broker)
    future = producer.submit(make_message("m"))
    [message] = broker.wait_for_messages(1, LIMIT)
    message.properties.cluster_id = "77"
    give_back(message)
    message.properties.cluster_id = None
    give_back(message)
    message.properties.cluster_id = "x" * 20
    give_back(message)
    ack(message)
    assert future.result(LIMIT).confirmed


def test_lost_between_write_and_ack(connect: Connect, serve: Serve) -> None:
    """An ack that the network ate: sent again under the same id, once (16)."""
    broker = serve(Silent())
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url))
        future = producer.submit(make_message("m"))
        [first] = broker.wait_for_messages(1, LIMIT)
        proxy.refuse()
        proxy.hole("s2c")
        ack(first)
        proxy.reset()
        proxy.heal()
        proxy.accept()
        [_, second] = broker.wait_for_messages(2, LIMIT)
        assert (second.properties.message_id, second.body) == ("m", first.body)
        assert second.tag == 1
        ack(second)
        assert future.result(LIMIT).attempts == 2
        producer.close(1.0)
    assert len(broker.messages) == 2


def test_lost_without_retry(connect: Connect, serve: Serve) -> None:
    """A caller that wants it back gets it, and is told that the broker may have it."""
    broker = serve(Silent())
    producer = connect(broker)
    future = producer.submit(make_message("m"), retry=False)
    [message] = broker.wait_for_messages(1, LIMIT)
    message.connection.reset()
    error = future.exception(LIMIT)
    assert isinstance(error, ConnectionLostError)
    assert (error.message_id, error.attempts, error.possibly_sent) == ("m", 1, True)
    assert producer.wait_connected(LIMIT)
    assert len(broker.messages) == 1


def test_two_with_one_id(connect: Connect, serve: Serve) -> None:
    """Two messages in flight may share an id; each has its own outcome."""
    broker = serve(Silent())
    producer = connect(broker)
    futures = [producer.submit(make_message("same"), retry=False) for _ in range(2)]
    one, two = broker.wait_for_messages(2, LIMIT)
    nack(two)
    assert isinstance(futures[1].exception(LIMIT), NackError)
    assert not futures[0].done()
    ack(one)
    assert futures[0].result(LIMIT).confirmed
