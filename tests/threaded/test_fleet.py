"""Several connections: who carries a message, and what the producer says of them together."""

from __future__ import annotations

import pytest

from mlproducer import ConnectionState, MLProducer, Settings
from mlproducer.errors import ConfigurationError
from mlproducer.stores.memory import MemoryStore
from mlproducer.testing.fake_broker import ReceivedMessage
from tests.helpers import LIMIT, Background, make_message
from tests.threaded.brokers import Silent, ack
from tests.threaded.conftest import Connect, Serve


def connections_of(messages: list[ReceivedMessage]) -> list[int]:
    """Say how many messages each connection has carried, the most first."""
    carried: dict[int, int] = {}
    for message in messages:
        carried[id(message.connection)] = carried.get(id(message.connection), 0) + 1
    return sorted(carried.values(), reverse=True)


def test_the_least_burdened_carries(connect: Connect, serve: Serve) -> None:
    """Messages go where the fewest are in flight; the sizes are those of all together."""
    broker = serve(Silent())
    producer = connect(broker, connections=3)
    assert producer.wait_connected(LIMIT)
    futures = [producer.submit(make_message(f"{number}")) for number in range(9)]
    messages = broker.wait_for_messages(9, LIMIT)
    assert connections_of(messages) == [3, 3, 3]
    status = producer.status()
    assert (status.pending_confirms, status.healthy) == (9, True)
    for message in messages:
        ack(message)
    assert all(future.result(LIMIT).confirmed for future in futures)
    assert producer.flush(LIMIT) == 0


def test_the_window_is_divided(connect: Connect, serve: Serve) -> None:
    """All connections together hold no more in flight than one would."""
    broker = serve(Silent())
    producer = connect(broker, connections=2, max_in_flight=4)
    assert producer.wait_connected(LIMIT)
    for number in range(4):
        producer.submit(make_message(f"{number}"))
    background = Background()
    fifth = background.call(producer.submit, make_message("fifth"))
    messages = broker.wait_for_messages(4, LIMIT)
    assert not fifth.done()
    for message in messages:
        ack(message)
    fifth.result(LIMIT)
    ack(broker.wait_for_messages(5, LIMIT)[-1])
    assert producer.flush(LIMIT) == 0


def test_one_connection_lost_of_two(connect: Connect, serve: Serve) -> None:
    """What was on it is sent again; meanwhile the other one carries."""
    broker = serve(Silent())
    producer = connect(broker, connections=2)
    assert producer.wait_connected(LIMIT)
    first = producer.submit(make_message("first"))
    [message] = broker.wait_for_messages(1, LIMIT)
    message.connection.reset()
    second = producer.submit(make_message("second"))
    copies = broker.wait_for_messages(3, LIMIT)[1:]
    for copy in copies:
        ack(copy)
    assert first.result(LIMIT).attempts == 2
    assert second.result(LIMIT).attempts == 1
    assert producer.status().connection_state is ConnectionState.CONNECTED


def test_close_of_several(connect: Connect, serve: Serve) -> None:
    """One report for all: what was confirmed meanwhile, and what was abandoned on each."""
    broker = serve(Silent())
    producer = connect(broker, connections=2)
    assert producer.wait_connected(LIMIT)
    futures = [producer.submit(make_message(name)) for name in ("a", "b", "c", "d")]
    broker.wait_for_messages(4, LIMIT)
    report = producer.close(0.2)
    assert (report.confirmed, sorted(report.abandoned)) == (0, ["a", "b", "c", "d"])
    assert all(future.exception(0) for future in futures)
    assert producer.status().connection_state is ConnectionState.CLOSED


def test_a_store_of_ones_own_serves_one() -> None:
    """It cannot be in the hands of two retry threads."""
    producer = MLProducer(
        Settings(url="amqp://guest:guest@localhost/", connections=2), store=MemoryStore()
    )
    with pytest.raises(ConfigurationError, match="one connection"):
        producer.start()
