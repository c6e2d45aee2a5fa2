"""Celery's message protocol 2: a task as headers, properties and a body that any worker takes.

The headers are those that ``celery.app.amqp.AMQP.as_task_v2`` writes for the same task, as far as
a worker needs them: what the protocol takes for granted where it is missing (no times, no
retries, no group) is left out, for the broker decodes each. What is constant for a task's name is
encoded once; what a task was given follows. ``argsrepr`` and ``kwargsrepr``, which brokers and
monitors show, hold no user text.

Runs on: any thread.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

from mlproducer import _forks as forks
from mlproducer._wire import amqp, strict_json
from mlproducer._wire.delay import Delays
from mlproducer._wire.ids import new_id
from mlproducer.errors import InvalidMessageError
from mlproducer.message import Envelope
from mlproducer.tasks import WORKERS_NAMES, CeleryTask, MLTask, PreferredBackends

_EMBED = b',{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
_REMEMBERED = 1024


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
    :param trace: the headers of a W3C trace context, or nothing
    :param now: what a countdown counts from, with a time zone; ``None`` is this moment
    :param delays: where a task waits that is due later; without, its worker holds it
    :raises InvalidMessageError: AMQP or strict JSON cannot carry the task
    :raises MessageTooLargeError: its headers do not fit a frame
    """
    if isinstance(task, CeleryTask):
        arguments = [
            strict_json.dumps(name, value, plain=task.plain)
            for name, value in (("args", task.args), ("kwargs", task.kwargs))
        ]
        body = b"".join((b"[", arguments[0], b",", arguments[1], _EMBED))
        name, routing_key = task.name, task.routing_key
        exchange = exchange if task.exchange is None else task.exchange
    else:
        route, kwargs = task.call(preferred)
        body = b"".join((b"[[],", strict_json.dumps("kwargs", kwargs), _EMBED))
        name, routing_key = route.name, route.routing_key
    check_route(exchange, routing_key)
    if task.task_id is None:
        task_id = new_id()
        short = b"$" + task_id.encode()  # 36 characters
    else:
        task_id = task.task_id
        short = amqp.short_string("task_id", task_id)
    running = _running() if "celery" in sys.modules else None
    if not (trace or running or isinstance(task, CeleryTask)) and task.ordinary:
        before, between, after = _template(name)
        properties = b"".join((before, short, between, short, after, short, short))
        return Envelope(task_id, task.task_type, exchange, routing_key, properties, body)
    entries, expiration = _lineage(task_id, short, running), None
    if isinstance(task, CeleryTask) or not task.ordinary:
        now = now or datetime.now(timezone.utc)
        eta, expires = _moments(task, now)
        expiration = _time_to_live(expires, now)
        entries += _further(task, eta, expires)
        if delays is not None and eta is not None:
            seconds = (eta - now).total_seconds()
            exchange, routing_key = delays.address(exchange, routing_key, seconds)
        # A context among the task's own headers is the one that counts, not a mixture of both.
        trace = {} if "traceparent" in task.headers else trace
    if trace:
        entries += amqp.table_entries("headers", trace)
    return Envelope(
        message_id=task_id,
        task_type=task.task_type,
        exchange=exchange,
        routing_key=routing_key,
        properties=_properties(task, name, task_id, short, entries, expiration),
        body=body,
    )


@lru_cache(_REMEMBERED)
def check_route(exchange: str, routing_key: str) -> None:
    """Check what `FrameWriter` will encode on the I/O thread, where nobody could be told.

    :raises InvalidMessageError: one of them is no short string
    """
    amqp.short_string("exchange", exchange)
    amqp.short_string("routing_key", routing_key)


@lru_cache(_REMEMBERED)
def _template(name: str) -> tuple[bytes, bytes, bytes]:
    """Encode what is around the ids, all of one length, of an ML task with nothing further."""
    short = b"$" + b"0" * 36
    entries = _lineage("", short, None)
    start, middle = _around_headers(None)
    constant = _constant_entries(name)
    length = (len(constant) + len(entries)).to_bytes(4, "big")
    before, between, _ = entries.split(short)
    return b"".join((start, length, constant, before)), between, middle


def _lineage(task_id: str, short: bytes, running: Any) -> bytes:
    """Encode the ids: of the task itself and, inside a Celery task, of what it comes from."""
    if running is None:
        # A table's text is a short string with three more octets of length.
        return b"".join((b"\x02idS\0\0\0", short, b"\x07root_idS\0\0\0", short))
    root = running.root_id or running.id
    ids = {"id": task_id, "root_id": str(root), "parent_id": str(running.id)}
    return amqp.table_entries("headers", ids)


def _running() -> Any:
    """Give the request of the Celery task that runs on this thread, if there is one."""
    task = getattr(
        sys.modules.get("celery"), "current_task", None
    )  # a proxy, false where no task runs
    request = task.request if task else None
    return request if request is not None and request.id else None


def _further(task: MLTask | CeleryTask, eta: datetime | None, expires: datetime | None) -> bytes:
    """Encode the headers that were asked for; what the protocol takes for granted is left out."""
    given: dict[str, Any] = {}
    if not WORKERS_NAMES.isdisjoint(task.headers):  # added by a hook: the task would refuse them
        raise InvalidMessageError("headers has names that Celery's workers use themselves")
    if eta is not None:
        given["eta"] = eta.isoformat()
    if expires is not None:
        given["expires"] = expires.isoformat()
    if isinstance(task, CeleryTask) and (task.time_limit or task.soft_time_limit):
        given["timelimit"] = [task.time_limit, task.soft_time_limit]
    return amqp.table_entries("headers", {**given, **task.headers})


def _properties(
    task: MLTask | CeleryTask,
    name: str,
    task_id: str,
    short: bytes,
    entries: bytes,
    expiration: float | None,
) -> bytes:
    if isinstance(task, CeleryTask):
        constant = _constant_entries(name, task.argsrepr, task.kwargsrepr)
        reply_to = task.reply_to
    else:
        constant, reply_to = _constant_entries(name), None
    length = (len(constant) + len(entries)).to_bytes(4, "big")
    if expiration is not None or reply_to is not None:
        return amqp.properties(
            content_type="application/json",
            content_encoding="utf-8",
            headers=b"".join((length, constant, entries)),
            priority=task.priority,
            correlation_id=task_id,
            reply_to=reply_to,
            expiration=expiration,
            message_id=task_id,
        )
    start, middle = _around_headers(task.priority)
    return amqp.check_size(b"".join((start, length, constant, entries, middle, short, short)))


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
def _constant_entries(name: str, argsrepr: str = "(...)", kwargsrepr: str = "{...}") -> bytes:
    constant = {
        "lang": "py",
        "task": name,
        "argsrepr": argsrepr,
        "kwargsrepr": kwargsrepr,
        "origin": f"gen{os.getpid()}@{socket.gethostname()}",
    }
    return amqp.table_entries("name", constant)


def _moments(task: MLTask | CeleryTask, now: datetime) -> tuple[datetime | None, datetime | None]:
    """Give when a task may run, and after when it may not."""
    eta = now + timedelta(seconds=task.countdown) if task.countdown is not None else task.eta
    expires = task.expires
    if expires is not None and not isinstance(expires, datetime):
        expires = now + timedelta(seconds=expires)
    return eta, expires


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
