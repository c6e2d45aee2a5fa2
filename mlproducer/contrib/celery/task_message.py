"""A task as Celery has encoded it, as a `Message`: its properties, headers and body.

Runs on: the threads that send tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from attrs import field, frozen
from kombu.serialization import dumps

from mlproducer import Message


@frozen(kw_only=True)
class TaskMessage(Message):
    """A task as Celery has encoded it; a `RecordingProducer` records these.

    :ivar name: the task's name
    :ivar args: its positional arguments, as a list, which is what the worker gets
    :ivar kwargs: its keyword arguments
    """

    name: str
    args: Any = field(default=(), repr=False, eq=False)
    kwargs: Any = field(default=None, repr=False, eq=False)

    @property
    def task_type(self) -> str:
        """The metric label: the task's name."""
        return self.name


def encode(body: Any, options: dict[str, Any]) -> tuple[bytes, str, str | None]:
    """Serialise as kombu does, and return the content's type and encoding."""
    content_type, encoding = options.get("content_type"), options.get("content_encoding")
    if not content_type:
        content_type, encoding, body = dumps(body, serializer=options.get("serializer"))
    elif isinstance(body, str):
        encoding = encoding or "utf-8"
    if isinstance(body, str):
        body = body.encode(encoding or "utf-8")
    return body, content_type, encoding


_FIELDS = frozenset(
    ("correlation_id", "reply_to", "message_id", "timestamp", "type", "user_id", "app_id")
)


def fields_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Message` for the properties that Celery hands to kombu.

    What AMQP does not know (Celery hands over its own options too) kombu drops silently.
    """
    fields = {
        name: value for name, value in properties.items() if name in _FIELDS and value is not None
    }
    if "reply_to" in fields:
        fields["reply_to"] = getattr(fields["reply_to"], "name", fields["reply_to"])
    moment = fields.get("timestamp")
    if isinstance(moment, datetime) and moment.tzinfo is None:
        fields["timestamp"] = moment.replace(tzinfo=timezone.utc)  # as py-amqp takes it
    fields["priority"] = properties.get("priority", 0)
    if properties.get("expiration") is not None:
        fields["expiration"] = int(properties["expiration"] * 1000) / 1000
    return fields


_ALIKE = frozenset((str, int, float, bool, type(None)))
"""Types of headers that both libraries write alike."""


def plain_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers with the types that py-amqp would give them."""
    return {
        key: value if type(value) in _ALIKE else _as_amqp(value) for key, value in headers.items()
    }


def _as_amqp(value: Any) -> Any:
    """Return a list for a tuple, which AMQP does not tell apart, and text for bytes that are it."""
    if isinstance(value, (list, tuple)):
        return [each if type(each) in _ALIKE else _as_amqp(each) for each in value]
    if isinstance(value, (dict, Mapping)):  # the first spares Celery's own a search
        return plain_headers(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value
