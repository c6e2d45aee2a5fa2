"""Celery's protocol: the messages are those of a real Celery, and a real worker reads them."""

from __future__ import annotations

import copy
import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.worker.request import Request
from kombu.message import Message as KombuMessage
from kombu.utils import json as kombu_json
from pika.spec import BasicProperties

from mlproducer._wire import celery as wire
from mlproducer._wire import strict_json
from mlproducer.errors import InvalidMessageError, InvalidTaskError, MessageTooLargeError
from mlproducer.message import Envelope
from mlproducer.tasks import (
    PROTOCOL_HEADERS,
    RESERVED_HEADERS,
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    PreferredBackends,
    SummarizationTask,
    TranscriptionTask,
)

from .refusals import CANARY, refused
from .tables import each_row

NOW = datetime(2024, 5, 1, 12, 0, 0, 250_000, tzinfo=timezone.utc)
LATER = NOW + timedelta(hours=1)
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
TEXT = {"text": CANARY}
TASK_ID = "3f2a"


def encode(task: Any, **changes: Any) -> Envelope:
    """Encode with settings that do not matter."""
    given = {"exchange": "x", "preferred": PreferredBackends(), "trace": {}, "now": NOW}
    return wire.encode(task, **{**given, **changes})


def simple(**fields: Any) -> CeleryTask:
    """Make a task of which a test changes one thing."""
    return CeleryTask(**{"name": "app.add", "routing_key": "q", "task_id": TASK_ID, **fields})


def properties(envelope: Envelope) -> BasicProperties:
    """Read the properties as a consumer does, with the attempt filled in."""
    read = BasicProperties()
    read.decode(envelope.properties + b"\x011")
    return read


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    """Yield a Celery application that connects to nothing."""
    with Celery("tests", broker="memory://", set_as_current=False) as application:
        yield application


TAKEN_FOR_GRANTED: dict[str, Any] = {
    "eta": None,
    "expires": None,
    "group": None,
    "ignore_result": False,
    "parent_id": None,
    "retries": 0,
    "timelimit": [None, None],
}
"""Headers of the protocol that need not be sent, with what they are without it."""

EMPTY = list(TAKEN_FOR_GRANTED.values())

AS_CELERY = [
    {},
    {"args": [1, "b"], "kwargs": {"c": None}},
    {"countdown": 10},
    {"countdown": 0.5, "expires": 60},
    {"eta": LATER, "expires": LATER},
    {"time_limit": 30, "soft_time_limit": 20},
    {"soft_time_limit": 20},
    {"reply_to": "answers", "expires": 60, "priority": 1},
    {"priority": 7, "headers": {"tenant": "t", "n": [1, {"a": None}]}},
]


@pytest.mark.parametrize("fields", AS_CELERY)
def test_is_what_celery_would_send(app: Celery, fields: dict[str, Any]) -> None:
    """Headers, ids and body equal those of Celery's own ``as_task_v2``, but for the reprs."""
    own = {key: value for key, value in fields.items() if key not in {"priority", "headers"}}
    expected = app.amqp.as_task_v2(
        TASK_ID, "app.add", now=NOW, timezone=timezone.utc, argsrepr="(...)", kwargsrepr="{...}",
        **own,
    )  # fmt: skip
    envelope = encode(simple(**fields))
    sent = properties(envelope)
    assert {**TAKEN_FOR_GRANTED, **sent.headers} == {
        **{key: expected.headers[key] for key in PROTOCOL_HEADERS},
        **fields.get("headers", {}),
    }
    assert not [key for key in TAKEN_FOR_GRANTED if sent.headers.get(key, 1) in EMPTY]
    assert sent.correlation_id == expected.properties["correlation_id"]
    assert sent.reply_to or expected.properties["reply_to"] == ""
    assert sent.priority == fields.get("priority")
    assert json.loads(envelope.body) == json.loads(json.dumps(expected.body))


TASKS = [
    (SummarizationTask("s", TEXT), "summarize_llm", "ml.summarize"),
    (TranscriptionTask("s", CANARY), "transcribe_whisper", "ml.transcribe"),
    (EmbeddingTask("s", TEXT), "embed_vectors", "ml.embed"),
    (EmbeddingBatchTask([("s", TEXT)]), "embed_vectors", "ml.embed"),
]


