"""Delayed delivery where the broker is slow, unwilling or gone: every task arrives, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from pika import spec

from mlproducer import CeleryTask, Outcome
from mlproducer._engine import delayed_delivery as delays
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection
from tests.helpers import LIMIT, make_message
from tests.stopwatch import in_time
from tests.threaded.conftest import Connect, Serve

ENTRY = "celery_delayed_27"
DECLARES = (spec.Exchange.Declare, spec.Exchange.Bind, spec.Queue.Declare, spec.Queue.Bind)


class Levels(Behaviour):
    """Does something else with what is declared for delayed delivery."""

    def __init__(self, answer: Callable[[FakeConnection, int, Any], None]) -> None:
        self._answer = answer

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, or do what is to be done."""
        named = " ".join(
            str(getattr(method, name, "")) for name in ("exchange", "source", "routing_key")
        )
        if isinstance(method, DECLARES) and ("celery_delayed" in named or "#." in named):
            self._answer(connection, channel, method)
        else:
            super().on_method(connection, channel, method)


def _later(name: str = "later") -> CeleryTask:
    return CeleryTask("x.y", routing_key="ml.embed", countdown=60.0, task_id=name)


def _silence(_connection: FakeConnection, _channel: int, _method: Any) -> None:
    pass


def _refuse(connection: FakeConnection, channel: int, method: Any) -> None:
    passive = getattr(method, "passive", False)
    connection.close_channel(channel, 404 if passive else 403, "REFUSED")


def _end(connection: FakeConnection, _channel: int, _method: Any) -> None:
    connection.close_connection(540, "NOT_IMPLEMENTED")


def _accept(connection: FakeConnection, channel: int, method: Any) -> None:
    if not method.nowait:
        bound = isinstance(method, spec.Queue.Bind)
        reply = spec.Queue.BindOk() if bound else spec.Exchange.DeclareOk()
        connection.send_method(channel, reply)


def _arrived(broker: FakeBroker) -> list[tuple[str, str, str]]:
    return [
        (each.properties.message_id, each.exchange, each.routing_key) for each in broker.messages
    ]


def _check_plain(broker: FakeBroker, caplog: pytest.LogCaptureFixture) -> None:
    assert ("later", "bookmarkai.ml", "ml.embed") in _arrived(broker)
    assert not any(exchange == ENTRY for _, exchange, _ in _arrived(broker))
    faults = [each for each in caplog.messages if each.startswith("cannot declare")]
    assert [ENTRY in each for each in faults] == [True]


@pytest.mark.parametrize("first", ["connects", "delayed"])
@pytest.mark.parametrize("mode", ["active", "off"])
def test_accepted(connect: Connect, serve: Serve, mode: str, first: str) -> None:
    """The task goes to the first level, whether the connection was there before it or not."""
    broker = serve(Levels(_accept))
    producer = connect(broker, declare_topology=mode)
    if first == "connects":
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert producer.publish(_later(), timeout=LIMIT).confirmed
    assert _arrived(broker)[-1][:2] == ("later", ENTRY)


@pytest.mark.parametrize("answer", [_refuse, _end], ids=["refused", "ended"])
@pytest.mark.parametrize("first", ["connects", "delayed"])
def test_not_to_be_had(
    connect: Connect,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    first: str,
    answer: Callable[[FakeConnection, int, Any], None],
) -> None:
    """The task goes to its queue, with its eta; that is reported once, and others go on."""
    broker = serve(Levels(answer))
    producer = connect(broker, declare_topology="active", reconnect_initial_delay=0.01)
    with caplog.at_level(logging.ERROR, "mlproducer"):
        if first == "connects":
            assert producer.publish(make_message(), timeout=LIMIT).confirmed
        assert producer.publish(_later(), timeout=LIMIT).result(LIMIT).confirmed
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
    _check_plain(broker, caplog)


