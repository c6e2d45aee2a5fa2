"""The tasks: what they hold, where they go and which Celery task runs them.

A task checks its fields and copies them when it is made, and does not change afterwards. It keeps
them as they travel: camelCase, or snake_case for the options of embeddings, as their workers read
them. How a task becomes a message is not known here; what AMQP and JSON cannot carry is refused
when it becomes one.

Runs on: any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from attrs import field, frozen

from mlproducer import shapes
from mlproducer.errors import InvalidTaskError, frameless
from mlproducer.shapes import Shape

API, LOCAL = "api", "local"

_PRIORITY = shapes.integer(0, 255)

PROTOCOL_HEADERS = frozenset(
    {"lang", "task", "id", "root_id", "parent_id", "group", "retries", "eta", "expires"}
    | {"timelimit", "argsrepr", "kwargsrepr", "origin", "ignore_result"}
)
"""The headers of Celery's message protocol 2 that this library writes."""


@frozen
class PreferredBackends:
    """Which backend, ``"api"`` or ``"local"``, runs a task whose options do not say."""

    llm: str = API
    stt: str = API
    embedding: str = API


@frozen
class Route:
    """Where a task goes, and the name under which its worker knows it."""

    routing_key: str
    name: str


class MLTask:
    """What the machine-learning tasks have in common.

    :cvar task_type: the metric label
    """

    __slots__ = ()
    task_type: ClassVar[str]

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Give the route for the backend that is chosen, and the Celery task's keyword arguments.

        :param preferred: the backends where the options do not choose
        """
        raise NotImplementedError

    def free_form(self) -> Iterable[tuple[str, object]]:
        """Give the values that may hold anything, each with its field's name."""
        return ()


class _ShareTask(MLTask):
    """A task about one share.

    :cvar routes: a route for each backend
    :cvar preference: the field of `PreferredBackends` that is asked
    """

    __slots__ = ()
    routes: ClassVar[Mapping[str, Route]]
    preference: ClassVar[str]

    share_id: str
    options: Mapping[str, Any]

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Give the route, and as arguments the share, its content, the options with the backend.

        The backend is the one among the options, else that of a local provider, else the setting.
        """
        backend = self.options.get("backend")
        if backend is None:
            is_local = self.options.get("provider") == LOCAL
            backend = LOCAL if is_local else getattr(preferred, self.preference)
        return self.routes[backend], {
            "share_id": self.share_id,
            "content": self.wire_content(),
            "options": {**self.options, "backend": backend},
        }

    def wire_content(self) -> Mapping[str, Any]:
        """Give the content as it travels."""
        raise NotImplementedError


@frozen(init=False)
class _ContentTask(_ShareTask):
    """A task about a share's text.

    :cvar content_shape: the keys of the content
    :cvar options_shape: the keys of the options
    """

    content_shape: ClassVar[Shape]
    options_shape: ClassVar[Shape]

    share_id: str
    content: Mapping[str, Any] = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @frameless
    def __init__(
        self, share_id: str, content: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        self.__attrs_init__(
            shapes.text("share_id", share_id),
            self.content_shape.read("content", content),
            self.options_shape.read("options", {} if options is None else options),
        )

    def wire_content(self) -> Mapping[str, Any]:
        """Give the content as it travels."""
        return self.content


@frozen(init=False)
class SummarizationTask(_ContentTask):
    """Summarize a text.

    :ivar share_id: the share that the text belongs to
    :ivar content: ``text``, and optionally ``title``, ``url``, ``contentType``
    :ivar options: ``provider`` (openai, anthropic, local), ``model``, ``maxLength`` (at least 1),
        ``style`` (brief, detailed, bullets), ``backend`` (api, local); all optional
    :raises InvalidTaskError: a field is not accepted
    """

    task_type = "summarize_llm"
    preference = "llm"
    routes: ClassVar[Mapping[str, Route]] = {
        API: Route("ml.summarize", "llm_service.tasks.summarize_content"),
        LOCAL: Route("ml.summarize_local", "llm_service.tasks.summarize_content_local"),
    }
    content_shape = shapes.SUMMARY_CONTENT
    options_shape = shapes.SUMMARY_OPTIONS


@frozen(init=False)
class TranscriptionTask(_ShareTask):
    """Transcribe a recording.

    :ivar share_id: the share that the recording belongs to
    :ivar media_url: where the worker finds the recording
    :ivar options: ``language``, ``backend`` (api, local), ``normalize`` (True), ``prompt``;
        all optional
    :raises InvalidTaskError: a field is not accepted
    """

    task_type = "transcribe_whisper"
    preference = "stt"
    routes: ClassVar[Mapping[str, Route]] = {
        API: Route("ml.transcribe", "whisper.tasks.transcribe_api"),
        LOCAL: Route("ml.transcribe_local", "whisper.tasks.transcribe_local"),
    }

    share_id: str
    media_url: str = field(repr=False)
    options: Mapping[str, Any] = field(repr=False)

    @frameless
    def __init__(
        self, share_id: str, media_url: str, options: Mapping[str, Any] | None = None
    ) -> None:
        self.__attrs_init__(
            shapes.text("share_id", share_id),
            shapes.line("media_url", media_url),
            shapes.TRANSCRIPTION_OPTIONS.read("options", {} if options is None else options),
        )

    def wire_content(self) -> Mapping[str, Any]:
        """Give the content as it travels."""
        return {"mediaUrl": self.media_url}


@frozen(init=False)
class EmbeddingTask(_ContentTask):
    """Compute the embeddings of a text.

    :ivar share_id: the share that the text belongs to
    :ivar content: ``text``, and optionally ``type`` (caption, transcript, article, comment, tweet)
        and ``metadata``, a mapping of any content
    :ivar options: ``embeddingType`` (content, summary, composite), ``forceModel``,
        ``chunkStrategy`` (none, transcript, paragraph, sentence, fixed), ``backend`` (api, local);
        all optional
    :raises InvalidTaskError: a field is not accepted
    """

    task_type = "embed_vectors"
    preference = "embedding"
    routes: ClassVar[Mapping[str, Route]] = dict.fromkeys(
        (API, LOCAL), Route("ml.embed", "vector_service.tasks.generate_embeddings")
    )
    content_shape = shapes.EMBEDDING_CONTENT
    options_shape = shapes.EMBEDDING_OPTIONS

    def free_form(self) -> Iterable[tuple[str, object]]:
        """Give the metadata, which may hold anything."""
        return (("content.metadata", self.content["metadata"]),)


@frozen(init=False)
class EmbeddingBatchTask(MLTask):
    """Compute the embeddings of several texts in one task.

    :ivar items: what `EmbeddingTask` takes: tuples of share_id, content and, optionally, options,
        or mappings with these keys; at least one
    :raises InvalidTaskError: a field is not accepted; the text names the item by its index
    """

    task_type = "embed_vectors"

    items: tuple[EmbeddingTask, ...]

    @frameless
    def __init__(self, items: Sequence[Sequence[Any] | Mapping[str, Any] | EmbeddingTask]) -> None:
        if not isinstance(items, (list, tuple)):
            shapes.refuse("items", items, "a list or a tuple")
        if not items:
            shapes.refuse("items", items, "at least one item", " but empty")
        self.__attrs_init__(tuple(map(_batch_item, range(len(items)), items)))

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Give the one route there is, and the arguments of each item's own task."""
        route = Route("ml.embed", "vector_service.tasks.generate_embeddings_batch")
        return route, {"tasks": [item.call(preferred)[1] for item in self.items]}

    def free_form(self) -> Iterable[tuple[str, object]]:
        """Give the metadata of each item."""
        for index, item in enumerate(self.items):
            for name, value in item.free_form():
                yield f"items[{index}].{name}", value

    def __repr__(self) -> str:
        return f"EmbeddingBatchTask(count={len(self.items)})"


