"""A WSGI application (PEP 3333) that shows one producer: health, metrics, and a page for people.

Everything it shows is open to whoever can reach it: **there is no authentication.** It shows no
secret and nothing of what messages say, but addresses, error texts and message ids. So serve it on
the loopback interface or an inner network, or mount it behind what guards the rest.

It asks the producer and never the broker; so it answers at once, whatever the network does.

Runs on: the web server's threads; `serve` starts a server of its own on ``mlproducer-http``.
"""

from __future__ import annotations

import json
import socket
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from attrs import field, frozen

from mlproducer import forks, page
from mlproducer.errors import ConfigurationError
from mlproducer.observe import catalog, metrics
from mlproducer.observe.catalog import Family
from mlproducer.producer import MLProducer

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Server", "make_app", "serve"]

JSON = "application/json"

SLOW = 10.0
"""Seconds that a client may take to send or to read the next piece."""

MAX_PORT = 65_535

CLOSE_LIMIT = 2.0
"""Seconds that ending a server may take."""


def make_app(producer: MLProducer) -> WSGIApplication:
    """Make the application. It starts no thread and opens no connection.

    ``GET /`` is the page, and ``/page.json`` what it refreshes itself from; ``/health`` is 200 or
    503, and so 503 until the first publish or ``producer.start()``; ``/metrics`` is Prometheus's
    text format; ``/metrics/json`` sums it up. Durations are in seconds, sizes in bytes.
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
        """Answer a request."""
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
            return _json({"error": "there is nothing here"}, HTTPStatus.NOT_FOUND)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            allow = {"Allow": "GET, HEAD"}
            return _json({"error": "only GET and HEAD"}, HTTPStatus.METHOD_NOT_ALLOWED, allow)
        if prefix and not path:  # the page asks for what lies beside it
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
    return _Answer(HTTPStatus.OK, "text/html; charset=utf-8", text.encode(), policy)


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
    """Give a histogram's mean, 0 where nothing was observed."""
    count = _sum(samples, family, "_count")
    return _sum(samples, family, "_sum") / count if count else 0.0


# --- a server of its own -----------------------------------------------------------------------


def serve(producer: MLProducer, port: int, host: str = "127.0.0.1") -> Server:
    """Serve the application on a daemon thread.

    Call it in the process that is to be watched; a forked child does not serve.

    :param port: 0 takes a free one
    :param host: an address of this machine; ``0.0.0.0`` shows it to everybody
    :raises ConfigurationError: the port is no number from 0 to 65535
    :raises OSError: the port is taken, or the host is not this machine
    """
    if not isinstance(port, int) or not 0 <= port <= MAX_PORT:
        raise ConfigurationError(f"port must be a whole number from 0 to {MAX_PORT}")
    return Server(make_app(producer), port, host)


class Server:
    """A web server on the thread ``mlproducer-http``; each request has a thread while it lasts.

    :ivar port: where it listens
    """

    def __init__(self, app: WSGIApplication, port: int, host: str) -> None:
        self._http = _HTTPServer(port, host)
        self._http.set_app(app)
        self.port: int = self._http.server_port
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="mlproducer-http", daemon=True
        )
        self._thread.start()
        _servers.add(self)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; any number of times, also in a forked child, where no thread runs."""
        if self._thread.is_alive():
            self._http.shutdown()
            # Not only closed: a child may hold the port as well, until its own hook has run.
            with suppress(OSError):
                self._http.socket.shutdown(socket.SHUT_RDWR)
        self._http.server_close()
        self._thread.join(CLOSE_LIMIT)


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _in_child() -> None:
    """Let go of the ports, which would stay taken as long as a child lives."""
    for server in list(_servers):
        server.close()


forks.in_child(_in_child)


class _HTTPServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, port: int, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer on a thread that goes by our name."""
        threading.current_thread().name = "mlproducer-http-request"
        super().process_request_thread(request, client_address)


class _Handler(WSGIRequestHandler):
    timeout = SLOW

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name is given
        """Log nothing: one page would be a line a second."""
