"""The WSGI application: what it answers, how it mounts, and its own server."""

from __future__ import annotations

import ctypes
import gc
import http.client
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any
from wsgiref.util import setup_testing_defaults, shift_path_info
from wsgiref.validate import validator

import flask
import pytest
from prometheus_client import CollectorRegistry
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mlproducer import (
    CircuitState,
    ConnectionState,
    MLProducer,
    Settings,
    Status,
    wsgi,
)
from mlproducer import (
    _http_server as web,
)
from mlproducer._core import events
from mlproducer._status_page import reason
from mlproducer.errors import BrokerRejectedError, CircuitOpenError, ConfigurationError, NackError
from mlproducer.observe import metrics
from mlproducer.testing.fake_broker import FakeBroker, FakeConnection, ReceivedMessage
from mlproducer.wsgi import Server, make_app
from tests.helpers import LIMIT, descriptors, make_message
from tests.stopwatch import Stopwatch
from tests.threaded.brokers import Silent
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import Moody, told

PATHS = {
    "/": "text/html; charset=utf-8",
    "/page.json": "application/json",
    "/health": "application/json",
    "/v1/ml/analytics/health": "application/json",
    "/metrics": metrics.CONTENT_TYPE,
    "/api/ml/metrics/prometheus": metrics.CONTENT_TYPE,
    "/metrics/json": "application/json",
    "/api/ml/metrics/json": "application/json",
}

HOSTILE = "<script>alert('x')</script> & \"</textarea>\" ${level}"

App = Callable[..., Iterable[bytes]]


class Answer:
    """What a WSGI application answered to one request, checked for conformance by the stdlib."""

    def __init__(self, app: App, path: str, method: str = "GET") -> None:
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path}
        environ["QUERY_STRING"] = ""
        setup_testing_defaults(environ)
        parts = validator(app)(environ, self._start)
        self.body = b"".join(parts)
        parts.close()  # type: ignore[attr-defined]

    def _start(
        self, status: str, headers: Sequence[tuple[str, str]], _info: object = None
    ) -> Callable[[bytes], object]:
        self.status = int(status.split(maxsplit=1)[0])
        self.headers = dict(headers)
        assert len(self.headers) == len(headers)
        return lambda _data: None

    @property
    def json(self) -> Any:
        """The body as JSON."""
        assert self.headers["Content-Type"] == "application/json"
        return json.loads(self.body)


