"""What whole producers log in a storm: few lines, none of which holds a payload or a secret."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest

from mlproducer import MLProducer
from mlproducer.errors import PublishError
from mlproducer.testing.fake_broker import FakeBroker
from tests.helpers import LIMIT, make_message
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import Moody, events_of

STORM = 2_000
FEW = 100
BODY = b"a payload that must not be read"
SECRET = "wrong-horse-battery"


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    """Catch every line of the library's, and not pika's."""
    caplog.set_level(logging.DEBUG, "mlproducer")


def check(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Few lines, each of which is fit to be read; return them."""
    ours = [each for each in caplog.records if each.name.startswith("mlproducer")]
    lines = [each.getMessage() for each in ours]
    assert len(lines) < FEW
    for line in lines:
        assert line.isprintable()
        assert BODY.decode() not in line
        assert SECRET not in line
    return lines


def publish_all(producer: MLProducer, count: int, *, retry: bool) -> list[Any]:
    """Publish as many messages, each with a payload."""
    messages = (make_message(body=BODY) for _ in range(count))
    return producer.publish_many(messages, retry=retry, timeout=60.0)


def test_failures(connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of messages that the broker refuses are counted, and not logged one by one."""
    producer = connect(serve(Moody("nack")))
    answers = publish_all(producer, STORM, retry=False)
    assert sum(isinstance(answer, PublishError) for answer in answers) == STORM
    producer.close(LIMIT)
    assert [line.split()[0] for line in check(caplog)] == ["connected", "disconnected"]


def test_dead_letters(connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of dead letters are some lines, and the number of the others."""
    producer = connect(serve(Moody("nack")), max_message_retries=0, max_in_flight=STORM)
    publish_all(producer, STORM, retry=True)
    assert producer.flush(60.0) == 0
    producer.close(LIMIT)
    lines = [line for line in check(caplog) if line.startswith("dead-lettered")]
    told = sum(int(line.rpartition("=")[2]) for line in lines if "suppressed=" in line)
    singles = sum("message_id=" in line for line in lines)
    assert told + singles == STORM


def test_callbacks(connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises thousands of times is logged some times."""
    producer = connect(serve())

    def raising(_event: object) -> None:
        raise RuntimeError

    producer.on("confirmed", raising)
    publish_all(producer, STORM, retry=True)
    producer.close(LIMIT)
    assert any(line.startswith("a callback raised") for line in check(caplog))


def flap(broker: FakeBroker, producer: MLProducer) -> None:
    """Lose the connection, and get another."""
    seen = events_of(producer, "connected")
    broker.wait_for_connections(1, LIMIT)[0].reset()
    seen.wait_until(lambda: "connected" in seen.seen)


def refuse(broker: FakeBroker, producer: MLProducer) -> None:
    """Publish while nothing listens."""
    broker.stop_listening()
    broker.wait_for_connections(1, LIMIT)[0].reset()
    publish_all(producer, 500, retry=False)
    broker.listen_again()
    assert producer.wait_connected(LIMIT)


@pytest.mark.parametrize("act", [flap, refuse])
def test_connections(
    connect: Connect,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    act: Callable[[FakeBroker, MLProducer], None],
) -> None:
    """A broker that comes and goes, twenty times, leaves few lines, without its password."""
    broker = serve()
    url = broker.url.replace("guest:guest", f"guest:{SECRET}")
    producer = connect(url, reconnect_initial_delay=0.001, reconnect_max_delay=0.002)
    assert producer.wait_connected(LIMIT)
    for _ in range(20):
        act(broker, producer)
    producer.close(LIMIT)
    assert any("suppressed=" in line for line in check(caplog))


# --- pika's lines ------------------------------------------------------------------------------


class Caught(logging.Handler):
    """Keeps the names of the threads on which lines of pika's were written."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        if record.name.startswith("pika"):
            self.threads.add(str(record.threadName))


@pytest.fixture
def caught() -> Iterator[Caught]:
    """Catch pika's lines where an application does, at the root."""
    handler, pika = Caught(), logging.getLogger("pika")
    level = pika.level
    logging.root.addHandler(handler)
    yield handler
    logging.root.removeHandler(handler)
    pika.setLevel(level)


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, set()), (logging.DEBUG, {"io"})])
def test_pika_is_quiet(
    connect: Connect, serve: Serve, caught: Caught, level: int, shown: set[str]
) -> None:
    """A broker that cannot be reached is our one line; DEBUG shows pika's as well."""
    broker = serve()
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    logging.getLogger("pika").setLevel(level)
    refuse(broker, producer)
    producer.close(LIMIT)
    assert {name.removeprefix("mlproducer-") for name in caught.threads} == shown


def test_other_users_of_pika_are_heard(connect: Connect, serve: Serve, caught: Caught) -> None:
    """What another connection of the process logs through pika is shown as ever."""
    producer = connect(serve())
    assert producer.wait_connected(LIMIT)
    logging.getLogger("pika").setLevel(logging.INFO)
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", 1))
    assert caught.threads == {threading.current_thread().name}


def test_filters_of_the_application_hold(
    connect: Connect, serve: Serve, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter of the application's own on a logger of pika's still decides, also at DEBUG."""
    producer = connect(serve())
    assert producer.wait_connected(LIMIT)
    logging.getLogger("pika").setLevel(logging.DEBUG)
    for name in [each for each in logging.root.manager.loggerDict if each.startswith("pika")]:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "filters", [*logger.filters, lambda _record: False])
    producer.close(LIMIT)
    assert caught.threads == set()
