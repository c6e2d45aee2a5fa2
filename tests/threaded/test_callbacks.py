"""Users' callbacks: what they may call, and that they harm nobody.

They run on a thread of their own; events are told there, and so are done-callbacks of futures.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mlproducer import ConnectionState
from mlproducer.errors import WouldDeadlockError
from tests.helpers import LIMIT, make_message
from tests.threaded.conftest import Connect, Serve


@pytest.mark.parametrize("how", ["event", "done"])
def test_no_deadlock_in_callbacks(connect: Connect, serve: Serve, how: str) -> None:
    """Blocking calls on the producer's own threads are refused at once (74)."""
    producer = connect(serve())
    refusals: list[BaseException | None] = []
    called = threading.Event()

    def call_everything(_: object) -> None:
        for call in (
            lambda: producer.publish(make_message()),
            lambda: producer.submit(make_message()),
            lambda: producer.publish_many([make_message()]),
            lambda: producer.wait_connected(LIMIT),
            lambda: producer.flush(LIMIT),
        ):
            try:
                call()
            except WouldDeadlockError as error:
                refusals.append(error)
        producer.status()
        producer.reconnect()
        called.set()

    if how == "event":
        producer.on("confirmed", call_everything)
        producer.publish(make_message())
    else:
        producer.submit(make_message()).add_done_callback(call_everything)
    assert called.wait(1.0)
    assert len(refusals) == 5
    assert producer.publish(make_message()).confirmed


def test_close_in_a_callback(connect: Connect, serve: Serve) -> None:
    """It drains nothing, since that would wait for itself, and ends like any other."""
    producer = connect(serve())
    closed = threading.Event()
    took: list[float] = []

    def close() -> None:
        started = time.monotonic()
        producer.close()
        took.append(time.monotonic() - started)
        closed.set()

    producer.on("connected", close)
    producer.start()
    assert closed.wait(LIMIT)
    assert took[0] < 0.5
    assert producer.status().connection_state is ConnectionState.CLOSED


def test_callbacks_that_raise_or_block(connect: Connect, serve: Serve) -> None:
    """They are logged, or wait for themselves; publishing and the other callbacks go on (75)."""
    broker = serve()
    producer = connect(broker)
    entered, free, seen = threading.Event(), threading.Event(), []

    def block(event: Any) -> None:
        entered.set()
        assert free.wait(LIMIT)

    producer.on("confirmed", lambda _: 1 / 0)
    producer.on("confirmed", block)
    producer.on("confirmed", lambda event: seen.append(event.message_id))
    assert producer.publish(make_message("a")).confirmed
    assert entered.wait(LIMIT)
    assert producer.publish(make_message("b")).confirmed
    assert all(producer.publish(make_message()).confirmed for _ in range(100))
    assert seen == []
    free.set()
    producer.close()
    assert seen[:2] == ["a", "b"]
    assert len(seen) == 102


def test_close_with_a_callback_that_hangs(connect: Connect, serve: Serve) -> None:
    """A callback that never ends cannot hold up close()."""
    producer = connect(serve())
    entered, free = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        free.wait(LIMIT)

    producer.on("confirmed", hang)
    assert producer.publish(make_message()).confirmed
    assert entered.wait(LIMIT)
    started = time.monotonic()
    producer.close(0.2)
    assert time.monotonic() - started < 0.7
    free.set()
    for thread in threading.enumerate():
        if thread.name == "mlproducer-events":
            thread.join(LIMIT)


def test_events(connect: Connect, serve: Serve) -> None:
    """Events come in the order in which things happened, with what they are about."""
    broker = serve()
    producer = connect(broker)
    seen: list[tuple[str, str | None]] = []
    back = threading.Event()
    for name in ("connected", "disconnected", "confirmed", "blocked", "unblocked"):
        producer.on(name, lambda event: seen.append((event.name, event.message_id)))
    assert producer.publish(make_message("a")).confirmed
    broker.connections[0].block()
    broker.connections[0].unblock()
    assert producer.publish(make_message("b")).confirmed
    producer.on("connected", back.set)
    broker.connections[0].reset()
    assert back.wait(LIMIT)
    assert seen == [
        ("connected", None),
        ("confirmed", "a"),
        ("blocked", None),
        ("unblocked", None),
        ("confirmed", "b"),
        ("disconnected", None),
        ("connected", None),
    ]
    with pytest.raises(ValueError, match="event must be one of"):
        producer.on("exploded", print)