def get(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Ask a web server."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def sockets_open() -> set[str]:
    """Return the sockets that this process has open."""
    return {each for each in descriptors().values() if each.startswith("socket:")}


def url_of(broker: FakeBroker | str) -> str:
    """Where a broker is, or is said to be."""
    return broker if isinstance(broker, str) else broker.url


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def produce(registry: CollectorRegistry) -> Iterator[Connect]:
    """Make producers on that registry: ``produce(broker, **settings)``."""
    producers: list[MLProducer] = []

    def make(broker: FakeBroker | str, **settings: Any) -> MLProducer:
        chosen = Settings(url=url_of(broker), **{**QUICK, **settings})
        producers.append(MLProducer(chosen, registry=registry))
        return producers[-1]

    yield make
    for producer in producers:
        producer.close(0.2)


def test_healthy(produce: Connect, serve: Serve) -> None:
    """A producer that delivers is 200, in exactly the documented words."""
    producer = produce(serve())
    producer.publish(make_message())
    answer = Answer(make_app(producer), "/health")
    assert answer.status == 200
    assert answer.json == {
        "healthy": True,
        "rabbitmq": {
            "connectionState": "CONNECTED",
            "reconnectAttempts": 0,
            "consecutiveFailures": 0,
            "circuitBreakerOpen": False,
            "retryQueueSize": 0,
            "pendingConfirms": 0,
            "blocked": False,
            "confirming": True,
        },
    }


def test_not_confirming(produce: Connect, serve: Serve) -> None:
    """A broker that confirms nothing is 503 after three confirms that did not come, till one."""
    mood = Moody("")
    producer = producer_started(produce(serve(mood)))
    app = make_app(producer)
    for _ in range(3):
        producer.publish(make_message(), timeout=0.05)
    answer = Answer(app, "/health")
    assert (answer.status, answer.json["rabbitmq"]["confirming"]) == (503, False)
    assert answer.json["rabbitmq"]["connectionState"] == "CONNECTED"
    assert answer.json["reason"] == f"{producer.status().broker} is connected and confirms nothing"
    mood.mood = "ack"
    assert producer.publish(make_message()).confirmed
    assert Answer(app, "/health").status == 200


def test_not_started(produce: Connect, serve: Serve) -> None:
    """Before its first use a producer is 503, which says so, and asking does not start it."""
    producer = produce(serve())
    before = set(threading.enumerate())
    answer = Answer(make_app(producer), "/health")
    assert answer.status == 503
    assert {**answer.json, "reason": ""} == {**producer.status().to_json(), "reason": ""}
    assert answer.json["reason"] == "not started: the first publish, or start(), connects"
    assert set(threading.enumerate()) <= before


def test_open_breaker(produce: Connect, serve: Serve) -> None:
    """While the breaker is open a producer is 503, and says after how many failures."""
    producer = produce(serve(Moody("nack")), circuit_breaker_threshold=2)
    for _ in range(2):
        with pytest.raises(NackError):
            producer.publish(make_message(), retry=False)
    with pytest.raises(CircuitOpenError):
        producer.publish(make_message())
    answer = Answer(make_app(producer), "/health")
    assert (answer.status, answer.json["healthy"]) == (503, False)
    assert answer.json["rabbitmq"]["circuitBreakerOpen"] is True
    assert answer.json["reason"] == "the circuit breaker is open; failures in a row: 2"


def test_closed(produce: Connect, serve: Serve) -> None:
    """A closed producer is 503."""
    producer = produce(serve())
    producer.publish(make_message())
    producer.close(LIMIT)
    answer = Answer(make_app(producer), "/health")
    assert (answer.status, answer.json["reason"]) == (503, "the producer is closed")


def test_gave_up(produce: Connect, serve: Serve) -> None:
    """A producer that has given up says what to do."""
    broker = serve()
    broker.stop_listening()
    producer = produce(broker, max_reconnect_attempts=1)
    given_up = threading.Event()
    producer.on("gave_up", given_up.set)
    producer.start()
    assert given_up.wait(LIMIT)
    answer = Answer(make_app(producer), "/health")
    assert answer.status == 503
    assert answer.json["reason"] == (
        f"gave up connecting to {producer.status().broker}; "
        "the next publish, or reconnect(), starts over; 1 attempt has failed; "
        "the last error was: connection refused"
    )


def test_a_failure_after_which_nothing_waits(produce: Connect, serve: Serve) -> None:
    """The page says so, and not that messages wait."""
    broker = Moody("nack")
    producer = produce(serve(broker))
    app = make_app(producer)
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    page = Answer(app, "/page.json").json
    assert page["texts"]["retry-queue"] == "0"
    assert page["texts"]["headline"] == (
        "Connected, but nothing has been confirmed since the last failure"
    )
    broker.mood = "ack"
    producer.publish(make_message())
    assert Answer(app, "/page.json").json["texts"]["headline"] == "Connected, all is well"


STATE = ConnectionState


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(connection_state=STATE.CONNECTED), ""),
        (Status(connection_state=STATE.CONNECTED, circuit_state=CircuitState.HALF_OPEN), ""),
        (Status(connection_state=STATE.CONNECTED, blocked=True, broker="b:1"), "b:1 blocks"),
        (Status(connection_state=STATE.CONNECTED, circuit_state=CircuitState.OPEN), "the circuit"),
        (Status(connection_state=STATE.CONNECTED, confirming=False, broker="b:1"), "b:1 is conn"),
        (Status(connection_state=STATE.CONNECTING, broker="b:1"), "connecting to b:1"),
        (Status(connection_state=STATE.DISCONNECTED, broker="b:1"), "not connected to b:1"),
        (
            Status(connection_state=STATE.CONNECTING, broker="b:1", reconnect_attempts=3),
            "connecting to b:1; 3 attempts have failed",
        ),
        (Status(connection_state=STATE.DISCONNECTED), "not started"),
        (Status(connection_state=STATE.CLOSING, broker="b:1"), "the producer is closed"),
        (Status(connection_state=STATE.CLOSED), "the producer is closed"),
    ],
)
def test_reasons(status: Status, words: str) -> None:
    """There is a reason exactly where a status is not healthy."""
    assert bool(reason(status, 10)) is not status.healthy
    assert reason(status, 10).startswith(words)


