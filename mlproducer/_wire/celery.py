"""Celery's message protocol 2: a task as headers, properties and a body that any worker takes.

The headers are those that ``celery.app.amqp.AMQP.as_task_v2`` writes for the same task, except
those that have the protocol's default value (no times, no retries, no group), since the broker has
to decode each. The part that is constant for a task's name is encoded once. ``argsrepr`` and
``kwargsrepr``, which brokers and monitors show, hold no user text.

Runs on: any thread.
"""

from __future__ import annotations

import os
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
from mlproducer.tasks import (
    API,
    LOCAL,
    RESERVED_HEADERS,
    CeleryTask,
    MLTask,
    PreferredBackends,
    Route,
    SummarizationTask,
)

_EMBED = b',{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'
_BACKENDS = {
    backend: b'},"options":{"backend":"%b"}}' % backend.encode() for backend in (API, LOCAL)
}
_REMEMBERED = 1024

SENTRY = "sentry-trace"
"""A header that Sentry's worker looks for among those under ``headers``, and nowhere else."""


def encode(
    task: MLTask | CeleryTask,
    *,
    exchange: str,
    preferred: PreferredBackends,
    trace: Mapping[str, str],
    now: datetime | None = None,
    delays: Delays | None = None,
) -> Envelope:
    """Encode a task as a message.

    :param exchange: the exchange, unless the task names one
    :param trace: the headers of a trace context, if there is one
    :param now: when a countdown starts, with a time zone; ``None``: now
    :param delays: the delayed delivery, for a task that is due later; ``None``: its worker holds it
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
        route, body = _share_call(task, preferred) or _call(task, preferred)
        name, routing_key = route.name, route.routing_key
    if task.task_id is None:
        task_id = new_id()
        short = b"$" + task_id.encode()  # 36 characters
    else:
        task_id = task.task_id
        short = amqp.short_string("task_id", task_id)
    running = _running() if "celery" in sys.modules else None
    if not (trace or running or isinstance(task, CeleryTask)) and task.ordinary:
        before, between, after = _template(name, exchange, routing_key)
        properties = b"".join((before, short, between, short, after, short, short))
        return Envelope(task_id, task.task_type, exchange, routing_key, properties, body)
    check_route(exchange, routing_key)
    entries, expiration = _lineage(task_id, short, running), None
    if isinstance(task, CeleryTask) or not task.ordinary:
        now = now or datetime.now(timezone.utc)
        eta, expires = _moments(task, now)
        expiration = _time_to_live(expires, now)
        entries += _optional_headers(task, eta, expires)
        if delays is not None and eta is not None:
            seconds = (eta - now).total_seconds()
            exchange, routing_key = delays.address(exchange, routing_key, seconds)
        # A context among the task's own headers is the one that counts, not a mixture of both.
        trace = {} if "traceparent" in task.headers else trace
        trace = {name: each for name, each in trace.items() if name not in task.headers}
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


def _call(task: MLTask, preferred: PreferredBackends) -> tuple[Route, bytes]:
    """Return a task's route and its body."""
    route, kwargs = task.call(preferred)
    return route, b"".join((b"[[],", strict_json.dumps("kwargs", kwargs), _EMBED))


def _share_call(task: MLTask, preferred: PreferredBackends) -> tuple[Route, bytes] | None:
    """Do what `_call` does, piece by piece, where that is faster: for one text and no options."""
    if not isinstance(task, SummarizationTask) or task.options:
        return None
    content = task.content
    if len(content) > 1 or strict_json.fast() is not None:
        return None
    backend, quoted = preferred.llm, strict_json.quoted
    pieces = (
        b'[[],{"share_id":',
        quoted("share_id", task.share_id),
        b',"content":{"text":',
        quoted("content.text", content["text"]),
        _BACKENDS[backend],
        _EMBED,
    )
    return task.routes[backend], b"".join(pieces)


@lru_cache(_REMEMBERED)
def check_route(exchange: str, routing_key: str) -> None:
    """Check names that `FrameWriter` encodes later, on the I/O thread, where nothing may raise.

    :raises InvalidMessageError: one of them is not a short string
    """
    amqp.short_string("exchange", exchange)
    amqp.short_string("routing_key", routing_key)


@lru_cache(_REMEMBERED)
def _template(name: str, exchange: str, routing_key: str) -> tuple[bytes, bytes, bytes]:
    """Encode what is around the ids, which have a fixed length, of a task without options.

    :raises InvalidMessageError: exchange or routing key is not a short string
    """
    check_route(exchange, routing_key)
    short = b"$" + b"0" * 36
    entries = _lineage("", short, None)
    start, middle = _around_headers(None)
    constant = _constant_entries(name)
    length = (len(constant) + len(entries)).to_bytes(4, "big")
    before, between, _ = entries.split(short)
    return b"".join((start, length, constant, before)), between, middle


def _lineage(task_id: str, short: bytes, running: Any) -> bytes:
    """Encode the ids: the task's and, inside a Celery task, those of its root and its parent."""
    if running is None:
        # A table's text is a short string with three more octets of length.
        return b"".join((b"\x02idS\0\0\0", short, b"\x07root_idS\0\0\0", short))
    root = running.root_id or running.id
    ids = {"id": task_id, "root_id": str(root), "parent_id": str(running.id)}
    return amqp.table_entries("headers", ids)


def _running() -> Any:
    """Return the request of the Celery task that is running on this thread, if there is one."""
    task = getattr(
        sys.modules.get("celery"), "current_task", None
    )  # a proxy, false where no task runs
    request = task.request if task else None
    return request if request is not None and request.id else None


def _optional_headers(
    task: MLTask | CeleryTask, eta: datetime | None, expires: datetime | None
) -> bytes:
    """Encode the headers that the task asks for, except those with the protocol's defaults."""
    given: dict[str, Any] = {}
    if not RESERVED_HEADERS.isdisjoint(task.headers):  # a hook's: the task itself refuses them
        raise InvalidMessageError("headers has names that Celery's workers use themselves")
    if eta is not None:
        given["eta"] = eta.isoformat()
    if expires is not None:
        given["expires"] = expires.isoformat()
    if SENTRY in task.headers:
        given["headers"] = dict(task.headers)
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
    """Encode the properties before the headers, and those between the headers and the two ids."""
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
    import socket  # noqa: PLC0415 - not needed before the first task

    constant = {
        "lang": "py",
        "task": name,
        "argsrepr": argsrepr,
        "kwargsrepr": kwargsrepr,
        "origin": f"gen{os.getpid()}@{socket.gethostname()}",
    }
    return amqp.table_entries("name", constant)


def _moments(task: MLTask | CeleryTask, now: datetime) -> tuple[datetime | None, datetime | None]:
    """Return the time before which a task must not run, and the time after which it must not."""
    eta = now + timedelta(seconds=task.countdown) if task.countdown is not None else task.eta
    expires = task.expires
    if expires is not None and not isinstance(expires, datetime):
        expires = now + timedelta(seconds=expires)
    return eta, expires


def _time_to_live(expires: datetime | None, now: datetime) -> float | None:
    """Return the seconds after which the broker may drop a task, if AMQP can express them.

    The header ``expires`` carries the time too: the worker checks it by its own clock.
    """
    if expires is None:
        return None
    left = max(0.0, (expires - now).total_seconds())
    return left if left <= amqp.MAX_EXPIRATION else None


def _forget_origin() -> None:
    """Encode the origin, which has the process id, again in a forked child."""
    _constant_entries.cache_clear()
    _template.cache_clear()


forks.in_child(_forget_origin)
