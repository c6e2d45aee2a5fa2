"""before_publish(): what other parts of a program add to the headers of every message."""

from __future__ import annotations

from typing import Any

import pytest

from mlproducer import CeleryTask, EmbeddingTask, Message, MLProducer, SummarizationTask
from tests.helpers import LIMIT, make_message
from tests.threaded.conftest import Connect, Serve


def headers_of(serve: Serve, connect: Connect, task: Any, *hooks: Any) -> dict[str, Any]:
    """Publish a task through hooks, and return the headers that the broker has got."""
    broker = serve()
    producer = connect(broker)
    for hook in hooks:
        producer.before_publish(hook)
    assert producer.publish(task).confirmed
    [message] = broker.wait_for_messages(1, LIMIT)
    return dict(message.properties.headers or {})


def add_tenant(_task: object, headers: dict[str, Any]) -> None:
    """Add a header."""
    headers["tenant"] = "blue"


@pytest.mark.parametrize(
    "task",
    [
        Message(body=b"", routing_key="k"),
        Message(body=b"", routing_key="k", headers={"own": 1}),
        CeleryTask("name", ["a"], routing_key="k", headers={"own": 1}),
        SummarizationTask("share", {"text": "t"}),
        EmbeddingTask("share", {"text": "t", "type": "caption"}),
    ],
)
def test_a_header_for_any_message(serve: Serve, connect: Connect, task: Any) -> None:
    """It goes with every kind of task, beside the task's own; the task itself stays as it is."""
    before = repr(getattr(task, "headers", None))
    headers = headers_of(serve, connect, task, add_tenant)
    assert headers["tenant"] == "blue"
    if isinstance(task, Message | CeleryTask) and task.headers:
        assert headers["own"] == 1
    assert repr(getattr(task, "headers", None)) == before


def test_what_it_sees(serve: Serve, connect: Connect) -> None:
    """A hook is told the task and the headers so far, the task's own and those of earlier hooks."""
    seen: list[Any] = []
    task = Message(body=b"", routing_key="k", headers={"own": 1})
    headers_of(serve, connect, task, add_tenant, lambda *told: seen.append(told))
    assert seen == [(task, {"own": 1, "tenant": "blue"})]


def test_one_that_raises(serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged without its text, and adds nothing; the message goes with others' headers."""

    def fail(_task: object, headers: dict[str, Any]) -> None:
        headers["half"] = 1
        raise RuntimeError("canary-8c1f")

    with caplog.at_level("WARNING", logger="mlproducer"):
        headers = headers_of(serve, connect, make_message(), fail, add_tenant)
    assert headers == {"tenant": "blue"}
    assert "RuntimeError" in caplog.text
    assert "canary-8c1f" not in caplog.text


@pytest.mark.parametrize("value", [object(), 2**70, {1: 2}])
def test_one_that_adds_what_cannot_be_sent(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    """A message is not refused for what a hook added."""

    def add(_task: object, headers: dict[str, Any]) -> None:
        headers["bad"] = value

    with caplog.at_level("WARNING", logger="mlproducer"):
        assert headers_of(serve, connect, make_message(), add) == {}
    assert "cannot be sent" in caplog.text


def test_one_that_always_raises(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """However many messages there are, the log has a few lines, and how many it lacks."""
    producer = connect(serve())
    producer.before_publish(lambda *_: 1 / 0)
    with caplog.at_level("WARNING", logger="mlproducer.producer"):
        for _ in range(20):
            producer.publish(make_message())
        producer.close()
    told = [each for each in caplog.messages if "hook" in each]
    assert told == [
        *["a before_publish hook raised: ZeroDivisionError"] * 5,
        "a before_publish hook raised: suppressed=15",
    ]


def test_settings_that_are_none() -> None:
    """A URL is no settings; the error says how it is passed, and does not show it."""
    with pytest.raises(TypeError, match=r"Settings\(url=") as caught:
        MLProducer("amqp://user:canary-8c1f@host/")  # type: ignore[arg-type]
    assert "canary" not in str(caught.value)
