"""A producer with no broker stands in for a real one: what is refused, noted, told and returned."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from mlproducer import CeleryTask, Message, MLProducer, RetryPolicy, Settings, SummarizationTask
from mlproducer.errors import (
    BufferFullError,
    ConfigurationError,
    InvalidMessageError,
    MessageTooLargeError,
    NackError,
    NotConnectedError,
    ProducerClosedError,
    PublishError,
    WouldDeadlockError,
)
from mlproducer.observe.callbacks import Event
from mlproducer.testing import RecordingProducer
from mlproducer.testing.node import RabbitMQError
from mlproducer.testing.plugin import GivenBroker

GIVEN = "amqp://u:p@example.org/v"
TASK = SummarizationTask("7", {"text": "secret"})


def test_what_is_published_is_noted(recording_producer: RecordingProducer) -> None:
    """Every way of publishing is, in order; tasks compare by value and show their payload."""
    producer: MLProducer = recording_producer
    raw = Message(body=b"x", routing_key="q", exchange="")
    assert producer.publish(TASK).confirmed
    future = producer.submit(raw)
    assert future.result(0).message_id == future.message_id
    results = producer.publish_many([TASK, TASK])
    assert [isinstance(each, PublishError) for each in results] == [False, False]
    assert asyncio.run(producer.apublish(TASK)).confirmed
    assert producer.publish_summarization_task("7", {"text": "secret"}).confirmed
    same = SummarizationTask("7", {"text": "secret"})
    assert recording_producer.published == [same, raw, same, same, same, same]
    assert recording_producer.published[1].payload() == b"x"
    assert "secret" not in repr(recording_producer)
    recording_producer.clear()
    assert recording_producer.published == []


def test_it_refuses_what_a_producer_refuses() -> None:
    """The limits of AMQP and of the settings, wrong arguments, and whatever is no task."""
    producer = RecordingProducer(Settings(max_message_bytes=10))
    with pytest.raises(MessageTooLargeError):
        producer.publish(TASK)
    with pytest.raises(InvalidMessageError):
        producer.publish("text")  # type: ignore[arg-type]
    with pytest.raises(InvalidMessageError):
        producer.submit(Message(body=b"", routing_key="k" * 256))
    with pytest.raises(ConfigurationError):
        producer.publish(Message(body=b"", routing_key="k"), timeout=-1)
    (result,) = producer.publish_many([TASK])
    assert isinstance(result, MessageTooLargeError)
    assert producer.publish(Message(body=b"", routing_key="k"), retry=RetryPolicy(1)).confirmed
    with pytest.raises(ConfigurationError):
        producer.publish(Message(body=b"", routing_key="k"), retry=3)  # type: ignore[arg-type]
    assert len(producer.published) == 1


def test_a_failure_to_order(recording_producer: RecordingProducer) -> None:
    """The next messages fail with what is given, each once, by every way of publishing."""
    producer = recording_producer
    given = NotConnectedError("no broker")
    producer.fail_next(given)
    with pytest.raises(NotConnectedError) as caught:
        producer.publish(CeleryTask("t", routing_key="k", task_id="its-id"))
    assert caught.value is given
    assert given.message_id == "its-id"
    producer.fail_next(NackError("no"))
    failed = producer.submit(TASK)
    assert isinstance(failed.exception(0), NackError)
    producer.fail_next(BufferFullError("full"))
    with pytest.raises(BufferFullError):
        producer.submit(TASK)
    producer.fail_next(NackError("no"))
    first, second = producer.publish_many([TASK, TASK])
    assert isinstance(first, NackError)
    assert not isinstance(second, PublishError)
    assert producer.published == [TASK]
    with pytest.raises(TypeError):
        producer.fail_next(ValueError())  # type: ignore[arg-type]


def test_an_iterable_that_raises_keeps_its_results(recording_producer: RecordingProducer) -> None:
    """As with a producer, what came of those before goes with the exception."""

    def tasks() -> Iterator[SummarizationTask]:
        yield TASK
        raise KeyError("gone")

    with pytest.raises(KeyError) as caught:
        recording_producer.publish_many(tasks())
    (receipt,) = vars(caught.value)["results"]
    assert receipt.confirmed


def test_hooks_and_callbacks_are_called(recording_producer: RecordingProducer) -> None:
    """Each before the call returns; one that raises harms nothing, one that publishes is told."""
    producer, told, wrong = recording_producer, [], []
    producer.before_publish(lambda task, headers: told.append(task))
    producer.on("connected", lambda: told.append("connected"))
    producer.on("confirmed", lambda event: told.append(event.message_id))
    producer.on("confirmed", lambda: 1 / 0)

    def publishes() -> None:
        try:
            producer.publish(TASK)
        except WouldDeadlockError as error:
            wrong.append(error)

    producer.on("confirmed", publishes)
    receipt = producer.publish(TASK)
    assert told == ["connected", TASK, receipt.message_id]
    assert len(wrong) == 1
    done: list[object] = []
    future = producer.submit(TASK)
    future.add_done_callback(done.append)
    assert done == [future]


def test_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts, is healthy and is closed like a producer, with no thread, socket or URL."""
    monkeypatch.delenv("RABBITMQ_URL", raising=False)

    def connects(*_: object) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr(socket, "socket", connects)
    threads = threading.active_count()
    with RecordingProducer() as producer:
        assert not producer.is_healthy()
        assert producer.wait_connected(1.0)
        assert producer.is_healthy()
        producer.reconnect()
        producer.publish(TASK)
        assert producer.flush(1.0) == 0
    assert producer.close().abandoned == ()
    with pytest.raises(ProducerClosedError):
        producer.publish(TASK)
    assert producer.status().to_json()["rabbitmq"]["connectionState"] == "CLOSED"
    assert producer.published == [TASK]
    assert threading.active_count() == threads


