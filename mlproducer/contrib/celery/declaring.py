"""What Celery and kombu would declare, recorded as declarations instead of sent.

kombu's own code runs on a stand-in for its channel, so the arguments are those that it would
declare with, whatever its version.

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
"""The exchange to which Celery sends a task that is due later and goes to a quorum queue."""


def declarations_of(entities: Iterable[Any]) -> list[Declaration]:
    """Return the declarations that these queues and exchanges make."""
    channel = _RecordingChannel()
    for entity in entities:
        entity.bind(channel).declare()
    return channel.recorded


def delayed_delivery(app: Celery) -> list[Declaration]:
    """Return what Celery's workers declare for delayed delivery to the app's queues, and these."""
    channel = _RecordingChannel()
    if delayed is not None:
        queues = [each for each in app.amqp.queues.values() if not isinstance(each, Broadcast)]
        for queue in queues:
            queue.bind(channel).declare()
        queue_type = app.conf.broker_native_delayed_delivery_queue_type
        delayed.declare_native_delayed_delivery_exchanges_and_queues(channel, queue_type)
        for queue in queues:
            delayed.bind_queue_to_native_delayed_delivery_exchange(channel, queue)
    return channel.recorded


class _RecordingChannel:
    """A kombu channel, and its connection, as far as entities need one to be declared."""

    def __init__(self) -> None:
        self.recorded: list[Declaration] = []

    def channel(self) -> _RecordingChannel:
        """Return this object, which stands for connection and channel."""
        return self

    def prepare_queue_arguments(
        self, arguments: Mapping[str, Any], **options: Any
    ) -> Mapping[str, Any]:
        """Return a queue's arguments under their names on the wire."""
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
        """Record the declaration."""
        self._record(
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
        """Record the declaration; kombu takes the name from the answer."""
        self._record(
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
        """Record the declaration."""
        self._record(
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
        """Record the declaration."""
        self._record(
            "exchange_bind",
            destination=destination,
            source=source,
            routing_key=routing_key,
            arguments=arguments,
        )

    def _record(self, method: str, **arguments: Any) -> None:
        # pika takes a routing key that is not given for the queue's name
        given = {key: each for key, each in arguments.items() if each or key == "routing_key"}
        self.recorded.append(Declaration(method, given))
