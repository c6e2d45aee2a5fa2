"""publish() is back within its timeout and a quarter of a second, whatever is at the other end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlproducer import MLProducer, Receipt
from mlproducer._core.delivery import Delivery
from mlproducer._core.failures import FailureHandler
from mlproducer._core.send_queue import Confirms
from mlproducer._engine.gate import Gate
from mlproducer.errors import (
    BrokerBlockedError,
    ConfirmTimeoutError,
    ConnectionLostError,
    NotConnectedError,
    PublishError,
)
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, Background, make_message, wait_until
from tests.stopwatch import in_time as stop_watch
from tests.threaded.brokers import Holding, Silent, ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import io_of

TIMEOUT = 0.4
SLACK = 0.25


@contextmanager
def in_time(timeout: float = TIMEOUT, at_least: float = 0.0) -> Iterator[None]:
    """Fail where the block takes longer than is documented."""
    with stop_watch(timeout + SLACK, at_least):
        yield


def answer_of(call: Callable[[], Receipt]) -> PublishError:
    """Return the error that a call raised, or the reason of the receipt that it returned."""
    try:
        reason = call().reason
    except PublishError as error:
        reason = error
    assert reason is not None
    return reason


class Web(Behaviour):
    """A web server."""

    def on_connect(self, connection: FakeConnection) -> None:
        """Answer as one does."""
        connection.send_raw(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        connection.close()


@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize(
    "where", ["deaf", "start", "tune", "open", "Channel.Open", "Confirm.Select"]
)
def test_no_handshake(connect: Connect, serve: Serve, where: str, retry: bool) -> None:
    """A broker that accepts and then falls silent costs no more than the timeout (2)."""
    broker = serve(Holding(where, times=100))
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        if where == "deaf":
            proxy.deaf()
        producer = connect(proxy.url(broker.url), connection_timeout=30.0)
        with in_time(at_least=TIMEOUT):
            error = answer_of(
                lambda: producer.publish(make_message(), timeout=TIMEOUT, retry=retry)
            )
        assert isinstance(error, NotConnectedError)
        assert (error.attempts, error.possibly_sent) == (0, False)
        producer.close(0.1)


@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize("behaviour", [Web(), None])
def test_no_broker(
    connect: Connect, serve: Serve, behaviour: Behaviour | None, retry: bool
) -> None:
    """Not AMQP, or nothing there: said at once, with the address, and not as a refusal (1, 3)."""
    broker = serve(behaviour)
    if behaviour is None:
        broker.stop_listening()
    producer = connect(broker)
    with in_time():
        error = answer_of(lambda: producer.publish(make_message(), timeout=TIMEOUT, retry=retry))
    assert type(error) is NotConnectedError
    assert f"127.0.0.1:{broker.port}" in str(error)
    assert "guest" not in str(error)
    if behaviour is not None:
        assert "without speaking AMQP" in str(error)
    with in_time(0.0):
        answer_of(lambda: producer.publish(make_message(), retry=False))


@pytest.mark.parametrize("direction", ["c2s", "s2c", "both"])
def test_black_hole(connect: Connect, serve: Serve, direction: str) -> None:
    """A network that swallows everything, or half of it, costs only the timeout (23, 25)."""
    broker = serve()
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url))
        assert producer.publish(make_message()).confirmed
        proxy.hole(direction)  # type: ignore[arg-type]
        with in_time(at_least=TIMEOUT):
            error = answer_of(lambda: producer.publish(make_message(), timeout=TIMEOUT))
        assert isinstance(error, ConfirmTimeoutError)
        assert error.possibly_sent
        producer.close(0.1)


def test_blocked(connect: Connect, serve: Serve) -> None:
    """While the broker blocks, a call waits its time and says why; then the message goes out."""
    broker = serve()
    producer = connect(broker)
    blocked = threading.Event()
    producer.on("blocked", blocked.set)
    assert producer.publish(make_message()).confirmed
    broker.connections[0].block()
    assert blocked.wait(LIMIT)
    with in_time(at_least=TIMEOUT):
        error = answer_of(lambda: producer.publish(make_message(), timeout=TIMEOUT, retry=False))
    with in_time(at_least=TIMEOUT):
        kept = producer.publish(make_message("kept"), timeout=TIMEOUT)
    for each in (error, kept.reason):
        assert isinstance(each, BrokerBlockedError)
        assert (each.attempts, each.possibly_sent) == (0, False)
    assert producer.status().blocked
    assert not producer.is_healthy()
    broker.connections[0].unblock()
    assert kept.result(LIMIT).attempts == 1
    assert broker.accepted == 1


def test_nothing_is_written_while_blocked(connect: Connect, serve: Serve) -> None:
    """Not a byte of a message follows the broker's Blocked, and then all come in order (32)."""
    broker = serve()
    producer = connect(broker)
    blocked = threading.Event()
    producer.on("blocked", blocked.set)
    producer.start()
    [connection] = broker.wait_for_connections(1, LIMIT)
    assert producer.wait_connected(LIMIT)
    connection.block(keep_reading=True)
    assert blocked.wait(LIMIT)
    futures = [producer.submit(make_message(f"{number}")) for number in range(20)]
    with pytest.raises(TimeoutError):
        broker.wait_for_messages(1, 0.2)
    connection.unblock()
    assert all(future.result(LIMIT).confirmed for future in futures)
    assert [each.properties.message_id for each in broker.messages] == list(map(str, range(20)))