def test_one_channel(connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """There is none on which to ask, and the task goes to its queue."""
    behaviour = Levels(_accept)
    behaviour.channel_max = 1
    broker = serve(behaviour)
    producer = connect(broker, declare_topology="off")
    with caplog.at_level(logging.ERROR, "mlproducer"):
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
        assert producer.publish(_later(), timeout=LIMIT).confirmed
    _check_plain(broker, caplog)


def test_silence(
    connect: Connect,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A publisher waits no longer than it said; its task, and no other, waits for an answer."""
    monkeypatch.setattr(delays, "PATIENCE", 0.6)
    broker = serve(Levels(_silence))
    producer = connect(broker, declare_topology="active", health_check_interval=60.0)
    with caplog.at_level(logging.ERROR, "mlproducer"):
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
        with in_time(0.45):
            receipt = producer.publish(_later(), timeout=0.2)
        assert receipt.outcome is Outcome.DEFERRED
        with in_time(0.3):
            assert producer.publish(make_message()).confirmed
        assert receipt.result(LIMIT).confirmed
    _check_plain(broker, caplog)


def test_the_connection_is_lost_meanwhile(connect: Connect, serve: Serve) -> None:
    """What was held goes out on the next connection; the other futures are open no longer."""
    answers = [_silence, _accept]
    asked: list[Any] = []

    def answer(connection: FakeConnection, channel: int, method: Any) -> None:
        if answers[0] is _silence and not asked:
            asked.append(method)
            connection.reset()
            answers.pop(0)
        else:
            answers[0](connection, channel, method)

    broker = serve(Levels(answer))
    producer = connect(broker, declare_topology="active", reconnect_initial_delay=0.01)
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    futures = [producer.submit(_later(f"later {number}")) for number in range(20)]
    for future in futures:
        assert future.result(LIMIT).confirmed
    names = [name for name, exchange, _ in _arrived(broker) if exchange == ENTRY]
    assert sorted(names) == sorted(f"later {number}" for number in range(20))


def test_closing_tells_of_what_is_held(connect: Connect, serve: Serve) -> None:
    """A message that waits for the exchanges is abandoned like any other, and its future ends."""
    broker = serve(Levels(_silence))
    producer = connect(broker, declare_topology="active")
    assert producer.publish(make_message(), timeout=LIMIT).confirmed
    future = producer.submit(_later())
    report = producer.close(0.2)
    assert report.abandoned == ("later",)
    assert future.exception(LIMIT) is not None


class LosesConnections(Levels):
    """Loses as many connections in the middle of the declarations, and then accepts them."""

    def __init__(self, times: int, lose: Callable[[FakeConnection], None]) -> None:
        super().__init__(self._lose_or_accept)
        self.times = times
        self._lose = lose

    def _lose_or_accept(self, connection: FakeConnection, channel: int, method: Any) -> None:
        if self.times:
            self.times -= 1
            self._lose(connection)
        else:
            _accept(connection, channel, method)


@pytest.mark.parametrize(
    ("times", "lose"),
    [
        (2, lambda connection: connection.reset()),
        (5, lambda connection: connection.close_connection(320, "CONNECTION_FORCED")),
    ],
)
def test_connections_lost_for_other_reasons(
    connect: Connect, serve: Serve, times: int, lose: Callable[[FakeConnection], None]
) -> None:
    """A bad network, or a broker that restarts, is no reason to do without delayed delivery."""
    broker = serve(LosesConnections(times, lose))
    producer = connect(broker, declare_topology="active")
    assert producer.publish(_later()).result(LIMIT).confirmed
    [(_, exchange, _)] = _arrived(broker)
    assert exchange == ENTRY


def test_what_was_given_up_is_tried_on_a_later_connection(connect: Connect, serve: Serve) -> None:
    """The broker may have been replaced by another version, or another program have declared."""
    behaviour = LosesConnections(2, lambda connection: connection.close_connection(540, "NO"))
    broker = serve(behaviour)
    producer = connect(broker, declare_topology="active")
    assert producer.publish(_later("first")).result(LIMIT).confirmed
    broker.connections[0].reset()
    assert producer.publish(_later("second")).result(LIMIT).confirmed
    assert [exchange for _, exchange, _ in _arrived(broker)] == ["bookmarkai.ml", ENTRY]