def test_metrics(produce: Connect, serve: Serve, registry: CollectorRegistry) -> None:
    """The text is that of the producer's own registry."""
    producer = produce(serve())
    producer.publish(make_message())
    answer = Answer(make_app(producer), "/metrics")
    assert answer.body == metrics.exposition(registry)
    line = b'ml_producer_tasks_sent_total{status="success",task_type="raw"} 1.0'
    assert line in answer.body.splitlines()


def test_metrics_as_json(produce: Connect, serve: Serve) -> None:
    """The sums are those of the metrics, in the documented shape."""
    mood = Moody()
    broker = serve(mood)
    producer = produce(broker)
    assert producer.publish(make_message(body=b"x" * 100)).confirmed
    assert producer.publish(make_message(body=b"x" * 300)).confirmed
    mood.mood = "nack"
    retried = told(producer, events.Retried, lambda _event: "retried")
    receipt = producer.publish(make_message(body=b"x" * 200))
    retried.wait_until(lambda: "retried" in retried.seen)
    mood.mood = "ack"
    assert receipt.result(LIMIT).confirmed
    answer = Answer(make_app(producer), "/metrics/json").json
    assert answer["tasks"]["sent"] == {"raw": {"success": 3}}
    assert answer["tasks"]["retries"]["raw"] >= 1
    assert set(answer["tasks"]) == {"sent", "retries"}
    assert answer["connection"] == {"state": "CONNECTED", "reconnectAttempts": 0, "errors": 0}
    assert answer["circuitBreaker"] == {"state": "CLOSED", "trips": 0}
    assert set(answer["performance"]) == {"avgPublishDuration", "avgMessageSize"}
    assert answer["performance"]["avgMessageSize"] == 200.0
    assert 0 < answer["performance"]["avgPublishDuration"] < LIMIT


def test_metrics_as_json_of_nothing(produce: Connect, serve: Serve) -> None:
    """Before anything was published the sums are empty, and no mean divides by zero."""
    assert Answer(make_app(produce(serve())), "/metrics/json").json == {
        "tasks": {"sent": {}, "retries": {}},
        "connection": {"state": "DISCONNECTED", "reconnectAttempts": 0, "errors": 0},
        "circuitBreaker": {"state": "CLOSED", "trips": 0},
        "performance": {"avgPublishDuration": 0.0, "avgMessageSize": 0.0},
    }


def test_metrics_as_json_after_trouble(produce: Connect, serve: Serve) -> None:
    """Errors of the connection and trips of the breaker are counted."""
    broker = serve(Moody("nack"))
    producer = produce(broker, circuit_breaker_threshold=1)
    lost = told(producer_started(producer), events.Disconnected, lambda _event: "lost")
    with pytest.raises(NackError):
        producer.publish(make_message(), retry=False)
    [connection] = broker.wait_for_connections(1, LIMIT)
    connection.reset()
    lost.wait_for("lost")
    answer = Answer(make_app(producer), "/metrics/json").json
    assert answer["connection"]["errors"] == 1
    assert answer["circuitBreaker"]["trips"] == 1
    assert answer["tasks"]["sent"] == {"raw": {"rejected": 1}}


