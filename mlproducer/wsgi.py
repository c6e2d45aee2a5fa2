"""A WSGI application (PEP 3333) that shows one producer: health, metrics, and a status page.

**There is no authentication:** every client that can reach it sees everything. It shows no secret
and no content of messages, but addresses, error texts and message ids. So serve it on the loopback
interface or an internal network, or mount it behind the application's authentication.

It reads the producer's state and never asks the broker, so it answers at once, even during an
outage.

Runs on: the web server's threads.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from attrs import field, frozen

from mlproducer import _status_page as page
from mlproducer._http_server import Server
from mlproducer.errors import ConfigurationError
from mlproducer.observe import metric_families as catalog
from mlproducer.observe import metrics
from mlproducer.observe.metric_families import Family
from mlproducer.producer import MLProducer

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Server", "make_app", "serve"]

JSON = "application/json"

MAX_PORT = 65_535


def make_app(producer: MLProducer) -> WSGIApplication:
    """Return the application. It starts no thread and opens no connection.

    ``GET /`` is the status page, which refreshes itself from ``/page.json``. ``/health`` is 200 or
    503; it is 503 until the first publish or ``producer.start()``. ``/metrics`` has Prometheus'
    text format, and ``/metrics/json`` a summary. Durations are in seconds, sizes in bytes.
    """
    return _App(
        {
            "/": partial(_page, producer),
            "/page.json": partial(_page_json, producer),
            **dict.fromkeys(("/health", "/v1/ml/analytics/health"), partial(_health, producer)),
            **dict.fromkeys(("/metrics", "/api/ml/metrics/prometheus"), partial(_text, producer)),
            **dict.fromkeys(("/metrics/json", "/api/ml/metrics/json"), partial(_sums, producer)),
        }
    )


# --- HTTP --------------------------------------------------------------------------------------


@frozen
class _Answer:
    status: HTTPStatus
    kind: str
    body: bytes
    headers: Mapping[str, str] = field(factory=dict)


@frozen
class _App:
    routes: Mapping[str, Callable[[], _Answer]]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle a request."""
        answer = self._answer(environ)
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
            **answer.headers,
        }
        start_response(f"{answer.status.value} {answer.status.phrase}", list(headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: WSGIEnvironment) -> _Answer:
        prefix, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
        route = self.routes.get(path or "/")
        if route is None:
            return _json({"error": "not found"}, HTTPStatus.NOT_FOUND)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            allow = {"Allow": "GET, HEAD"}
            return _json(
                {"error": "allowed are GET and HEAD"}, HTTPStatus.METHOD_NOT_ALLOWED, allow
            )
        if prefix and not path:  # the page refers to page.json relative to its own URL
            location = {"Location": f"{prefix.rpartition('/')[2]}/"}
            return _json({}, HTTPStatus.PERMANENT_REDIRECT, location)
        try:
            return route()
        except metrics.UnreadableError as error:
            return _json({"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE)


def _json(
    content: object, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> _Answer:
    return _Answer(status, JSON, json.dumps(content).encode() + b"\n", headers or {})


# --- what is shown -----------------------------------------------------------------------------


def _page(producer: MLProducer) -> _Answer:
    text = page.render(page.view(producer))
    policy = {"Content-Security-Policy": page.content_security_policy()}
    # A path or a broker's text that is not Unicode has lone surrogates.
    body = text.encode(errors="backslashreplace")
    return _Answer(HTTPStatus.OK, "text/html; charset=utf-8", body, policy)


def _page_json(producer: MLProducer) -> _Answer:
    return _json(page.view(producer))


def _health(producer: MLProducer) -> _Answer:
    status = producer.status()
    if status.healthy:
        return _json(status.to_json())
    said = page.last_error(producer.recent().errors)
    reason = page.reason(status, producer.settings.max_reconnect_attempts, said)
    return _json({**status.to_json(), "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)


def _text(producer: MLProducer) -> _Answer:
    return _Answer(HTTPStatus.OK, metrics.CONTENT_TYPE, metrics.exposition(producer.registry))


def _sums(producer: MLProducer) -> _Answer:
    samples = list(metrics.samples(producer.registry))
    status = producer.status()
    sent: dict[str, dict[str, int]] = defaultdict(dict)
    for labels, value in _series(samples, catalog.TASKS_SENT):
        sent[labels["task_type"]][labels["status"]] = int(value)
    retries = {
        labels["task_type"]: int(value) for labels, value in _series(samples, catalog.TASK_RETRIES)
    }
    return _json(
        {
            "tasks": {"sent": sent, "retries": retries},
            "connection": {
                "state": status.connection_state.name,
                "reconnectAttempts": status.reconnect_attempts,
                "errors": int(_sum(samples, catalog.CONNECTION_ERRORS)),
            },
            "circuitBreaker": {
                "state": status.circuit_state.name,
                "trips": int(_sum(samples, catalog.CIRCUIT_BREAKER_TRIPS)),
            },
            "performance": {
                "avgPublishDuration": _mean(samples, catalog.TASK_PUBLISH_DURATION),
                "avgMessageSize": _mean(samples, catalog.MESSAGE_SIZE),
            },
        }
    )


_Sample = tuple[str, Mapping[str, str], float]


def _series(
    samples: Iterable[_Sample], family: Family, suffix: str = ""
) -> Iterator[tuple[Mapping[str, str], float]]:
    for name, labels, value in samples:
        if name == family.name + suffix:
            yield labels, value


def _sum(samples: Iterable[_Sample], family: Family, suffix: str = "") -> float:
    return sum(value for _, value in _series(samples, family, suffix))


def _mean(samples: Iterable[_Sample], family: Family) -> float:
    """Return a histogram's mean; 0 if nothing was observed."""
    count = _sum(samples, family, "_count")
    return _sum(samples, family, "_sum") / count if count else 0.0


# --- a server of its own -----------------------------------------------------------------------


def serve(producer: MLProducer, port: int, host: str = "127.0.0.1") -> Server:
    """Serve the application on one daemon thread, until `Server.close`.

    It serves at most 32 clients at a time, each for at most 10 s. Call it in the process that is to
    be monitored; a forked child does not serve.

    :param port: 0 chooses a free port
    :param host: an address of this machine; ``0.0.0.0`` accepts clients from everywhere
    :raises ConfigurationError: the port is not a number from 0 to 65535
    :raises OSError: the port is in use, or the host is not an address of this machine
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MAX_PORT:
        raise ConfigurationError(f"port must be an int from 0 to {MAX_PORT}")
    return Server(make_app(producer), port, host)
