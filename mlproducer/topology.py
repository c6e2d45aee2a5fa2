"""What stands on the broker: the exchange, its queues, and the pair for dead letters.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from mlproducer.settings import Settings

QUEUES = ("ml.summarize", "ml.summarize_local", "ml.transcribe", "ml.transcribe_local", "ml.embed")
"""Each is named after the routing key that leads to it."""

_NO_LIMIT = 2**31 - 1
"""Looking at a dead letter hands it out; RabbitMQ 4 drops it after 20 times, unless told so."""


@frozen
class Declaration:
    """One thing to declare, by AMQP's own name of the method and its arguments."""

    method: str
    arguments: Mapping[str, Any]

    @property
    def target(self) -> str:
        """What is declared, for logs."""
        return str(self.arguments.get("queue") or self.arguments["exchange"])


@frozen(kw_only=True)
class Topology:
    """The exchange, its queues and bindings, and where dead letters go.

    :ivar delivery_limit: how often a quorum queue hands a message out before it drops it
        (RabbitMQ guide, *Quorum Queues*, poison messages)
    """

    exchange: str = "bookmarkai.ml"
    queues: tuple[str, ...] = QUEUES
    delivery_limit: int = 5
    dead_letter_exchange: str = "bookmarkai.ml.dlx"
    dead_letter_queue: str = "ml.dead_letter"

    @classmethod
    def of(cls, settings: Settings) -> Topology:
        """Give the topology around the exchange that the settings name."""
        return cls(exchange=settings.exchange, dead_letter_exchange=f"{settings.exchange}.dlx")

    def declarations(self, mode: str) -> Iterator[Declaration]:
        """Give what is to be declared on each connect: ``active``, ``passive`` or ``off``.

        Passive declarations check that a thing exists, and need no configure permission.
        """
        if mode == "off":
            return
        passive = mode == "passive"
        for exchange in (self.exchange, self.dead_letter_exchange):
            kind = {} if passive else {"exchange_type": "topic", "durable": True}
            yield Declaration(
                "exchange_declare", {"exchange": exchange, "passive": passive, **kind}
            )
        for queue in (*self.queues, self.dead_letter_queue):
            yield from self._queue(queue, passive=passive)

    def _queue(self, queue: str, *, passive: bool) -> Iterator[Declaration]:
        if passive:
            yield Declaration("queue_declare", {"queue": queue, "passive": True})
            return
        dead = queue == self.dead_letter_queue
        limit = _NO_LIMIT if dead else self.delivery_limit
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": limit}
        yield Declaration(
            "queue_declare", {"queue": queue, "durable": True, "arguments": arguments}
        )
        yield Declaration(
            "queue_bind",
            {
                "queue": queue,
                "exchange": self.dead_letter_exchange if dead else self.exchange,
                "routing_key": "#" if dead else queue,
            },
        )
