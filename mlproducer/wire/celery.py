"""Celery's message protocol 2: a task as headers, properties and a body that any worker takes.

The headers are those that ``celery.app.amqp.AMQP.as_task_v2`` writes for the same task, as far as
a worker needs them. What is constant for a Celery task's name is encoded once; what a task was
given follows. ``argsrepr`` and ``kwargsrepr``, which brokers and monitors show, hold no user text.

Runs on: any thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

from mlproducer import forks
from mlproducer.errors import InvalidMessageError
from mlproducer.message import Envelope
from mlproducer.tasks import CeleryTask, MLTask, PreferredBackends
from mlproducer.wire import amqp, strict_json
from mlproducer.wire.delay import Delays
from mlproducer.wire.ids import new_id

_EMBED = b',{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
_REMEMBERED = 1024
_UNTIMED = amqp.table_entries("headers", {"eta": None, "expires": None})


def encode(
    task: MLTask | CeleryTask,
    *,
    exchange: str,
    preferred: PreferredBackends,
    trace: Mapping[str, str],
    now: datetime | None = None,
    delays: Delays | None = None,
) -> Envelope:
    """Turn a task into a message.

    :param exchange: where it goes unless the task itself says
    :param delays: where a task waits that is due later; without, its worker holds it
    :param trace: the headers of a W3C trace context, or nothing
    :param now: what a countdown counts from, with a time zone; ``None`` is this moment
    :raises InvalidMessageError: AMQP or strict JSON cannot carry the task
    :raises MessageTooLargeError: its headers do not fit a frame
    """
    for name, value in task.free_form():
        strict_json.check(name, value)
    if isinstance(task, CeleryTask):
        return _encode_any(task, exchange, trace, now or datetime.now(timezone.utc), delays)
    return _encode_ml(task, exchange, preferred, trace)


def _encode_ml(
    task: MLTask, exchange: str, preferred: PreferredBackends, trace: Mapping[str, str]
) -> Envelope:
    route, kwargs = task.call(preferred)
    check_route(exchange, route.routing_key)
    task_id = new_id()
    further = amqp.table_entries("headers", trace) if trace else b""
    return Envelope(
        message_id=task_id,
        task_type=task.task_type,
        exchange=exchange,
        routing_key=route.routing_key,
        properties=_plain_properties(route.name, task_id, further),
        body=b"".join((b"[[],", _ml_kwargs(kwargs), _EMBED)),
    )


def _encode_any(
    task: CeleryTask,
    exchange: str,
    trace: Mapping[str, str],
    now: datetime,
    delays: Delays | None,
) -> Envelope:
    exchange = exchange if task.exchange is None else task.exchange
    check_route(exchange, task.routing_key)
    task_id = new_id() if task.task_id is None else task.task_id
    args, kwargs = strict_json.dumps("args", task.args), strict_json.dumps("kwargs", task.kwargs)
    # A context among the task's own headers is the one that counts, not a mixture of both.
    trace = {} if "traceparent" in task.headers else trace
    eta, expires = _moments(task, now)
    times = {"eta": _written(eta), "expires": _written(expires)}
    further = amqp.table_entries("headers", times) + amqp.table_entries(
        "headers", {**trace, **task.headers}
    )
    routing_key = task.routing_key
    if delays is not None and eta is not None:
        exchange, routing_key = delays.address(exchange, routing_key, (eta - now).total_seconds())
    return Envelope(
        message_id=task_id,
        task_type=task.task_type,
        exchange=exchange,
        routing_key=routing_key,
        properties=_properties(
            task.name, task_id, further, task.priority, _time_to_live(expires, now)
        ),
        body=b"".join((b"[", args, b",", kwargs, _EMBED)),
    )


@lru_cache(_REMEMBERED)
def check_route(exchange: str, routing_key: str) -> None:
    """Check what `FrameWriter` will encode on the I/O thread, where nobody could be told.

    :raises InvalidMessageError: one of them is no short string
    """
    amqp.short_string("exchange", exchange)
    amqp.short_string("routing_key", routing_key)


def _ml_kwargs(kwargs: Mapping[str, Any]) -> bytes:
    try:
        return strict_json.dumps("kwargs", kwargs)
    except InvalidMessageError:
        for name, value in kwargs.items():  # which of the fields was it
            strict_json.dumps(name, value)
        raise


def _plain_properties(name: str, task_id: str, further: bytes) -> bytes:
    """Encode what `_properties` does, for an id of our own and no times or priority."""
    before, between, after = _template(name, further)
    short = b"$" + task_id.encode()  # 36 characters
    return b"".join((before, short, between, short, after, short, short))


@lru_cache(_REMEMBERED)
def _template(name: str, further: bytes) -> tuple[bytes, bytes, bytes]:
    """Encode what comes before, between and after the places of a task's id in its headers."""
    sample = new_id()
    encoded = _properties(name, sample, _UNTIMED + further)
    before, between, after, *_ = encoded.split(b"$" + sample.encode())
    return before, between, after


