"""The W3C trace context of published messages, by which workers continue a trace.

A web framework's middleware, for example, sets it for the code in a ``with`` block. Where
OpenTelemetry is used, it is the parent of a message's span unless another span is current. A
context may come from a client: a malformed one is ignored, and never refuses a message.

Runs on: any thread; each thread and each asyncio task has its own context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{1,256}")
_MAX_TRACESTATE = 512
_MAX_MEMBERS = 32

_NONE: Mapping[str, str] = MappingProxyType({})
context: ContextVar[Mapping[str, str]] = ContextVar("mlproducer_trace_context", default=_NONE)


@contextmanager
def trace_context(traceparent: str | None, tracestate: str | None = "") -> Iterator[None]:
    """Publish the messages of the block with this context (W3C Trace Context, level 1).

    :param traceparent: the header of that name, version 00; anything else is no context
    :param tracestate: the header of that name; it is left out if it is malformed or longer than 512
        characters
    """
    with carrying(_accepted(traceparent, tracestate)):
        yield


@contextmanager
def carrying(headers: Mapping[str, str]) -> Iterator[None]:
    """Publish the messages of the block with these headers, which are well formed."""
    token = context.set(headers)
    try:
        yield
    finally:
        context.reset(token)


def current() -> Mapping[str, str]:
    """Return the headers of the current context: none, ``traceparent``, or ``tracestate`` too."""
    return context.get()


def _accepted(traceparent: str | None, tracestate: str | None) -> Mapping[str, str]:
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent):
        return _NONE
    if not tracestate or not _is_tracestate(tracestate):
        return MappingProxyType({"traceparent": traceparent})
    return MappingProxyType({"traceparent": traceparent, "tracestate": tracestate})


def _is_tracestate(value: str) -> bool:
    """Check a list of ``key=value`` members (section 3.3.1 of the specification)."""
    if not isinstance(value, str) or len(value) > _MAX_TRACESTATE:
        return False
    members = [member.strip(" \t") for member in value.split(",")]
    present = [member for member in members if member]
    return 0 < len(present) <= _MAX_MEMBERS and all(map(_MEMBER.fullmatch, present))