def test_timeouts_are_checked() -> None:
    """A number that a producer refuses is refused by each method that takes one."""
    with RecordingProducer() as producer:
        calls: list[Callable[[float], object]] = [
            lambda timeout: producer.publish(TASK, timeout=timeout),
            lambda timeout: producer.declare([], timeout=timeout),
            producer.wait_connected,
            producer.flush,
            producer.close,
        ]
        for call in calls:
            with pytest.raises(ConfigurationError, match="timeout must be a finite number"):
                call(-1.0)
        assert not producer.closed
    assert producer.closed


def test_a_store_is_not_touched(tmp_path: Path) -> None:
    """Whatever the settings name, nothing is written."""
    path = tmp_path / "store.db"
    with RecordingProducer(Settings(store_url=f"sqlite:///{path}?write_ahead=1")) as producer:
        producer.publish(TASK)
    assert not path.exists()


def test_a_given_broker_has_addresses_and_takes_no_orders() -> None:
    """The tests may use it, but not stop it."""
    broker = GivenBroker("amqp://u:p%40@example.org:5673/v%2Fh")
    assert broker.url == "amqp://u:p%40@example.org:5673/v%2Fh"
    assert broker.url_for("other") == "amqp://u:p%40@example.org:5673/other"
    for order in (broker.start, broker.add_vhost, broker.ctl):
        with pytest.raises(RabbitMQError, match="RABBITMQ_TEST_URL"):
            order("x") if order is not broker.start else broker.start()
    broker.close()
    with pytest.raises(RabbitMQError):
        GivenBroker("amqp://u:p@a/,amqp://u:p@b/")


MODULE = """
def test_it(rabbitmq_node, rabbitmq_vhost):
    assert rabbitmq_vhost.url == "amqp://u:p@example.org:5672/v"
"""

PROGRAM = """
import sys, pytest
from mlproducer.testing import erlang
erlang._DIRECTORIES = ()
sys.exit(pytest.main(["-q", "-rs", "-p", "mlproducer.testing.plugin", "test_it.py"]))
"""


@pytest.mark.parametrize(
    ("environ", "end"), [({}, "1 skipped"), ({"RABBITMQ_TEST_URL": GIVEN}, "1 passed")]
)
def test_the_fixtures_skip_or_use_what_is_given(
    tmp_path: Path, environ: dict[str, str], end: str
) -> None:
    """Without RabbitMQ a test is skipped; with a URL its broker is used, and nothing started."""
    (tmp_path / "test_it.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=False,
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert end in done.stdout
    assert environ or "apt-get install" in done.stdout


def test_a_task_is_checked_without_being_published() -> None:
    """What the producer would refuse is refused; nothing is noted of what is well."""
    producer = RecordingProducer(Settings(max_message_bytes=900))
    producer.check(TASK)
    with pytest.raises(MessageTooLargeError):
        producer.check(SummarizationTask("7", {"text": "x" * 900}))
    with pytest.raises(InvalidMessageError):
        producer.check("text")  # type: ignore[arg-type]
    assert producer.published == []


def test_what_was_refused_after_a_commit_is_counted_and_told() -> None:
    """With and without a running part; a callback that raises harms nothing."""
    for producer in (
        RecordingProducer(Settings(), registry=CollectorRegistry()),
        MLProducer(Settings(), registry=CollectorRegistry()),
    ):
        told: list[Event] = []
        producer.on("refused", lambda _event: 1 / 0)
        producer.on("refused", told.append)
        task = SummarizationTask("7", {"text": "secret"}, task_id="its own")
        producer.note_refused(task, ConfigurationError("no URL"))
        producer.note_refused(task, NackError(message_id="m"))
        assert told == [
            Event("refused", "its own", "ConfigurationError"),
            Event("refused", "m", "NackError"),
        ]
        labels = {"task_type": "summarize_llm", "status": "rejected"}
        assert producer.registry.get_sample_value("ml_producer_tasks_sent_total", labels) == 1


def test_a_difference_can_be_read(recording_producer: RecordingProducer) -> None:
    """An assertion that fails shows what tasks say, field by field, and what is missing."""
    recording_producer.assert_published()
    recording_producer.publish(TASK)
    recording_producer.assert_published(TASK)
    recording_producer.publish(SummarizationTask("7", {"text": "one"}, {"style": "brief"}))
    other = SummarizationTask("7", {"text": "another"}, {"style": "brief"}, priority=3)
    with pytest.raises(AssertionError) as raised:
        recording_producer.assert_published(TASK, other, CeleryTask("name", [1], {}, "q"))
    lines = str(raised.value).splitlines()
    assert lines[0] == "2 published, 3 expected"
    assert any(line.startswith("- ") and "'another'" in line for line in lines)
    assert any(line.startswith("+ ") and "'one'" in line for line in lines)
    assert any(line.startswith("- ") and "CeleryTask" in line for line in lines)


def test_pytest_shows_it(pytestconfig: pytest.Config) -> None:
    """A plain ``assert`` does so too."""
    other = SummarizationTask("7", {"text": "another"})
    for left, right in ((TASK, other), ([TASK], [other])):
        [lines] = pytestconfig.hook.pytest_assertrepr_compare(
            config=pytestconfig, op="==", left=left, right=right
        )[:1]
        assert any(line.startswith("- ") and "another" in line for line in lines)
        assert any(line.startswith("+ ") and "secret" in line for line in lines)
