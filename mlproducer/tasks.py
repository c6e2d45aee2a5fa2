"""The tasks: their fields, their routes, and the Celery tasks that run them.

A task checks and copies its fields when it is made, and never changes: what a worker, strict JSON
or AMQP cannot accept is refused then. The keys of its fields are those on the wire: camelCase, or
snake_case for the options of embeddings, as their workers expect them.

Runs on: any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from attrs import field, frozen

from mlproducer import _field_checks as checks
from mlproducer._field_checks import Schema
from mlproducer.errors import InvalidTaskError, frameless

API, LOCAL = "api", "local"

_PRIORITY = checks.integer(0, 255)

PROTOCOL_HEADERS = frozenset(
    {"lang", "task", "id", "root_id", "parent_id", "group", "retries", "eta", "expires"}
    | {"timelimit", "argsrepr", "kwargsrepr", "origin", "ignore_result"}
)
"""The headers of Celery's message protocol 2 that this library writes."""

RESERVED_HEADERS = PROTOCOL_HEADERS | {
    *("args", "callbacks", "called_directly", "chain", "chord", "children", "compression"),
    *("correlation_id", "delivery_info", "errbacks", "group_index", "headers", "hostname"),
    *("is_eager", "kwargs", "logfile", "loglevel", "properties", "replaced_task_nesting"),
    *("reply_to", "shadow", "soft_time_limit", "stamped_headers", "stamps", "taskset"),
    *("time_limit", "utc", "as_execution_options", "clear", "get", "update"),
}
"""Names that a header cannot have: a worker makes each header an attribute of the task's request,
and these would replace attributes that it uses itself."""


@frozen
class PreferredBackends:
    """The backends, ``"api"`` or ``"local"``, for tasks whose options do not name one."""

    llm: str = API
    stt: str = API
    embedding: str = API


@frozen
class Route:
    """A task's routing key, and the name of the Celery task that runs it."""

    routing_key: str
    name: str


@frozen(kw_only=True, slots=False, eq=False, repr=False)  # its subclasses compare
class _Sending:
    """The options that all tasks have.

    :ivar task_id: 1 to 255 bytes of UTF-8; ``None``: a new one each time that it is published
    :ivar headers: further AMQP headers, except those that Celery's workers use
    :ivar priority: 0 to 255
    :ivar countdown: seconds from publishing until a worker may run it
    :ivar eta: the time from which a worker may run it, with a time zone; not with ``countdown``
    :ivar expires: seconds from publishing, or the time, after which no worker runs it
    """

    task_id: str | None = field(default=None, repr=False)
    headers: Mapping[str, Any] = field(factory=dict, repr=False)
    priority: int | None = field(default=None, repr=False)
    countdown: float | None = field(default=None, repr=False)
    eta: datetime | None = field(default=None, repr=False)
    expires: float | datetime | None = field(default=None, repr=False)

    @property
    def ordinary(self) -> bool:
        """Whether none of these options is set."""
        return (
            self.task_id is None
            and not self.headers
            and self.priority is None
            and self.countdown is None
            and self.eta is None
            and self.expires is None
        )


_NOTHING = (None,) * 6
_ORDINARY: dict[str, Any] = {}


def _sending(
    task_id: str | None,
    headers: Mapping[str, Any] | None,
    priority: int | None,
    countdown: float | None,
    eta: datetime | None,
    expires: float | datetime | None,
) -> dict[str, Any]:
    """Check the fields of `_Sending`, and return those that are given."""
    given = (task_id, headers, priority, countdown, eta, expires)
    if given == _NOTHING:
        return _ORDINARY
    if eta is not None and countdown is not None:
        raise InvalidTaskError("eta and countdown are both given: give one of them")
    optional = checks.optional
    return {
        "task_id": optional(checks.task_id, "task_id", task_id),
        "headers": _checked_headers(headers) if headers else {},
        "priority": optional(_PRIORITY, "priority", priority),
        "countdown": optional(checks.seconds, "countdown", countdown),
        "eta": optional(checks.moment, "eta", eta),
        "expires": optional(checks.moment_or_seconds, "expires", expires),
    }


def _checked_headers(headers: Mapping[str, Any]) -> Any:
    kept = checks.headers("headers", headers)
    taken = RESERVED_HEADERS.intersection(kept)
    taken |= {name for name in kept if name.startswith("_")}
    if taken:
        raise InvalidTaskError(
            f"headers has {', '.join(sorted(map(checks.word, taken)))}; accepted are names that "
            "Celery's workers do not use"
        )
    return kept


