"""Encode a `Message` of any content, unchanged, and check it against the limits of AMQP 0-9-1.

Runs on: any thread.
"""

from __future__ import annotations

from mlproducer._wire import amqp
from mlproducer._wire.celery import check_route
from mlproducer._wire.ids import new_id
from mlproducer.message import Envelope, Message


def encode(message: Message, *, exchange: str) -> Envelope:
    """Encode a message; one without an id gets one.

    :param exchange: the exchange, unless the message names one
    :raises InvalidMessageError: AMQP cannot carry one of its fields
    :raises MessageTooLargeError: its headers do not fit a frame
    """
    exchange = exchange if message.exchange is None else message.exchange
    check_route(exchange, message.routing_key)
    message_id = new_id() if message.message_id is None else message.message_id
    return Envelope(
        message_id=message_id,
        task_type=message.task_type,
        exchange=exchange,
        routing_key=message.routing_key,
        properties=_properties(message, message_id),
        body=message.body,
    )


def _properties(message: Message, message_id: str) -> bytes:
    headers = None if message.headers is None else amqp.table("headers", message.headers)
    return amqp.properties(
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=headers,
        persistent=message.persistent,
        priority=message.priority,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=message.expiration,
        message_id=message_id,
        timestamp=message.seconds,
        type=message.type,
        user_id=message.user_id,
        app_id=message.app_id,
        mandatory=message.mandatory,
    )
