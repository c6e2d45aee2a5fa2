"""The status page: a producer's state as HTML, and as JSON with which the page refreshes itself.

Both are made from one *view*, in which everything is text already, so that the page's script only
has to insert it. Nothing is kept between two requests.

Runs on: the web server's threads.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib import resources
from itertools import takewhile
from string import Template
from typing import Any

from mlproducer._core.states import ConnectionState
from mlproducer.observe.recent_history import HISTORY, Incident, Rates
from mlproducer.producer import MLProducer
from mlproducer.status import Status

WIDTH, HEIGHT = 600, 120
"""The coordinates of the chart, which the page scales."""

PATIENCE = 2
"""Samples, a second apart, without a confirm that are not reported yet."""

FRESH = 5.0
"""Seconds after which the last rate is not shown as the current one."""


def reason(status: Status, max_attempts: int, said: str = "") -> str:
    """Return why a producer is not healthy; an empty text if it is.

    :param max_attempts: attempts to connect after which it gives up
    :param said: the last error of the connection
    """
    if status.healthy:
        return ""
    if status.connection_state is not ConnectionState.CONNECTED:
        return _why_not_connected(status, max_attempts, said)
    if status.blocked:
        return f"{status.broker} blocks publishers: a memory or disk alarm"
    if status.circuit_breaker_open:
        return f"the circuit breaker is open; failures in a row: {status.consecutive_failures}"
    return f"{status.broker} is connected and confirms nothing"


def last_error(errors: Iterable[Incident]) -> str:
    """Return the text of the newest error of the connection, or an empty text."""
    return next((error.text for error in errors if error.of_connection), "")


def _why_not_connected(status: Status, max_attempts: int, said: str) -> str:
    if status.connection_state >= ConnectionState.CLOSING:
        return "the producer is closed"
    if not status.broker:
        return "not started: the first publish, or start(), connects"
    failures, words = status.reconnect_attempts, [f"not connected to {status.broker}"]
    if status.connection_state is ConnectionState.CONNECTING:
        words = [f"connecting to {status.broker}"]
    elif failures >= max_attempts:
        words = [f"gave up connecting to {status.broker}"]
        words.append("the next publish, or reconnect(), starts over")
    if failures:
        words.append(
            "1 attempt has failed" if failures == 1 else f"{failures} attempts have failed"
        )
    if said:
        words.append(f"the last error was: {said.removeprefix(f'{status.broker}: ')}")
    return "; ".join(words)


def view(producer: MLProducer) -> dict[str, Any]:
    """Return what the page shows: texts and lines by the ids of their elements, and lists."""
    status, recent = producer.status(), producer.recent()
    said = last_error(recent.errors)
    why = reason(status, producer.settings.max_reconnect_attempts, said)
    trouble = "" if why else _trouble(status, recent.rates)
    return {
        "level": "bad" if why else "warn" if trouble else "good",
        "texts": {
            "headline": _headline(why, trouble),
            "connection": status.connection_state.name.capitalize(),
            "attempts": f"failed attempts: {status.reconnect_attempts}",
            "circuit": status.circuit_state.name.replace("_", "-").capitalize(),
            "failures": f"failures in a row: {status.consecutive_failures}",
            "broker": status.broker or "none yet",
            "flow": _flow(status),
            "in-flight": f"{status.pending_confirms:,}",
            "retry-queue": f"{status.retry_queue_size:,}",
            "dead-letters": f"{recent.dead_lettered:,}",
            "buried": f"{status.dead_letters:,} not yet at the broker",
            "taken": f"{_written(datetime.now(timezone.utc))} UTC",
            "process": str(os.getpid()),
            **_rates_now(recent.rates),
        },
        "lines": _lines(recent.rates),
        "lists": {
            "letters": [_entry(each) for each in recent.dead_letters],
            "errors": [_entry(each) for each in recent.errors],
        },
    }


def _trouble(status: Status, rates: Sequence[Rates]) -> str:
    """Return what an operator should know although messages get through."""
    silent = list(takewhile(lambda each: not each.confirmed, reversed(rates)))
    if status.pending_confirms and any(each.published for each in silent[PATIENCE:]):
        return "but the broker confirms nothing"
    if status.retry_queue_size:
        return "but messages wait for a retry"
    if status.consecutive_failures:
        return "but nothing has been confirmed since the last failure"
    return "but dead letters wait for the broker" if status.dead_letters else ""


def _flow(status: Status) -> str:
    if status.connection_state is not ConnectionState.CONNECTED:
        return "no connection"
    return "blocks publishers" if status.blocked else "takes messages"


def _headline(why: str, trouble: str) -> str:
    return why[:1].upper() + why[1:] or f"Connected, {trouble or 'all is well'}"


def _entry(incident: Incident) -> list[str]:
    """Return an incident's texts, in the order of the page's columns."""
    times = f" ({incident.times:,}\N{NO-BREAK SPACE}times)" if incident.times > 1 else ""
    return [_written(incident.at), incident.kind + times, incident.text]


def _written(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


# --- the chart ---------------------------------------------------------------------------------


def _rates_now(rates: Sequence[Rates]) -> dict[str, str]:
    last = rates[-1] if rates and rates[-1].age <= FRESH else Rates(0.0, 0.0, 0.0, 0.0)
    return {
        "published": _per_second(last.published),
        "confirmed": _per_second(last.confirmed),
        "deferred": _per_second(last.deferred),
        "top": _per_second(_top(rates)),
    }


def _per_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 or rate == round(rate) else f"{rate:.1f}/s"


def _top(rates: Iterable[Rates]) -> float:
    """Return the least of 1, 2, 5, 10, 20 ... that no rate exceeds."""
    highest = max((max(r.published, r.confirmed, r.deferred) for r in rates), default=0.0)
    top, factors = 1.0, (2.0, 2.5, 2.0)
    for n in range(60):
        if top >= highest:
            break
        top *= factors[n % 3]
    return top


def _lines(rates: Sequence[Rates]) -> dict[str, str]:
    top = _top(rates)

    def points(rate_of: Callable[[Rates], float]) -> str:
        return " ".join(
            f"{WIDTH * (1 - each.age / HISTORY):.1f},{HEIGHT * (1 - rate_of(each) / top):.1f}"
            for each in rates
        )

    published = points(lambda each: each.published)
    if rates:
        ends = (WIDTH * (1 - each.age / HISTORY) for each in (rates[-1], rates[0]))
        published += "".join(f" {end:.1f},{HEIGHT}" for end in ends)
    return {
        "published-line": published,
        "confirmed-line": points(lambda each: each.confirmed),
        "deferred-line": points(lambda each: each.deferred),
    }


# --- HTML --------------------------------------------------------------------------------------


def render(shown: Mapping[str, Any]) -> str:
    """Return the page with a view in it, for browsers with and without JavaScript."""
    fields = {"level": shown["level"], **shown["texts"], **shown["lines"]}
    names = {name.replace("-", "_"): html.escape(text) for name, text in fields.items()}
    lists = {name: _list(entries) for name, entries in shown["lists"].items()}
    return Template(_source()).substitute(names, **lists)


def _list(entries: Sequence[Sequence[str]]) -> str:
    return "".join(
        "<li>" + "".join(f"<span>{html.escape(text)}</span>" for text in entry) + "</li>"
        for entry in entries
    )


@lru_cache(1)
def _source() -> str:
    return resources.files("mlproducer").joinpath("page.html").read_text(encoding="utf-8")


@lru_cache(1)
def content_security_policy() -> str:
    """Return the policy that allows only the page's own style and script.

    Both are identified by their hashes (W3C, *Content Security Policy Level 3*, section 2.3.1).
    """
    style, script = (
        re.findall(f"<{tag}>(.*?)</{tag}>", _source(), re.DOTALL)[0] for tag in ("style", "script")
    )
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