@frozen(slots=False, eq=False, repr=False)
class MLTask(_Sending):
    """The base class of the machine-learning tasks.

    :cvar task_type: the metric label
    """

    task_type: ClassVar[str]

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Return the route for the chosen backend, and the Celery task's keyword arguments.

        :param preferred: the backends, where the options do not name one
        """
        raise NotImplementedError

    def payload(self, preferred: PreferredBackends = PreferredBackends()) -> dict[str, Any]:
        """Return the keyword arguments that the worker gets; for tests.

        :param preferred: the backends, where the options do not name one
        """
        kwargs: dict[str, Any] = _copied(self.call(preferred)[1])
        return kwargs


def _copied(value: Any) -> Any:
    """Return a copy with plain containers, as a JSON decoder makes them."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return list(map(_copied, value)) if isinstance(value, (list, tuple)) else value


@frozen(slots=False, eq=False, repr=False)
class _ShareTask(MLTask):
    """A task about one share.

    :cvar routes: a route for each backend
    :cvar preference: the field of `PreferredBackends` that applies
    """

    routes: ClassVar[Mapping[str, Route]]
    preference: ClassVar[str]

    share_id: str
    options: Mapping[str, Any] = field(repr=False)

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Return the route, and as arguments the share, its content, and options with the backend.

        The backend is that of the options, else ``local`` for a local provider, else the setting.
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
        """Return the content as it is on the wire."""
        raise NotImplementedError


@frozen(init=False, slots=False, eq=False, repr=False)
class _ContentTask(_ShareTask):
    """A task about a share's text.

    :cvar content_shape: the keys of the content
    :cvar options_shape: the keys of the options
    """

    content_shape: ClassVar[Schema]
    options_shape: ClassVar[Schema]

    content: Mapping[str, Any] = field(repr=False)

    @frameless
    def __init__(
        self,
        share_id: str | int | UUID,
        content: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        *,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        priority: int | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
    ) -> None:
        share_id = checks.share("share_id", share_id)
        options = self.options_shape.read("options", {} if options is None else options)
        content = self.content_shape.read("content", content)
        sending = _sending(task_id, headers, priority, countdown, eta, expires)
        self.__attrs_init__(share_id, options, content, **sending)

    def wire_content(self) -> Mapping[str, Any]:
        """Return the content as it is on the wire."""
        return self.content


@frozen(init=False, slots=False)
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
    content_shape = checks.SUMMARY_CONTENT
    options_shape = checks.SUMMARY_OPTIONS


@frozen(init=False, slots=False)
class TranscriptionTask(_ShareTask):
    """Transcribe a recording.

    :ivar share_id: the share that the recording belongs to
    :ivar media_url: the URL of the recording
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

    media_url: str = field(repr=False)

    @frameless
    def __init__(
        self,
        share_id: str | int | UUID,
        media_url: str,
        options: Mapping[str, Any] | None = None,
        *,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        priority: int | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
    ) -> None:
        self.__attrs_init__(
            checks.share("share_id", share_id),
            checks.TRANSCRIPTION_OPTIONS.read("options", {} if options is None else options),
            checks.line("media_url", media_url),
            **_sending(task_id, headers, priority, countdown, eta, expires),
        )

    def wire_content(self) -> Mapping[str, Any]:
        """Return the content as it is on the wire."""
        return {"mediaUrl": self.media_url}


@frozen(init=False, slots=False)
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
    content_shape = checks.EMBEDDING_CONTENT
    options_shape = checks.EMBEDDING_OPTIONS


@frozen(init=False, slots=False)
class EmbeddingBatchTask(MLTask):
    """Compute the embeddings of several texts in one task.

    :ivar items: at least one `EmbeddingTask`, or its arguments: a tuple of share_id, content and,
        optionally, options, or a mapping with these keys
    :raises InvalidTaskError: a field is not accepted; the text names the item by its index
    """

    task_type = "embed_vectors"

    items: tuple[EmbeddingTask, ...]

    @frameless
    def __init__(
        self,
        items: Sequence[Sequence[Any] | Mapping[str, Any] | EmbeddingTask],
        *,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        priority: int | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
    ) -> None:
        if not isinstance(items, (list, tuple)):
            checks.refuse("items", items, "a list or a tuple")
        if not items:
            checks.refuse("items", items, "at least one item", " but empty")
        self.__attrs_init__(
            tuple(map(_batch_item, range(len(items)), items)),
            **_sending(task_id, headers, priority, countdown, eta, expires),
        )

    def call(self, preferred: PreferredBackends) -> tuple[Route, dict[str, Any]]:
        """Return the only route, and the arguments of each item's task."""
        route = Route("ml.embed", "vector_service.tasks.generate_embeddings_batch")
        return route, {"tasks": [item.call(preferred)[1] for item in self.items]}

    def __repr__(self) -> str:
        return f"EmbeddingBatchTask(count={len(self.items)})"


