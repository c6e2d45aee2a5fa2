"""The topology on the broker: an exchange, its queues, and the dead-letter exchange and queue.

A task queue dead-letters messages that workers, or the broker itself, give up (RabbitMQ guide,
*Quorum Queues*: a message that was delivered more often than the delivery limit is dropped, unless
there is a dead-letter exchange). At-least-once dead-lettering keeps a message in its queue until
the dead-letter queue has confirmed it.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from attrs import Attribute, Factory, evolve, field, frozen

from mlproducer.errors import ConfigurationError

ROUTING_KEYS = (
    "ml.summarize",
    "ml.summarize_local",
    "ml.transcribe",
    "ml.transcribe_local",
    "ml.embed",
)
"""The routing keys of the machine-learning tasks; each has a queue of the same name."""

DELIVERY_LIMIT = 20
"""How often a quorum queue delivers a message before it dead-letters it."""

_NO_LIMIT = 2**31 - 1
"""Reading a dead letter counts as a delivery, and RabbitMQ 4 drops it after 20 by default."""

QueueType = Literal["quorum", "classic", "stream"]
_TYPES = ("quorum", "classic", "stream")
_EXCHANGE_TYPES = ("topic", "direct", "fanout", "headers")


def _check_name(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigurationError(
            f"{attribute.name} must be a non-empty str without control characters"
        )
    if len(value.encode(errors="replace")) > 255:
        raise ConfigurationError(f"{attribute.name} must be a str of at most 255 bytes")


def _check_keys(_instance: Any, attribute: Attribute[Any], value: tuple[Any, ...]) -> None:
    for key in value:
        if not isinstance(key, str) or len(key.encode(errors="replace")) > 255:
            raise ConfigurationError(f"{attribute.name} must be str of at most 255 bytes each")


def _check_type(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and value not in _TYPES:
        raise ConfigurationError(f"{attribute.name} must be one of {', '.join(_TYPES)}, or None")


def _check_exchange_type(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not (value in _EXCHANGE_TYPES or value.startswith("x-")):
        accepted = ", ".join(_EXCHANGE_TYPES)
        raise ConfigurationError(f"{attribute.name} must be one of {accepted}, or a plugin's x-...")


def _check_arguments(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f"{attribute.name} must have keys of type str")


def _check_queues(_instance: Any, attribute: Attribute[Any], value: tuple[Any, ...]) -> None:
    if not all(isinstance(queue, Queue) for queue in value):
        raise ConfigurationError(f"{attribute.name} must be mlproducer.Queue objects")
    names = [queue.name for queue in value]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{attribute.name} must not have two queues of one name")


def _as_keys(keys: str | Sequence[str]) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else tuple(keys)


@frozen
class Declaration:
    """One declaration, as the name of an AMQP method and its arguments."""

    method: str
    arguments: Mapping[str, Any]

    @property
    def target(self) -> str:
        """The name of what is declared, for logs."""
        named = (self.arguments.get(name) for name in ("queue", "exchange", "destination"))
        return next(str(name) for name in named if name)


@frozen
class Queue:
    """A queue for tasks, and its bindings.

    :ivar routing_keys: of the bindings to the topology's exchange; by default the queue's name
    :ivar type: ``quorum``, ``classic`` or ``stream``; with ``None`` the arguments are exactly
        ``arguments``, such as those of a queue that another program declares
    :ivar arguments: further ``x-`` arguments; they replace those of the type, and None removes one
    :raises ConfigurationError: a field is invalid; the text names it
    """

    name: str = field(validator=_check_name)
    routing_keys: tuple[str, ...] = field(
        default=Factory(lambda self: (self.name,), takes_self=True),
        converter=_as_keys,
        validator=_check_keys,
    )
    type: QueueType | None = field(default="quorum", validator=_check_type)
    arguments: Mapping[str, Any] = field(factory=dict, converter=dict, validator=_check_arguments)

    def declared_arguments(self, dead_letter_exchange: str) -> dict[str, Any]:
        """Return the arguments with which the queue is declared."""
        brought: dict[str, Any] = {} if self.type is None else {"x-queue-type": self.type}
        if self.type == "quorum":
            brought["x-delivery-limit"] = DELIVERY_LIMIT
        if self.type in ("quorum", "classic"):
            brought["x-dead-letter-exchange"] = dead_letter_exchange
        if self.type == "quorum":
            # At-least-once dead-lettering works only with this overflow behaviour.
            brought["x-dead-letter-strategy"] = "at-least-once"
            brought["x-overflow"] = "reject-publish"
        given = {**brought, **self.arguments}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def quorum(self) -> bool:
        """Whether it is a quorum queue, by its type or its arguments."""
        return self.type == "quorum" or self.arguments.get("x-queue-type") == "quorum"


def _as_tuple(queues: Sequence[Queue]) -> tuple[Queue, ...]:
    return tuple(queues)


@frozen
class Topology:
    """The exchange, its queues and bindings, and the dead-letter exchange and queue.

    :ivar dead_letter_exchange: by default the exchange's name followed by ``.dlx``
    :raises ConfigurationError: a field is invalid; the text names it
    """

    exchange: str = field(default="bookmarkai.ml", validator=_check_name)
    exchange_type: str = field(default="topic", validator=_check_exchange_type)
    queues: tuple[Queue, ...] = field(
        default=tuple(Queue(key) for key in ROUTING_KEYS),
        converter=_as_tuple,
        validator=_check_queues,
    )
    dead_letter_exchange: str = field(
        default=Factory(lambda self: f"{self.exchange}.dlx", takes_self=True),
        validator=_check_name,
    )
    dead_letter_queue: str = field(default="ml.dead_letter", validator=_check_name)

    def prefixed(self, prefix: str, delivery_limit: int) -> Topology:
        """Return it with a prefix before its names, and a limit for queues that have none."""
        return evolve(
            self,
            queues=tuple(_prefixed(queue, prefix, delivery_limit) for queue in self.queues),
            dead_letter_exchange=prefix + self.dead_letter_exchange,
            dead_letter_queue=prefix + self.dead_letter_queue,
        )

    def declarations(self, mode: str) -> Iterator[Declaration]:
        """Yield what is declared on each connect, in the mode ``active``, ``passive`` or ``off``.

        Passive declarations check that an exchange or queue exists, and need no permission to
        configure it.
        """
        if mode == "off":
            return
        passive = mode == "passive"
        kinds = {self.exchange: self.exchange_type, self.dead_letter_exchange: "topic"}
        for exchange, kind in kinds.items():
            declared = {} if passive else {"exchange_type": kind, "durable": True}
            yield Declaration(
                "exchange_declare", {"exchange": exchange, "passive": passive, **declared}
            )
        # The dead-letter queue comes first: no task queue may exist without it.
        queues = [(self.dead_letter_queue, self._dead_letter_arguments())]
        queues += [
            (queue.name, queue.declared_arguments(self.dead_letter_exchange))
            for queue in self.queues
        ]
        for name, arguments in queues:
            if passive:
                yield Declaration("queue_declare", {"queue": name, "passive": True})
                continue
            yield Declaration(
                "queue_declare", {"queue": name, "durable": True, "arguments": arguments}
            )
            for exchange, key in self._bindings(name):
                yield Declaration(
                    "queue_bind", {"queue": name, "exchange": exchange, "routing_key": key}
                )

    def _dead_letter_arguments(self) -> dict[str, Any]:
        return {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT}

    def _bindings(self, name: str) -> Iterator[tuple[str, str]]:
        if name == self.dead_letter_queue:
            yield self.dead_letter_exchange, "#"
        for queue in self.queues:
            if queue.name == name:
                yield from ((self.exchange, key) for key in queue.routing_keys)


def _prefixed(queue: Queue, prefix: str, limit: int) -> Queue:
    """Return a queue with the prefix, and with the delivery limit unless it has its own."""
    arguments = dict(queue.arguments)
    if queue.type == "quorum":
        arguments.setdefault("x-delivery-limit", limit)
    # The routing keys have no prefix: they are those with which tasks are published.
    return evolve(queue, name=prefix + queue.name, arguments=arguments)