def kill_loop(producer: MLProducer) -> None:
    """Raise SystemExit in the I/O thread, wherever it is."""
    [thread] = [each for each in threading.enumerate() if each.name.startswith("mlproducer-io")]
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )
    producer.reconnect()  # wakes it, so that the exception is noticed


@pytest.mark.parametrize("retry", [True, False])
def test_the_io_thread_dies(connect: Connect, serve: Serve, retry: bool) -> None:
    """Every waiting call is told within a second, and the next publish works (76)."""
    broker = serve(Silent())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)  # imports take none of the calls' time
    background = Background()
    calls = [
        background.call(producer.publish, make_message(f"{number}"), timeout=2.0, retry=retry)
        for number in range(10)
    ]
    broker.wait_for_messages(10, LIMIT)
    kill_loop(producer)
    with in_time(1.0):
        errors = [answer_of(lambda call=call: call.result(LIMIT)) for call in calls]  # type: ignore[misc]
    assert [type(error) for error in errors] == [ConnectionLostError] * 10
    assert all(error.possibly_sent for error in errors)
    assert producer.wait_connected(LIMIT)
    again = producer.submit(make_message("again"))
    expected = 21 if retry else 11
    for message in broker.wait_for_messages(expected, LIMIT)[10:]:
        ack(message)
    assert again.result(LIMIT).confirmed
    assert producer.flush(LIMIT) == 0


def test_publish_while_the_io_thread_dies(connect: Connect, serve: Serve) -> None:
    """A call in the very moment of the death keeps its time; nothing is lost or left behind."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message()).confirmed
    for _ in range(20):
        kill_loop(producer)
        with in_time(2.0):
            receipt = producer.publish(make_message(), timeout=2.0)
        assert receipt.result(LIMIT).confirmed
    assert producer.flush(LIMIT) == 0
    assert producer.is_healthy()


def test_a_callback_in_the_loop_raises(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of pika dies of it, and goes on accepting what it never runs; ours is replaced."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message()).confirmed
    io_thread = producer._life.runtime.engines[0]._io  # type: ignore[union-attr]
    acked, failures = io_thread.acked, [ValueError("bug")]

    def failing(confirms: Any) -> None:
        if failures:
            raise failures.pop()
        acked(confirms)

    monkeypatch.setattr(io_thread, "acked", failing)
    with in_time():
        receipt = producer.publish(make_message("m"), timeout=TIMEOUT)
    assert isinstance(receipt.reason, ConnectionLostError)
    assert receipt.result(LIMIT).confirmed
    assert producer.publish(make_message()).confirmed
    assert [each.properties.message_id for each in broker.messages].count("m") == 2


def test_what_the_loop_had_in_hand(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message over which the loop failed, before it was accepted, is taken up by the next."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message()).confirmed
    sender = producer._life.runtime.engines[0]._io.sender  # type: ignore[union-attr]
    accept, failures = sender.accept, [ValueError("bug")]

    def failing(delivery: Delivery, now: float) -> None:
        if failures:
            raise failures.pop()
        accept(delivery, now)

    monkeypatch.setattr(sender, "accept", failing)
    assert producer.publish(make_message("m"), timeout=2.0).confirmed
    assert [each.properties.message_id for each in broker.messages].count("m") == 1


class NackOnce(Behaviour):
    """Refuses the first copy of the message ``m``."""

    def __init__(self) -> None:
        self._refused = False

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Basic.Nack, then acks."""
        if message.properties.message_id == "m" and not self._refused:
            self._refused = True
            connection.nack(channel, tag)
        else:
            connection.ack(channel, tag)