def _batch_item(index: int, item: Any) -> EmbeddingTask:
    name = f"items[{index}]"
    if isinstance(item, EmbeddingTask):
        if not item.ordinary:
            raise InvalidTaskError(
                f"{name} has a task_id, headers, priority, countdown, eta or expires; accepted are "
                "these for the batch as a whole only"
            )
        return item
    if isinstance(item, Mapping):
        item = checks.BATCH_ITEM.read(name, item)
        item = item.get("share_id"), item.get("content"), item.get("options")
    if not isinstance(item, (list, tuple)) or not 2 <= len(item) <= 3:
        checks.refuse(name, item, "a tuple of share_id, content and, optionally, options")
    try:
        return EmbeddingTask(*item)
    except InvalidTaskError as error:
        raise InvalidTaskError(f"{name}.{error}") from None


@frozen(init=False, slots=False)
class CeleryTask(_Sending):
    """A Celery task of any name.

    ``args`` and ``kwargs`` may hold what JSON can carry, and UUID, datetime, date, time, Decimal
    and bytes, which a stock worker restores.

    :ivar name: the name of the Celery task; also the metric label
    :ivar args: positional arguments, a list or a tuple
    :ivar kwargs: keyword arguments
    :ivar routing_key: at most 255 bytes of UTF-8, no control characters
    :ivar exchange: ``None`` is the exchange of the settings
    :ivar reply_to: the queue for the result (backend ``rpc://``)
    :ivar argsrepr: the text that brokers and monitors show for ``args``; by default no content
    :ivar kwargsrepr: the text that they show for ``kwargs``
    :ivar time_limit: seconds after which the worker kills the task
    :ivar soft_time_limit: seconds after which it raises an exception in the task; at most
        ``time_limit``
    :raises InvalidTaskError: a field is not accepted; the text names it, with its path
    """

    name: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    routing_key: str = field(repr=False)
    exchange: str | None = field(repr=False)
    reply_to: str | None = field(repr=False)
    argsrepr: str = field(repr=False)
    kwargsrepr: str = field(repr=False)
    time_limit: float | None = field(repr=False)
    soft_time_limit: float | None = field(repr=False)
    plain: bool = field(init=False, repr=False, eq=False)
    """Whether JSON alone can carry the arguments."""

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
        reply_to: str | None = None,
        argsrepr: str = "(...)",
        kwargsrepr: str = "{...}",
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
    ) -> None:
        optional = checks.optional
        kept_args, plain_args = checks.json_sequence("args", () if args is None else args)
        kept_kwargs, plain_kwargs = checks.json_mapping("kwargs", {} if kwargs is None else kwargs)
        self.__attrs_init__(
            checks.line("name", name),
            kept_args,
            kept_kwargs,
            checks.short("routing_key", routing_key),
            optional(checks.short, "exchange", exchange),
            optional(checks.short, "reply_to", reply_to),
            checks.string("argsrepr", argsrepr),
            checks.string("kwargsrepr", kwargsrepr),
            optional(checks.limit, "time_limit", time_limit),
            optional(checks.limit, "soft_time_limit", soft_time_limit),
            **_sending(task_id, headers, priority, countdown, eta, expires),
        )
        if self.time_limit and self.soft_time_limit and self.soft_time_limit > self.time_limit:
            raise InvalidTaskError(
                "soft_time_limit is above time_limit; accepted is at most time_limit"
            )
        object.__setattr__(self, "plain", plain_args and plain_kwargs)

    @property
    def task_type(self) -> str:
        """The metric label."""
        return self.name

    def payload(self) -> dict[str, Any]:
        """Return ``args`` and ``kwargs`` as the worker gets them; for tests."""
        return {"args": _copied(self.args), "kwargs": _copied(self.kwargs)}
