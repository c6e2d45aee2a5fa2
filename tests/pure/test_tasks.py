"""Tasks: what they accept, what they keep, where they go, and how they refuse."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import attrs
import pytest

from mlproducer.errors import InvalidTaskError
from mlproducer.tasks import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    MLTask,
    PreferredBackends,
    SummarizationTask,
    TranscriptionTask,
)

from .refusals import CANARY, refused
from .tables import each_row

TEXT = {"text": "t"}
NOW = datetime(2024, 5, 1, 12, tzinfo=timezone.utc)
API = PreferredBackends()
LOCAL = PreferredBackends(llm="local", stt="local", embedding="local")


def summarize(content: Any = TEXT, options: Any = None) -> SummarizationTask:
    """Make a task of which a test changes one thing."""
    return SummarizationTask("s-1", content, options)


def transcribe(media_url: Any = "https://m/1.mp3", options: Any = None) -> TranscriptionTask:
    """Make a task of which a test changes one thing."""
    return TranscriptionTask("s-1", media_url, options)


def embed(content: Any = TEXT, options: Any = None) -> EmbeddingTask:
    """Make a task of which a test changes one thing."""
    return EmbeddingTask("s-1", content, options)


def batch(items: Any) -> EmbeddingBatchTask:
    """Make a batch of whatever is given."""
    return EmbeddingBatchTask(items)


def celery(**fields: Any) -> CeleryTask:
    """Make a task of which a test changes one thing."""
    return CeleryTask(**{"name": "app.add", "routing_key": "q", **fields})


ROUTES = [
    (summarize(), API, "ml.summarize", "llm_service.tasks.summarize_content"),
    (summarize(), LOCAL, "ml.summarize_local", "llm_service.tasks.summarize_content_local"),
    (transcribe(), API, "ml.transcribe", "whisper.tasks.transcribe_api"),
    (transcribe(), LOCAL, "ml.transcribe_local", "whisper.tasks.transcribe_local"),
    (embed(), API, "ml.embed", "vector_service.tasks.generate_embeddings"),
    (embed(), LOCAL, "ml.embed", "vector_service.tasks.generate_embeddings"),
    (
        EmbeddingBatchTask([("s-1", TEXT)]),
        LOCAL,
        "ml.embed",
        "vector_service.tasks.generate_embeddings_batch",
    ),
]


@pytest.mark.parametrize(("task", "preferred", "routing_key", "name"), ROUTES)
def test_route(task: MLTask, preferred: PreferredBackends, routing_key: str, name: str) -> None:
    """Each task goes where the documented table says, for each backend."""
    route, _ = task.call(preferred)
    assert (route.routing_key, route.name) == (routing_key, name)


@pytest.mark.parametrize(
    ("options", "preferred", "backend"),
    [
        ({"backend": "api", "provider": "local"}, LOCAL, "api"),
        ({"backend": "local", "provider": "openai"}, API, "local"),
        ({"provider": "local"}, API, "local"),
        ({"provider": "openai"}, LOCAL, "local"),
        ({"backend": None}, LOCAL, "local"),
        (None, API, "api"),
    ],
)
def test_backend(options: Any, preferred: PreferredBackends, backend: str) -> None:
    """The option comes first, then a local provider, then the setting; it is told the worker."""
    task = summarize(options=options)
    assert task.call(preferred)[1]["options"]["backend"] == backend


KWARGS = [
    (
        summarize(
            {"text": "t", "title": None, "content_type": "text/html", "url": "https://u"},
            {"max_length": 50, "style": "brief", "provider": "openai", "model": "m"},
        ),
        {
            "share_id": "s-1",
            "content": {"text": "t", "contentType": "text/html", "url": "https://u"},
            "options": {
                "maxLength": 50,
                "style": "brief",
                "provider": "openai",
                "model": "m",
                "backend": "api",
            },
        },
    ),
    (
        transcribe(options={"language": "de", "prompt": "p"}),
        {
            "share_id": "s-1",
            "content": {"mediaUrl": "https://m/1.mp3"},
            "options": {"language": "de", "prompt": "p", "normalize": True, "backend": "api"},
        },
    ),
    (
        embed(),
        {
            "share_id": "s-1",
            "content": {"text": "t", "type": "caption", "metadata": {}},
            "options": {"embedding_type": "content", "chunk_strategy": "none", "backend": "api"},
        },
    ),
    (
        embed(
            {"text": "t", "type": "tweet", "metadata": {"likes": [1]}},
            {"embeddingType": "summary", "force_model": "m", "chunkStrategy": "fixed"},
        ),
        {
            "share_id": "s-1",
            "content": {"text": "t", "type": "tweet", "metadata": {"likes": [1]}},
            "options": {
                "embedding_type": "summary",
                "force_model": "m",
                "chunk_strategy": "fixed",
                "backend": "api",
            },
        },
    ),
    (
        EmbeddingBatchTask(
            [("a", TEXT), {"share_id": "b", "content": TEXT, "options": {"backend": "local"}}]
        ),
        {
            "tasks": [
                {**embed().call(API)[1], "share_id": "a"},
                {**embed(options={"backend": "local"}).call(API)[1], "share_id": "b"},
            ]
        },
    ),
]


@pytest.mark.parametrize(("task", "expected"), KWARGS)
def test_kwargs(task: MLTask, expected: dict[str, Any]) -> None:
    """The worker gets the documented keys, the defaults filled in, what is not given left out."""
    assert task.call(API)[1] == expected


@pytest.mark.parametrize("wrap", [dict, MappingProxyType])
def test_spellings(wrap: Callable[[Any], Any]) -> None:
    """Python names and camelCase mean the same, in any kind of mapping."""
    assert summarize(wrap({"text": "t", "content_type": "c"}), wrap({"max_length": 1})) == (
        summarize(wrap({"text": "t", "contentType": "c"}), wrap({"maxLength": 1}))
    )


ANY: Any = 7.5
LOOP: list[Any] = []
LOOP += [LOOP, {"again": LOOP}]
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
BAD = [
    (lambda: SummarizationTask("", TEXT), "share_id", "empty", "non-empty str"),
    (lambda: SummarizationTask(ANY, TEXT), "share_id", "float", "str, an int or a UUID"),
    (lambda: SummarizationTask(True, TEXT), "share_id", "bool"),
    (lambda: SummarizationTask(1 << 128, TEXT), "share_id", "range"),
    (lambda: SummarizationTask("s", TEXT, eta=NOW, countdown=1), "eta and countdown"),
    (lambda: TranscriptionTask("s", "u", headers={"stamps": {}}), "headers", "stamps"),
    (lambda: TranscriptionTask("s", "u", headers={"_x": 1}), "headers", "_x"),
    (lambda: EmbeddingTask("s", TEXT, priority=256), "priority", "range"),
    (lambda: EmbeddingBatchTask([("s", TEXT)], task_id=""), "task_id", "empty"),
    (lambda: batch([EmbeddingTask("s", TEXT, priority=1)]), "items[0]", "batch as a whole"),
    (lambda: summarize(CANARY), "content", "of type str", "mapping"),
    (lambda: summarize({}), "content.text", "missing"),
    (lambda: summarize({"text": None}), "content.text", "missing"),
    (lambda: summarize({"text": ""}), "content.text", "empty"),
    (lambda: summarize({"text": CANARY.encode()}), "content.text", "bytes", "str"),
    (lambda: summarize({**TEXT, "url": ""}), "content.url", "empty"),
    (lambda: summarize({**TEXT, "title": 1}), "content.title", "int"),
    (lambda: summarize({**TEXT, "tilte": CANARY}), "content", "tilte", "text, title, url"),
    (lambda: summarize({**TEXT, f"{CANARY} ": 1}), "content", "unknown key of type str"),
    (lambda: summarize({**TEXT, 1: CANARY}), "content", "unknown key of type int"),
    (lambda: summarize({**TEXT, "contentType": "a", "content_type": "b"}), "both"),
    (lambda: summarize(options=[CANARY]), "options", "list", "mapping"),
    (lambda: summarize(options={"maxLength": 0}), "options.maxLength", "int", "from 1"),
    (lambda: summarize(options={"max_length": "9"}), "options.maxLength", "str", "an int"),
    (lambda: summarize(options={"maxLength": True}), "options.maxLength", "bool"),
    (lambda: summarize(options={"maxLength": 10**10_000}), "options.maxLength", "range"),
    (lambda: summarize(options={"maxLength": 1.5}), "options.maxLength", "float"),
    (lambda: summarize(options={"style": CANARY}), "options.style", "brief, detailed, bullets"),
    (lambda: summarize(options={"style": [CANARY]}), "options.style", "list"),
    (lambda: summarize(options={"provider": "x"}), "options.provider", "openai, anthropic, local"),
    (lambda: summarize(options={"backend": "gpu"}), "options.backend", "api, local"),
    (lambda: transcribe(""), "media_url", "empty"),
    (lambda: transcribe(None), "media_url", "missing"),
    (lambda: transcribe(f"https://{CANARY}\r\nx"), "media_url", "control characters"),
    (lambda: transcribe(options={"normalize": "yes"}), "options.normalize", "str", "bool"),
    (lambda: embed({**TEXT, "type": "book"}), "content.type", "caption, transcript, article"),
    (lambda: embed({**TEXT, "metadata": [CANARY]}), "content.metadata", "list", "mapping"),
    (lambda: embed({**TEXT, "metadata": {1: CANARY}}), "content.metadata", "key of type int"),
    (lambda: embed({**TEXT, "metadata": {"a": [NOW]}}), "content.metadata.a[0]", "datetime"),
    (
        lambda: embed({**TEXT, "metadata": {f"{CANARY} ": {CANARY}}}),
        "content.metadata.(key)",
        "set",
    ),
    (lambda: embed(options={"embedding_type": "x"}), "options.embeddingType", "composite"),
    (lambda: embed(options={"chunkStrategy": "x"}), "options.chunkStrategy", "paragraph"),
    (lambda: batch([]), "items", "empty"),
    (lambda: batch(CANARY), "items", "str", "list"),
    (lambda: batch([("a", TEXT), ("b", {})]), "items[1].content.text", "missing"),
    (lambda: batch([("a",)]), "items[0]", "tuple"),
    (lambda: batch(["ab"]), "items[0]", "of type str"),
    (lambda: batch([{"content": TEXT}]), "items[0].share_id", "missing"),
    (lambda: batch([{"text": "t"}]), "items[0]", "share_id, content, options"),
    (lambda: celery(name=""), "name", "empty"),
    (lambda: celery(name="a\nb"), "name", "control"),
    (lambda: celery(args=CANARY), "args", "str", "list or a tuple"),
    (lambda: celery(args={CANARY}), "args", "set"),
    (lambda: celery(kwargs=[(CANARY, 1)]), "kwargs", "list", "mapping"),
    (lambda: celery(kwargs={1: CANARY}), "kwargs", "key of type int"),
    (lambda: celery(routing_key=None), "routing_key", "missing"),
    (lambda: celery(exchange=b"x"), "exchange", "bytes"),
    (lambda: celery(eta=NOW.replace(tzinfo=None)), "eta", "time zone"),
    (lambda: celery(eta="2024-05-01T12:00:00Z"), "eta", "str"),
    (lambda: celery(eta=datetime.max.replace(tzinfo=timezone(-timedelta(hours=9)))), "eta", "9999"),
    (lambda: celery(eta=NOW, countdown=1), "eta", "countdown"),
    (lambda: celery(countdown=-0.1), "countdown", "range"),
    (lambda: celery(countdown=float("nan")), "countdown", "range"),
    (lambda: celery(countdown=float("inf")), "countdown", "range"),
    (lambda: celery(countdown=10**400), "countdown", "range"),
    (lambda: celery(countdown=True), "countdown", "bool"),
    (lambda: celery(expires=-1), "expires", "range"),
    (lambda: celery(expires="60"), "expires", "str"),
    (lambda: celery(expires=NOW.replace(tzinfo=None)), "expires", "time zone"),
    (lambda: celery(priority=300), "priority", "from 0 to 255"),
    (lambda: celery(priority=-1), "priority", "range"),
    (lambda: celery(priority=1.0), "priority", "float"),
    (lambda: celery(headers=CANARY), "headers", "str"),
    (lambda: celery(headers={"task": CANARY, "id": "1"}), "headers", "id, task"),
    (lambda: celery(task_id=""), "task_id", "empty"),
    (lambda: celery(task_id=7), "task_id", "int"),
    (lambda: celery(reply_to="é" * 128), "reply_to", "256 bytes"),
    (lambda: celery(argsrepr=None), "argsrepr", "missing"),
    (lambda: celery(kwargsrepr=5), "kwargsrepr", "int"),
    (lambda: celery(time_limit=0), "time_limit", "above 0"),
    (lambda: celery(time_limit="5"), "time_limit", "str"),
    (lambda: celery(time_limit=5, soft_time_limit=6), "soft_time_limit", "above time_limit"),
    (lambda: celery(kwargs={"a": {"b": [1, Fraction(1)]}}), "kwargs.a.b[1]", "Fraction"),
    (lambda: celery(args=[{"__type__": "x", "__value__": 1}]), "args[0]", "__type__", "itself"),
    (lambda: embed({**TEXT, "metadata": {"a": {"__type__": "x", "__value__": 1}}}), "metadata.a"),
    (lambda: celery(args=[LOOP]), "args", "contains itself"),
    (lambda: celery(args=[DEEP]), "args", "200 levels"),
]


def test_refuses() -> None:
    """A refusal names the field, the type and what is accepted, quotes nothing, and is fast."""
    each_row(BAD, lambda make, *words: refused(make, InvalidTaskError, *words))


def test_copies_what_it_is_given() -> None:
    """Fault 71: whatever the caller changes afterwards, the task stays as it was made."""
    metadata: dict[str, Any] = {"tags": [{"a": 1}]}
    content = {"text": "t", "metadata": metadata}
    options = {"backend": "api"}
    tasks = [embed(content, options), celery(args=[metadata], kwargs=content, headers=content)]
    before = copy.deepcopy(tasks)
    metadata["tags"][0]["a"] = {CANARY}
    metadata["more"] = 1
    content["text"] = options["backend"] = CANARY
    assert tasks == before


def test_copies_share_no_defaults() -> None:
    """The empty metadata of one task is not that of another."""
    assert embed().content["metadata"] is not embed().content["metadata"]


@pytest.mark.parametrize("share_id", [12, uuid.UUID(int=12), "12"])
def test_share_ids(share_id: Any) -> None:
    """An id may be what a database gives; it travels as its text."""
    for task in (
        SummarizationTask(share_id, TEXT),
        TranscriptionTask(share_id, "u"),
        EmbeddingTask(share_id, TEXT),
    ):
        assert task.share_id == str(share_id)
        assert task.payload()["share_id"] == str(share_id)


def test_payload() -> None:
    """What the worker gets, as it would read it, and free to be changed."""
    task = EmbeddingTask("s", {"text": "t", "metadata": {"a": (1, [2])}}, {"backend": "local"})
    payload = task.payload()
    assert payload["content"] == {"text": "t", "type": "caption", "metadata": {"a": [1, [2]]}}
    assert payload["options"]["backend"] == "local"
    payload["content"]["metadata"].clear()
    assert task.payload() != payload
    assert summarize().payload(LOCAL)["options"]["backend"] == "local"
    assert summarize().payload()["options"]["backend"] == "api"
    assert celery(args=[(1,)], kwargs={"a": 1}).payload() == {"args": [[1]], "kwargs": {"a": 1}}
    assert EmbeddingBatchTask([task]).payload() == {"tasks": [task.payload()]}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (summarize({"text": CANARY}, {"model": CANARY}), "SummarizationTask(share_id='s-1')"),
        (transcribe(CANARY, {"prompt": CANARY}), "TranscriptionTask(share_id='s-1')"),
        (embed({"text": CANARY}), "EmbeddingTask(share_id='s-1')"),
        (EmbeddingBatchTask([(CANARY, {"text": CANARY})] * 3), "EmbeddingBatchTask(count=3)"),
        (celery(args=[CANARY], kwargs={CANARY: 1}), "CeleryTask(name='app.add')"),
    ],
)
def test_repr_hides_content(task: object, expected: str) -> None:
    """A task can be logged: its repr says which it is, and nothing of what it holds."""
    assert repr(task) == expected


@pytest.mark.parametrize(
    "task",
    [
        summarize(),
        transcribe(),
        embed(),
        EmbeddingBatchTask([("a", TEXT)]),
        celery(args=[1, uuid.UUID(int=1)], eta=NOW, headers={"h": 1}, reply_to="q", time_limit=5),
        SummarizationTask("s", TEXT, headers={"h": 1}, priority=1, countdown=1, expires=NOW),
    ],
)
def test_is_plain_data(task: Any) -> None:
    """A task is frozen, compares by value, and survives pickling and ``attrs.evolve``."""
    assert pickle.loads(pickle.dumps(task)) == task
    assert attrs.evolve(task) == task
    name = attrs.fields(type(task))[0].name
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(task, name, "x")


def test_keeps_moments_in_utc() -> None:
    """An offset that ISO parsers choke on, such as a local mean time, never gets on the wire."""
    odd = NOW.astimezone(timezone(timedelta(minutes=53, seconds=28)))
    task = celery(eta=odd, expires=odd)
    assert task.eta == NOW
    assert task.eta.isoformat() == "2024-05-01T12:00:00+00:00"
    assert task.expires == task.eta