@pytest.mark.parametrize("way", ["publish", "submit"])
@pytest.mark.parametrize(
    ("holder", "step"),
    [
        (Delivery, "claim"),  # taken over, and not accepted
        (Confirms, "register"),  # taken out of the backlog, and not written
        (Confirms, "settle"),
        (FailureHandler, "judge"),  # nacked, and not judged
        (Delivery, "confirm"),  # confirmed, and not told
        (Gate, "leave"),  # told, with its slot still held
    ],
)
def test_a_loop_that_fails_between_two_steps(
    connect: Connect,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    holder: type,
    step: str,
    way: str,
) -> None:
    """No step of a message is the last one: it was in no queue then, and kept its slot for ever."""
    original, failures = getattr(holder, step), list[BaseException]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if failures and threading.current_thread().name.startswith("mlproducer-io"):
            raise failures.pop()
        return original(*args, **kwargs)

    def failing_late(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        if failures and threading.current_thread().name.startswith("mlproducer-io"):
            raise failures.pop()
        return done

    monkeypatch.setattr(holder, step, failing_late if step == "claim" else failing)
    producer = connect(serve(NackOnce() if step == "judge" else None))
    assert producer.publish(make_message()).confirmed
    assert producer.flush(LIMIT) == 0
    failures.append(MemoryError())
    call = producer.publish if way == "publish" else producer.submit
    assert call(make_message("m")).result(LIMIT).confirmed
    assert producer.flush(LIMIT) == 0
    assert not failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_cannot_be_run_again(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised amid pika's own steps leaves such a one: each thread died of it."""
    producer = connect(serve())
    assert producer.publish(make_message()).confirmed
    loop = io_of(producer).io_loop._loop

    def fail(*_args: object) -> None:
        raise AssertionError("Cannot call close() before start() unwinds.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "close", fail)
        patch.setattr(loop, "add_handler", fail)
        io_of(producer).order(fail)
        assert producer.publish(make_message("m")).result(LIMIT).confirmed
        wait_until(lambda: io_of(producer).io_loop._loop is not loop)
        assert producer.publish(make_message()).confirmed
    loop.close()


def test_timeout_is_checked(connect: Connect, serve: Serve) -> None:
    """A timeout that is no time is refused by its name, and nothing is sent."""
    broker = serve()
    producer = connect(broker)
    for timeout in (-1, float("nan"), float("inf"), "5", None.__class__):
        with pytest.raises(ValueError, match="timeout"):
            producer.publish(make_message(), timeout=timeout)  # type: ignore[arg-type]
    assert producer.publish(make_message()).confirmed
    assert len(broker.messages) == 1


def test_no_time_at_all(connect: Connect, serve: Serve) -> None:
    """With a timeout of 0 the call does not wait, and the message is ours all the same."""
    broker = serve()
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    with in_time(0.0):
        receipt = producer.publish(make_message(), timeout=0)
    assert receipt.result(LIMIT).confirmed