def producer_started(producer: MLProducer) -> MLProducer:
    """Start a producer and wait until it is connected."""
    assert producer.wait_connected(LIMIT)
    return producer


@pytest.mark.parametrize("path", PATHS)
def test_every_path(produce: Connect, serve: Serve, path: str) -> None:
    """Every path says what it is and how long, is not cached, and answers HEAD with the same."""
    app = make_app(produce(serve()))
    answer, head = Answer(app, path), Answer(app, path, "HEAD")
    assert answer.headers["Content-Type"] == PATHS[path]
    assert int(answer.headers["Content-Length"]) == len(answer.body) > 0
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert (head.status, head.body) == (answer.status, b"")
    if PATHS[path] == "application/json":  # numbers of the others change with every look
        assert head.headers.keys() == answer.headers.keys()


@pytest.mark.parametrize(
    ("path", "older"),
    [("/health", "/v1/ml/analytics/health"), ("/metrics/json", "/api/ml/metrics/json")],
)
def test_older_paths(produce: Connect, serve: Serve, path: str, older: str) -> None:
    """The older paths answer the same."""
    app = make_app(produce(serve()))
    assert Answer(app, path).json == Answer(app, older).json


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods(produce: Connect, serve: Serve, method: str) -> None:
    """Nothing can be changed here."""
    answer = Answer(make_app(produce(serve())), "/health", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert answer.json == {"error": "allowed are GET and HEAD"}


@pytest.mark.parametrize("path", ["/healthz", "/health/", "/../health", "/m\xc3\xa4h", "/metrics/"])
def test_unknown_path(produce: Connect, serve: Serve, path: str) -> None:
    """An unknown path is 404, and is not repeated in the answer."""
    answer = Answer(make_app(produce(serve())), path)
    assert answer.status == 404
    assert answer.json == {"error": "not found"}


class Hostile(Silent):
    """Closes the channel over each message, with words that are no good in HTML."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Reject it."""
        connection.close_channel(channel, 404, HOSTILE)


def test_hostile_words(produce: Connect, serve: Serve) -> None:
    """The broker's words are text in the page, whatever they look like."""
    producer = produce(serve(Hostile()))
    with pytest.raises(BrokerRejectedError):
        producer.publish(make_message())
    app = make_app(producer)
    page = Answer(app, "/").body.decode()
    assert "alert" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;" in page
    assert "${level}" in page
    errors = Answer(app, "/page.json").json["lists"]["errors"]
    assert ["BrokerRejectedError", HOSTILE] in [entry[1:] for entry in errors]


# --- mounted -----------------------------------------------------------------------------------


def check_mounted(app: App, own: bytes) -> None:
    """A mounted application answers below its prefix over HTTP, and the rest is its host's."""
    with Server(app, 0, "127.0.0.1") as server:
        assert get(server.port, "/own")[2] == own
        status, _, body = get(server.port, "/ml/health")
        assert (status, json.loads(body)["healthy"]) == (200, True)
        assert get(server.port, "/ml/metrics")[0] == 200
        assert get(server.port, "/ml/nothing")[0] == 404
        assert b"<h1>mlproducer</h1>" in get(server.port, "/ml/")[2]
        assert get(server.port, "/health")[0] == 404


def test_flask(connect: Connect, serve: Serve) -> None:
    """It mounts in a Flask application."""
    producer = connect(serve())
    host = flask.Flask("host")
    host.add_url_rule("/own", "own", lambda: "Flask's own")
    host.wsgi_app = DispatcherMiddleware(host.wsgi_app, {"/ml": make_app(producer)})  # type: ignore[method-assign]
    assert producer.wait_connected(LIMIT)
    check_mounted(host, b"Flask's own")
    answer = host.test_client().get("/ml")
    assert (answer.status_code, answer.headers["Location"]) == (308, "ml/")


def own(_request: object) -> object:
    """Answer as the host does."""
    from django.http import HttpResponse

    return HttpResponse(b"Django's own")


def test_django(connect: Connect, serve: Serve) -> None:
    """It mounts beside a Django application, in its ``wsgi.py``."""
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.test import override_settings
    from django.urls import path

    if not settings.configured:  # once for a process, so maybe by another test
        settings.configure(SECRET_KEY="of a test")
    urls = type("urls", (), {"urlpatterns": [path("own", own)]})
    producer = connect(serve())
    with override_settings(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"]):
        django_app, ml_app = get_wsgi_application(), make_app(producer)

        def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["PATH_INFO"].startswith("/ml/"):
                shift_path_info(environ)
                return ml_app(environ, start_response)
            return django_app(environ, start_response)

        assert producer.wait_connected(LIMIT)
        check_mounted(application, b"Django's own")


# --- its own server ----------------------------------------------------------------------------


def test_serve(connect: Connect, serve: Serve) -> None:
    """A server has one daemon thread, which ends with it, as often as it is closed."""
    producer = producer_started(connect(serve()))
    before = set(threading.enumerate())
    with serve_on_loopback(producer) as server:
        [thread] = set(threading.enumerate()) - before
        assert (thread.name, thread.daemon) == ("mlproducer-http", True)
        status, headers, body = get(server.port, "/health")
        assert (status, json.loads(body)["healthy"]) == (200, True)
        assert get(server.port, "/health", "HEAD")[1]["Content-Length"] == headers["Content-Length"]
        assert get(server.port, "/health", "POST")[0] == 405
    server.close()
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        get(server.port, "/health")


def serve_on_loopback(producer: MLProducer) -> Server:
    """Serve on a free port."""
    return wsgi.serve(producer, 0)


def test_port_taken(connect: Connect, serve: Serve) -> None:
    """A port that is taken is an error of the call, and leaves no thread."""
    producer = connect(serve())
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        Server(make_app(producer), taken.getsockname()[1], "127.0.0.1")
    assert set(threading.enumerate()) <= before


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
@pytest.mark.parametrize("fork", [os.fork, ctypes.PyDLL(None).fork], ids=["python", "c"])
def test_forked_child(connect: Connect, serve: Serve, fork: Callable[[], int]) -> None:
    """Once a parent has closed its server nothing listens, also where no hook ran in a child."""
    producer = producer_started(connect(serve()))
    with serve_on_loopback(producer) as server:
        child = fork()
        while child == 0:
            signal.pause()  # until it is killed
        try:
            assert get(server.port, "/health")[0] == 200
            server.close()
            with pytest.raises(ConnectionRefusedError):
                get(server.port, "/health")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
def test_child_lets_go(connect: Connect, serve: Serve) -> None:
    """A forked child holds no port, whatever becomes of its parent, and leaves it to that."""
    producer = producer_started(connect(serve()))
    before = set(descriptors().values())
    with serve_on_loopback(producer) as server:
        [listening] = sockets_open() - before
        child = os.fork()
        if child == 0:
            os._exit(listening in descriptors().values())
        assert os.waitpid(child, 0)[1] == 0
        assert get(server.port, "/health")[0] == 200


@pytest.mark.parametrize("port", [-1, 65_536, "8000", None, True, 80.0])
def test_bad_port(connect: Connect, serve: Serve, port: Any) -> None:
    """A port that is none is an error that says what is accepted."""
    with pytest.raises(ConfigurationError, match=r"^port must be .* from 0 to 65535$"):
        wsgi.serve(connect(serve()), port)


def test_slow_clients(connect: Connect, serve: Serve) -> None:
    """Clients that say nothing, or a byte now and then, hold up no other client."""
    producer = producer_started(connect(serve()))
    before = set(threading.enumerate())
    with serve_on_loopback(producer) as server, ExitStack() as clients:
        slow = [clients.enter_context(reach(server.port)) for _ in range(5)]
        for _ in range(20):
            assert get(server.port, "/health")[0] == 200
            for each in slow[1:]:
                each.send(b"G")
        assert len(set(threading.enumerate()) - before) == 1


def test_a_slow_client_has_one_limit(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then gives it no more time."""
    limit = 0.5
    monkeypatch.setattr(web, "REQUEST_LIMIT", limit)
    producer = producer_started(connect(serve()))
    with serve_on_loopback(producer) as server, reach(server.port) as slow:
        watch = Stopwatch()
        slow.settimeout(limit / 10)
        closed = False
        while not closed:
            assert watch.own() < 4 * limit
            try:
                slow.send(b"G")
                closed = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True
        assert watch.wall() > limit / 2


def reach(port: int) -> socket.socket:
    """Connect to a server."""
    return socket.create_connection(("127.0.0.1", port), LIMIT)


def until_the_end(client: socket.socket) -> bytes:
    """Read all that a server sends."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(65_536):
            received += piece
    return received


def ask(port: int, request: bytes) -> bytes:
    """Send a request as it is, and read the answer."""
    with reach(port) as client:
        client.sendall(request)
        return until_the_end(client)


def test_more_clients_than_there_is_room_for(connect: Connect, serve: Serve) -> None:
    """A hundred clients that stay take 32 descriptors, and the next one is answered."""
    producer = producer_started(connect(serve()))
    with serve_on_loopback(producer) as server, ExitStack() as clients:
        assert get(server.port, "/health")[0] == 200
        before = len(descriptors())
        for _ in range(100):
            clients.enter_context(reach(server.port))
        assert get(server.port, "/health")[0] == 200
        assert len(descriptors()) - before <= 100 + web.MAX_CONNECTIONS


def test_no_descriptor_left(connect: Connect, serve: Serve) -> None:
    """Without a descriptor for its next client the server waits, at no cost, and then goes on."""
    producer = producer_started(connect(serve()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serve_on_loopback(producer) as server, socket.socket() as waiting:
        assert get(server.port, "/health")[0] == 200
        highest = max(map(int, descriptors()))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, highest + 1), hard))
            with ExitStack() as rest:
                with suppress(OSError):
                    while True:
                        rest.callback(os.close, os.dup(0))
                waiting.connect(("127.0.0.1", server.port))
                waiting.settimeout(LIMIT)
                waiting.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                spent = time.process_time()
                threading.Event().wait(0.5)
                assert time.process_time() - spent < 0.25
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert until_the_end(waiting).startswith(b"HTTP/1.0 200 ")


REQUESTS = {
    b"GET http://example.org/health HTTP/1.1\r\nHost: example.org\r\n\r\n": 200,
    b"GET http://example.org HTTP/1.1\r\n\r\n": 200,
    b"GET /health?probe=1 HTTP/1.1\n\n": 200,
    b"\r\nGET /health HTTP/1.0\r\n\r\n": 200,
    b"GET /%68ealth HTTP/1.1\r\n\r\n": 200,
    b"GET /health HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\n\r\n": 200,
    b"GET //health HTTP/1.1\r\n\r\n": 200,
    b"GET /../health HTTP/1.1\r\n\r\n": 404,
    b"GET /\xff\xfe HTTP/1.1\r\n\r\n": 404,
    b"POST /health HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000: 405,
    b"POST /health HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n": 405,
    b"TRACE /health HTTP/1.1\r\n\r\n": 405,
    b"<script>\r\n\r\n": 400,
    b"GET / <b>x</b> y\r\n\r\n": 400,
    b"GET / HTTP/2.0\r\n\r\n": 505,
    b"GET http://[x/health HTTP/1.1\r\n\r\n": 400,
    b"\r\n" * 40_000: 431,
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n": 431,
    b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"\r\n": 431,
}


def test_requests_of_all_kinds(
    connect: Connect, serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is answered with its status, and the answer arrives; nothing is written anywhere."""
    producer = producer_started(connect(serve()))
    with serve_on_loopback(producer) as server:
        for request, status in REQUESTS.items():
            answer = ask(server.port, request)
            assert answer.split(b" ", 2)[1:2] == [str(status).encode()], request[:60]
            assert b"<script>" not in answer.partition(b"\r\n\r\n")[2] or status == 200
        with reach(server.port) as rude:  # leaves with a reset, in the middle of its request
            rude.send(b"GET /hea")
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert get(server.port, "/health")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_an_application_that_fails(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is a 500 and a line of ours, and the server goes on, whatever was raised."""
    for error in (ValueError("why"), SystemExit(3)):

        def fail(*_: object, error: BaseException = error) -> Iterable[bytes]:
            raise error

        with Server(fail, 0, "127.0.0.1") as server:
            for _ in range(2):
                assert ask(server.port, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 500 ")
    assert [each.name for each in caplog.records] == ["mlproducer._http_server"] * 4
    assert capfd.readouterr() == ("", "")


def test_no_name_is_looked_up(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a server asks no name server, which may be silent."""

    def ask_name_server(*_: object) -> str:
        raise AssertionError

    for name in ("getfqdn", "gethostbyaddr", "gethostbyname"):
        monkeypatch.setattr(socket, name, ask_name_server)
    producer = producer_started(connect(serve()))
    with wsgi.serve(producer, 0, "0.0.0.0") as server:
        assert get(server.port, "/health")[0] == 200


def test_a_burst_of_clients(connect: Connect, serve: Serve) -> None:
    """Two hundred clients at once are all answered."""
    producer = producer_started(connect(serve()))
    with serve_on_loopback(producer) as server, ThreadPoolExecutor(100) as pool:
        answers = pool.map(lambda _: get(server.port, "/health")[0], range(200))
        assert set(answers) == {200}


def sockets_in_a_child(before: set[str], client: socket.socket) -> int:
    """Fork, and return how many sockets the child has beside those and this client's."""
    known = before | {f"socket:[{os.fstat(client.fileno()).st_ino}]"}
    child = os.fork()
    if child == 0:
        os._exit(len(sockets_open() - known))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def closing_servers(connect: Connect) -> Iterator[None]:
    """Close the servers that a test left open, also where it fails, before ``connect`` ends."""
    yield
    for server in list(web._servers):
        server.close()


@pytest.mark.usefixtures("closing_servers")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
def test_child_of_a_server_that_nothing_holds(connect: Connect, serve: Serve) -> None:
    """A child lets go of it, and of its clients, so that the port is free once its parent ends."""
    producer = producer_started(connect(serve()))
    before = sockets_open()
    port = serve_on_loopback(producer).port
    gc.collect()
    with reach(port) as client:
        client.send(b"GET")
        assert get(port, "/health")[0] == 200
        assert sockets_in_a_child(before, client) == 0
        client.send(b" /health HTTP/1.0\r\n\r\n")
        assert until_the_end(client).startswith(b"HTTP/1.0 200 ")


@pytest.mark.usefixtures("closing_servers")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
def test_child_forked_while_a_client_is_dropped(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child lets go of a connection that its parent is about to close."""
    producer = producer_started(connect(serve()))
    before = sockets_open()
    server = serve_on_loopback(producer)
    drops, forked = threading.Event(), threading.Event()
    unregister = server._selector.unregister

    def hold(of: socket.socket) -> object:
        drops.set()
        assert forked.wait(LIMIT)
        return unregister(of)

    with reach(server.port) as client:
        monkeypatch.setattr(server._selector, "unregister", hold)
        client.shutdown(socket.SHUT_WR)
        assert drops.wait(LIMIT)
        left = sockets_in_a_child(before, client)
        forked.set()
        assert until_the_end(client) == b""
    assert left == 0


def test_surrogates(connect: Connect, serve: Serve) -> None:
    """What is no Unicode text, such as a path of other bytes, is shown escaped."""
    producer = connect(serve())
    producer._factory.recorder.note("the store fails", "no\udcffdir: it is not there")
    app = make_app(producer)
    assert b"no\\udcffdir" in Answer(app, "/").body
    assert "no\udcffdir" in Answer(app, "/page.json").json["lists"]["errors"][0][2]
    assert Answer(app, "/health").status == 503