def _batch_item(index: int, item: Any) -> EmbeddingTask:
    if isinstance(item, EmbeddingTask):
        return item
    name = f"items[{index}]"
    if isinstance(item, Mapping):
        item = shapes.BATCH_ITEM.read(name, item)
        item = item.get("share_id"), item.get("content"), item.get("options")
    if not isinstance(item, (list, tuple)) or not 2 <= len(item) <= 3:
        shapes.refuse(name, item, "a tuple of share_id, content and, optionally, options")
    try:
        return EmbeddingTask(*item)
    except InvalidTaskError as error:
        raise InvalidTaskError(f"{name}.{error}") from None


@frozen(init=False)
class CeleryTask:
    """A Celery task of any name.

    :ivar name: the name under which its worker knows it; also the metric label
    :ivar args: positional arguments, a list or a tuple
    :ivar kwargs: keyword arguments
    :ivar routing_key: at most 255 bytes of UTF-8, no control characters
    :ivar exchange: the exchange's name; ``None`` is the settings' one
    :ivar eta: the earliest moment at which it may run, with a time zone
    :ivar countdown: the same in seconds after the publishing; not together with ``eta``
    :ivar expires: seconds after the publishing, or the moment, after which no worker runs it
    :ivar priority: 0 to 255
    :ivar headers: further AMQP headers; those of Celery's protocol cannot be set
    :ivar task_id: 1 to 255 bytes of UTF-8; ``None`` makes a new one for each publishing
    :raises InvalidTaskError: a field is not accepted
    """

    name: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    routing_key: str = field(repr=False)
    exchange: str | None = field(repr=False)
    eta: datetime | None = field(repr=False)
    countdown: float | None = field(repr=False)
    expires: float | datetime | None = field(repr=False)
    priority: int | None = field(repr=False)
    headers: Mapping[str, Any] = field(repr=False)
    task_id: str | None = field(repr=False)

    @frameless
    def __init__(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        routing_key: str | None = None,
        *,
        exchange: str | None = None,
        eta: datetime | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
        priority: int | None = None,
        headers: Mapping[str, Any] | None = None,
        task_id: str | None = None,
    ) -> None:
        if eta is not None and countdown is not None:
            raise InvalidTaskError("eta and countdown are both given; accepted is one of them")
        self.__attrs_init__(
            shapes.line("name", name),
            shapes.sequence("args", () if args is None else args),
            shapes.mapping("kwargs", {} if kwargs is None else kwargs),
            shapes.string("routing_key", routing_key),
            shapes.optional(shapes.string, "exchange", exchange),
            shapes.optional(shapes.moment, "eta", eta),
            shapes.optional(shapes.seconds, "countdown", countdown),
            shapes.optional(shapes.moment_or_seconds, "expires", expires),
            shapes.optional(_PRIORITY, "priority", priority),
            _own_headers({} if headers is None else headers),
            shapes.optional(shapes.text, "task_id", task_id),
        )

    @property
    def task_type(self) -> str:
        """The metric label."""
        return self.name

    def free_form(self) -> Iterable[tuple[str, object]]:
        """Give the arguments, which may hold anything."""
        return ("args", self.args), ("kwargs", self.kwargs)


def _own_headers(headers: Mapping[str, Any]) -> Any:
    kept = shapes.headers("headers", headers)
    taken = PROTOCOL_HEADERS.intersection(kept)
    if taken:
        raise InvalidTaskError(
            f"headers has {', '.join(sorted(taken))}; accepted are names that Celery's protocol "
            "does not use"
        )
    return kept