@pytest.mark.parametrize(("task", "task_type", "routing_key"), TASKS)
def test_ml_message(app: Celery, task: Any, task_type: str, routing_key: str) -> None:
    """An ML task has the documented properties and headers, and a body of keyword arguments."""
    envelope = encode(task)
    sent = properties(envelope)
    assert (envelope.exchange, envelope.routing_key, envelope.task_type) == (
        "x",
        routing_key,
        task_type,
    )
    assert (sent.content_type, sent.content_encoding) == ("application/json", "utf-8")
    assert (sent.delivery_mode, sent.cluster_id) == (2, "1")
    assert sent.message_id == sent.correlation_id == envelope.message_id == sent.headers["id"]
    assert str(uuid.UUID(envelope.message_id)) == envelope.message_id
    preferred = PreferredBackends()
    route, kwargs = task.call(preferred)
    name = route.name
    reference = app.amqp.as_task_v2(
        envelope.message_id, name, (), kwargs, argsrepr="(...)", kwargsrepr="{...}"
    )
    assert {**TAKEN_FOR_GRANTED, **sent.headers} == {
        key: reference.headers[key] for key in PROTOCOL_HEADERS
    }
    assert json.loads(envelope.body) == json.loads(json.dumps(reference.body))


TEXTS = [
    {"text": 'He said: "no".\n\ttwice\\ ' * 40},
    {"text": "gr\u00fc\u00dfe " * 40, "title": "t"},
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize(
    "options", [{}, {"backend": "local"}, {"provider": "local"}, {"model": "m"}]
)
def test_the_body_is_that_of_the_arguments(
    content: dict[str, str], options: dict[str, str], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a body is put together, it is what one JSON encoder makes of the whole."""
    if not fast:
        monkeypatch.setattr(strict_json, "fast", lambda: None)
    task = SummarizationTask("s", content, options)
    for preferred in (PreferredBackends(), PreferredBackends(llm="local")):
        envelope = encode(task, preferred=preferred)
        route, kwargs = task.call(preferred)
        embed = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        whole = json.dumps([[], kwargs, embed], ensure_ascii=False, separators=(",", ":"))
        assert envelope.body == whole.encode()
        assert envelope.routing_key == route.routing_key


def test_ml_message_for_the_preferred_backend() -> None:
    """The settings' backend decides the route, the Celery task's name and the option."""
    envelope = encode(TranscriptionTask("s", "u"), preferred=PreferredBackends(stt="local"))
    assert envelope.routing_key == "ml.transcribe_local"
    assert properties(envelope).headers["task"] == "whisper.tasks.transcribe_local"
    assert json.loads(envelope.body)[1]["options"]["backend"] == "local"


@pytest.mark.parametrize("task", [row[0] for row in TASKS] + [simple(args=[CANARY])])
def test_properties_hold_no_user_text(task: Any) -> None:
    """What brokers and monitors show of a message is free of its content."""
    assert CANARY.encode() not in encode(task).properties
    assert CANARY not in repr(encode(task))


def test_sentry_finds_its_headers() -> None:
    """Its worker reads what is under ``headers``; others find each header where it was given."""
    given = {"sentry-trace": "1-2-1", "baggage": "a=b", "tenant": "t"}
    sent = properties(encode(simple(headers=given))).headers
    assert sent["headers"] == given
    assert {name: sent[name] for name in given} == given
    assert "headers" not in properties(encode(simple(headers={"tenant": "t"}))).headers


def _add(*args: Any, **kwargs: Any) -> None:
    """Stand for a worker's task, which does not run here."""


def test_a_worker_reads_it(app: Celery) -> None:
    """A stock worker's request finds the task, its arguments and its times in the message."""
    add = app.task(name="app.add")(_add)
    envelope = encode(simple(args=[1, 2], kwargs={"c": "ü"}, eta=LATER, expires=7200), trace=TRACE)
    sent = properties(envelope)
    message = KombuMessage(
        body=envelope.body,
        content_type=sent.content_type,
        content_encoding=sent.content_encoding,
        headers=sent.headers,
        properties={"correlation_id": sent.correlation_id},
        delivery_info={"exchange": "x", "routing_key": "q", "redelivered": False},
    )
    request = Request(message, app=app, task=add)
    assert (request.id, request.name) == (TASK_ID, "app.add")
    assert (list(request.args), dict(request.kwargs)) == ([1, 2], {"c": "ü"})
    assert (request.eta, request.expires) == (LATER, NOW + timedelta(hours=2))
    assert request.request_dict["traceparent"] == TRACE["traceparent"]


def test_each_message_has_its_own_id() -> None:
    """A task without an id can be published twice, and is two messages."""
    task = SummarizationTask("s", TEXT)
    assert encode(task).message_id != encode(task).message_id


def test_goes_where_the_task_says() -> None:
    """A Celery task's own exchange comes before the settings' one; the default one has no name."""
    assert encode(simple(exchange="")).exchange == ""
    assert encode(simple(exchange="other")).exchange == "other"
    assert encode(simple()).exchange == "x"


@pytest.mark.parametrize("task", [SummarizationTask("s", TEXT), simple()])
def test_carries_the_trace_context(task: Any) -> None:
    """A context in force travels as headers of its own name."""
    headers = properties(encode(task, trace={**TRACE, "tracestate": "a=1"})).headers
    assert (headers["traceparent"], headers["tracestate"]) == (TRACE["traceparent"], "a=1")
    assert "traceparent" not in properties(encode(task)).headers


def test_own_context_is_not_mixed_with_the_one_in_force() -> None:
    """A context among the task's headers stands alone."""
    task = simple(headers={"traceparent": "mine"})
    headers = properties(encode(task, trace={**TRACE, "tracestate": "a=1"})).headers
    assert headers["traceparent"] == "mine"
    assert "tracestate" not in headers


def test_origin() -> None:
    """A process's messages name it and its host."""
    host = socket.gethostname()
    assert properties(encode(simple())).headers["origin"] == f"gen{os.getpid()}@{host}"


def test_order_of_headers_is_constant() -> None:
    """Two tasks of one name differ in their values only."""
    first, second = (list(properties(encode(simple(args=[n]))).headers) for n in (1, 2))
    assert first == second


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]

BAD = [
    (lambda: simple(args=[{CANARY}]), "args[0]", "set"),
    (lambda: simple(kwargs={"a": {"b": [Decimal, 1]}}), "kwargs.a.b[0] is of type type"),
    (lambda: simple(kwargs={CANARY: {1: 1}}), "kwargs", "key of type int"),
    (lambda: simple(kwargs={CANARY: float("nan")}), "kwargs", "finite"),
    (lambda: simple(args=[10**10_000]), "args", "4300 digits"),
    (lambda: simple(args=DEEP), "args", "200 levels"),
    (lambda: simple(args=[CANARY + "\ud800"]), "args", "surrogate"),
    (lambda: simple(routing_key="é" * 128), "routing_key", "256 bytes"),
    (lambda: simple(routing_key=CANARY + "\n"), "routing_key", "control"),
    (lambda: simple(routing_key=CANARY + "\ud800"), "routing_key", "surrogate"),
    (lambda: simple(exchange="\0"), "exchange", "control"),
    (lambda: simple(task_id="é" * 128), "task_id", "256 bytes"),
    (lambda: simple(task_id=CANARY + "\r\n"), "task_id", "control"),
    (lambda: simple(name="a\ud800"), "name", "surrogate"),
    (lambda: simple(headers={"a": [{"b": float("nan")}]}), "headers.a[0].b", "finite"),
    (lambda: simple(headers={"a": NOW.replace(year=1969)}), "headers.a", "1970"),
    (lambda: simple(headers={"a": (CANARY,)}), "headers", "tuple"),
    (lambda: simple(headers={"a": 2**63}), "headers", "64 bits"),
    (lambda: simple(headers={"a": DEEP}), "headers", "levels"),
    (lambda: simple(headers={"CC": [CANARY]}), "headers", "CC"),
    (lambda: simple(headers={"BCC": [CANARY]}), "headers", "BCC"),
    (lambda: simple(headers={"x-death": [CANARY]}), "headers.x-death", "tables"),
    (lambda: simple(headers={f"_{CANARY}": 1}), "headers", "(key)"),
    (lambda: simple(headers={"é" * 128: 1}), "headers", "key of 256 bytes"),
    (
        lambda: EmbeddingTask("s", {"text": "t", "metadata": {"a": NOW}}),
        "content.metadata.a",
        "datetime",
    ),
    (
        lambda: EmbeddingBatchTask([("s", TEXT), ("s", {**TEXT, "metadata": {"a": {1: 1}}})]),
        "items[1].content.metadata.a",
        "key of type int",
    ),
    (lambda: SummarizationTask("s", {"text": CANARY + "\ud800"}), "content", "surrogate"),
    (lambda: SummarizationTask("\ud800", TEXT), "share_id", "surrogate"),
]


def test_refuses_what_cannot_travel() -> None:
    """Faults 63, 64, 66 to 69: refused by path and type when the task is made, and fast."""
    each_row(BAD, lambda make, *words: refused(make, InvalidTaskError, *words))


def test_refuses_headers_over_the_frame() -> None:
    """Fault 67: the broker would close the connection under every other message."""
    refused(
        lambda: encode(simple(headers={"a": CANARY * 20_000})),
        MessageTooLargeError,
        "headers",
        inside=True,
    )


RICH: dict[str, Any] = {
    "uuid": uuid.UUID(int=7),
    "datetime": LATER,
    "naive": NOW.replace(tzinfo=None),
    "date": date(2024, 5, 1),
    "time": time_of_day(12, 30, 1),
    "decimal": Decimal("1.10"),
    "bytes": b"text",
    "binary": b"\xff\x00",
    "nested": [{"deep": (uuid.UUID(int=8),)}],
}


@pytest.mark.parametrize("fast", [True, False])
def test_rich_values_are_as_kombu_writes_them(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JSON has no type for arrives as it was sent, through kombu's own JSON."""
    if not fast:
        monkeypatch.setattr(strict_json, "fast", lambda: None)
    task = simple(args=[RICH], kwargs=RICH)
    body = encode(task).body
    args, kwargs, _ = kombu_json.loads(body)
    given = {**RICH, "nested": [{"deep": [uuid.UUID(int=8)]}]}
    assert (args, kwargs) == ([given], given)
    assert task.payload() == {"args": [given], "kwargs": given}
    assert json.loads(body)[1] == json.loads(kombu_json.dumps(RICH))


def test_children_of_a_running_task(app: Celery) -> None:
    """Published inside a Celery task, root and parent are that task's, as Celery does it."""
    seen: list[dict[str, Any]] = []

    def parent() -> None:
        seen.append(properties(encode(simple())).headers)
        seen.append(properties(encode(SummarizationTask("s", TEXT))).headers)

    task = app.task(name="app.parent")(parent)
    task.apply(task_id="parent", root_id="root")
    task.apply(task_id="parent")
    task.apply(task_id="parent").get()
    for headers in seen[2:]:
        assert (headers["root_id"], headers["parent_id"]) == ("parent", "parent")
    for headers in seen[:2]:
        assert headers["parent_id"] == "parent"
    task()  # called like a function, it is no task
    assert "parent_id" not in seen[-1]
    assert seen[-1]["root_id"] == seen[-1]["id"]


def test_ml_tasks_take_what_celery_tasks_take() -> None:
    """Id, headers, priority and times of an ML task travel as those of any other."""
    task = TranscriptionTask(
        7, "u", task_id="mine", headers={"tenant": "t"}, priority=3, countdown=10, expires=60
    )
    envelope = encode(task)
    sent = properties(envelope)
    assert envelope.message_id == sent.message_id == sent.headers["id"] == "mine"
    assert (sent.headers["tenant"], sent.priority, sent.expiration) == ("t", 3, "60000")
    assert sent.headers["eta"] == (NOW + timedelta(seconds=10)).isoformat()
    assert sent.headers["expires"] == (NOW + timedelta(seconds=60)).isoformat()


def test_names_of_the_request_cannot_be_headers() -> None:
    """A worker would put a header in the place of its own attribute of that name, and crash."""
    names = {name for name in vars(Context) if not name.startswith("__")}
    assert {name for name in names if not name.startswith("_")} <= RESERVED_HEADERS
    for name in names | {"compression", "task", "lang"}:
        refused(lambda name=name: simple(headers={name: CANARY}), InvalidTaskError, name)  # type: ignore[misc]


def test_what_a_hook_adds_harms_no_worker() -> None:
    """Headers that came past the task's own check are looked at once more."""
    task = copy.copy(simple(headers={"tenant": "t"}))
    object.__setattr__(task, "headers", {"stamps": CANARY})
    refused(lambda: encode(task), InvalidMessageError, "headers", inside=True)