def _properties(
    name: str,
    task_id: str,
    further: bytes,
    priority: int | None = None,
    expiration: float | None = None,
) -> bytes:
    start, middle = _around_headers(priority)
    short = amqp.short_string("task_id", task_id)
    long = b"S\0\0\0" + short  # a table's text: the same, with three more octets of length
    entries = b"".join((_constant_entries(name), b"\x02id", long, b"\x07root_id", long, further))
    if expiration is not None:
        return amqp.properties(
            content_type="application/json",
            content_encoding="utf-8",
            headers=len(entries).to_bytes(4, "big") + entries,
            priority=priority,
            correlation_id=task_id,
            expiration=expiration,
            message_id=task_id,
        )
    length = len(entries).to_bytes(4, "big")
    return amqp.check_size(b"".join((start, length, entries, middle, short, short)))


@lru_cache(257)
def _around_headers(priority: int | None) -> tuple[bytes, bytes]:
    """Encode what comes before the headers, and what comes between them and the two ids."""
    encoded = amqp.properties(
        content_type="application/json",
        content_encoding="utf-8",
        headers=b"",
        priority=priority,
        correlation_id="",
        message_id="",
    )
    end = len(encoded) - 2  # the ids, both empty
    split = end - (1 if priority is None else 2)
    return encoded[:split], encoded[split:end]


@lru_cache(_REMEMBERED)
def _constant_entries(name: str) -> bytes:
    constant = {
        "lang": "py",
        "task": name,
        "group": None,
        "retries": 0,
        "timelimit": [None, None],
        "parent_id": None,
        "argsrepr": "(...)",
        "kwargsrepr": "{...}",
        "ignore_result": False,
        "origin": f"gen{os.getpid()}@{socket.gethostname()}",
    }
    return amqp.table_entries("name", constant)


def _moments(task: CeleryTask, now: datetime) -> tuple[datetime | None, datetime | None]:
    """Give when a task may run, and after when it may not."""
    eta = now + timedelta(seconds=task.countdown) if task.countdown is not None else task.eta
    expires = task.expires
    if expires is not None and not isinstance(expires, datetime):
        expires = now + timedelta(seconds=expires)
    return eta, expires


def _written(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _time_to_live(expires: datetime | None, now: datetime) -> float | None:
    """Give the seconds after which the broker may drop a task, as far as AMQP can say them.

    The header says it too, for the worker, whose clock is the one that counts.
    """
    if expires is None:
        return None
    left = max(0.0, (expires - now).total_seconds())
    return left if left <= amqp.MAX_EXPIRATION else None


def _forget_origin() -> None:
    """Let a child of a fork name itself."""
    _constant_entries.cache_clear()
    _template.cache_clear()


forks.in_child(_forget_origin)
