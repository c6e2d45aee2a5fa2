"""What a program has declared beside the topology is there before what it publishes then."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from pika import spec

from mlproducer import Outcome
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.topology import Declaration
from tests.helpers import LIMIT, make_message
from tests.stopwatch import in_time
from tests.threaded.conftest import Connect, Serve


def queue(name: str) -> Declaration:
    """Declare a queue of this name."""
    return Declaration("queue_declare", {"queue": name, "durable": True})


class Noting(Behaviour):
    """Notes declarations and messages in the order in which they come.

    :param answers: what is done about a queue, by its name, instead of accepting it
    """

    def __init__(self, **answers: Any) -> None:
        self.seen: list[str] = []
        self._answers = answers

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Note a queue's declaration, and answer it."""
        if isinstance(method, spec.Queue.Declare):
            self.seen.append(method.queue)
            answer = self._answers.get(method.queue)
            if answer is not None:
                answer(connection, channel)
                return
        super().on_method(connection, channel, method)

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Note and confirm it."""
        self.seen.append("message")
        connection.ack(channel, tag)


def test_it_is_declared_once_and_on_each_connection(connect: Connect, serve: Serve) -> None:
    """At once where there is a connection; later before anything else is sent."""
    noting = Noting()
    broker = serve(noting)
    producer = connect(broker)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert producer.declare([queue("a")])
    assert producer.declare([queue("a")])
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert noting.seen == ["message", "a", "message"]
    broker.stop_listening()
    broker.connections[0].reset()
    receipt = producer.publish(make_message(), timeout=0.2)
    assert producer.declare([queue("b")], timeout=0.2)  # left to the next connection
    assert receipt.outcome is Outcome.DEFERRED
    noting.seen.clear()
    broker.listen_again()
    assert receipt.result(LIMIT).confirmed
    assert noting.seen == ["a", "b", "message"]


def test_what_is_added_while_connecting_is_not_missed(connect: Connect, serve: Serve) -> None:
    """Whatever moment it comes at, it is declared before the message that follows it."""
    noting = Noting()
    broker = serve(noting)
    for number in range(20):
        producer = connect(broker)
        producer.start()
        time.sleep(0.001 * number)  # at every stage of the handshake
        assert producer.declare([queue(f"q{number}")])
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
        assert noting.seen[-2:] == [f"q{number}", "message"]
        producer.close(0.0)


def test_many_threads_at_once(connect: Connect, serve: Serve) -> None:
    """Each publishes after its own queue, and the one that another thread declares just now."""
    noting = Noting()
    producer = connect(serve(noting))
    assert producer.publish(make_message(), timeout=LIMIT).confirmed

    def work(number: int) -> None:
        assert producer.declare([queue("shared"), queue(f"q{number}")])
        assert producer.publish(make_message(), timeout=LIMIT).confirmed

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    declared = [each for each in noting.seen if each != "message"]
    assert sorted(declared) == sorted(["shared", *(f"q{number}" for number in range(8))])
    assert noting.seen.count("message") == 9


def test_a_refusal_is_reported_and_the_rest_goes_on(
    connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue that is there with other arguments stays as it is; messages are sent to it."""
    noting = Noting(bad=lambda connection, channel: connection.close_channel(channel, 406, "NO"))
    producer = connect(serve(noting))
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    with caplog.at_level(logging.ERROR, "mlproducer"):
        assert producer.declare([queue("bad"), queue("good")])
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert noting.seen == ["message", "bad", "good", "message"]
    assert any("cannot declare" in each and "bad" in each for each in caplog.messages)


def test_one_that_costs_the_connection_is_left_out(connect: Connect, serve: Serve) -> None:
    """The next connections are made without it."""
    noting = Noting(bad=lambda connection, _: connection.close_connection(540, "NO"))
    producer = connect(serve(noting))
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    producer.declare([queue("bad"), queue("good")])
    assert producer.publish(make_message(), timeout=LIMIT).result(LIMIT).confirmed
    assert noting.seen == ["message", "bad", "good", "message"]


def test_a_silent_broker_is_waited_for_so_long(connect: Connect, serve: Serve) -> None:
    """Then the answer is no, and the producer goes on."""
    noting = Noting(quiet=lambda *_: None)
    producer = connect(serve(noting), health_check_interval=60.0)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    with in_time(0.5):
        assert not producer.declare([queue("quiet")], timeout=0.2)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed


def test_a_broker_with_one_channel(connect: Connect, serve: Serve) -> None:
    """There is none to declare on beside publishing: that is said, and the next one does it."""
    noting = Noting()
    noting.channel_max = 1
    broker = serve(noting)
    producer = connect(broker)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert not producer.declare([queue("a")])
    broker.connections[0].reset()
    assert producer.publish(make_message(), timeout=LIMIT).result(LIMIT).confirmed
    assert noting.seen == ["message", "a", "message"]
