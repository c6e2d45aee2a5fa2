"""What Celery and kombu would declare, noted as declarations of ours instead of sent.

kombu's own code runs, on a stand-in for its channel, so that all arguments are those with which it
declares, whatever its version.

Runs on: the threads that send tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from celery import Celery
from kombu.common import Broadcast
from kombu.transport.base import to_rabbitmq_queue_arguments

from mlproducer.topology import Declaration

try:
    from kombu.transport import native_delayed_delivery as delayed
except ImportError:  # before kombu 5.5
    delayed = None

DELAYED = "celery_delayed_27"
"""The exchange to which Celery sends a task that a quorum queue is to have later."""


def declarations_of(entities: Iterable[Any]) -> list[Declaration]:
    """Return what declaring these queues and exchanges amounts to."""
    channel = _Noting()
    for entity in entities:
        entity.bind(channel).declare()
    return channel.noted


def delayed_delivery(app: Celery) -> list[Declaration]:
    """Return what Celery's workers declare for delayed delivery to the app's queues, and these."""
    channel = _Noting()
    if delayed is not None:
        queues = [each for each in app.amqp.queues.values() if not isinstance(each, Broadcast)]
        for queue in queues:
            queue.bind(channel).declare()
        queue_type = app.conf.broker_native_delayed_delivery_queue_type
        delayed.declare_native_delayed_delivery_exchanges_and_queues(channel, queue_type)
        for queue in queues:
            delayed.bind_queue_to_native_delayed_delivery_exchange(channel, queue)
    return channel.noted


class _Noting:
    """A kombu channel, and its connection, as far as entities need one to be declared."""

    def __init__(self) -> None:
        self.noted: list[Declaration] = []

    def channel(self) -> _Noting:
        """Be the channel of this connection too."""
        return self

    def prepare_queue_arguments(
        self, arguments: Mapping[str, Any], **options: Any
    ) -> Mapping[str, Any]:
        """Give a queue's arguments their names on the wire."""
        wire: Mapping[str, Any] = to_rabbitmq_queue_arguments(arguments, **options)
        return wire

    def exchange_declare(
        self,
        exchange: str,
        type: str = "direct",  # noqa: A002 - kombu calls it so
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = False,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Note it."""
        self._note(
            "exchange_declare",
            exchange=exchange,
            exchange_type=type,
            passive=passive,
            durable=durable,
            auto_delete=auto_delete,
            arguments=arguments,
        )

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> tuple[str, int, int]:
        """Note it; kombu takes the name from the answer."""
        self._note(
            "queue_declare",
            queue=queue,
            passive=passive,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            arguments=arguments,
        )
        return queue, 0, 0

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Note it."""
        self._note(
            "queue_bind",
            queue=queue,
            exchange=exchange,
            routing_key=routing_key,
            arguments=arguments,
        )

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Note it."""
        self._note(
            "exchange_bind",
            destination=destination,
            source=source,
            routing_key=routing_key,
            arguments=arguments,
        )

    def _note(self, method: str, **arguments: Any) -> None:
        # pika takes a routing key that is not given for the queue's name
        given = {key: each for key, each in arguments.items() if each or key == "routing_key"}
        self.noted.append(Declaration(method, given))
