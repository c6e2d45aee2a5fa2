"""Host names, credentials and files: looked up for each attempt, and off the I/O thread."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest
from pika import spec

import mlproducer
from mlproducer import ConnectionState, MLProducer, Settings
from mlproducer._broker_url import Broker
from mlproducer._engine import connector as connector_module
from mlproducer._engine.endpoints import Endpoint, Endpoints, UnreachableError
from mlproducer._engine.runtime import Runtime
from mlproducer.errors import AuthenticationError, NotConnectedError
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection
from tests.helpers import LIMIT, make_message
from tests.stopwatch import in_time
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import events_of, gaps

SECRET = "canary-5d0f"


class Asks(Behaviour):
    """Notes who comes, and refuses some.

    :ivar came: user and password of each that came, and when
    """

    def __init__(self, accepts: Callable[[str], bool] = bool, code: int = 403) -> None:
        self.came: list[tuple[str, str]] = []
        self.times: list[float] = []
        self.secrets: list[str] = []
        self.renewed = threading.Semaphore(0)
        self.properties: dict[str, Any] = {}
        self.accepts = accepts
        self._code = code

    def on_start_ok(self, connection: FakeConnection, start_ok: spec.Connection.StartOk) -> None:
        """Note the credentials, and let them in or not."""
        response = start_ok.response
        text = response.decode() if isinstance(response, bytes) else str(response)
        _, user, password = text.split("\0")
        self.came.append((user, password))
        self.times.append(time.monotonic())
        self.properties = start_ok.client_properties
        if self.accepts(password):
            super().on_start_ok(connection, start_ok)
        else:
            connection.close_connection(self._code, "refused")

    def on_update_secret(self, connection: FakeConnection, secret: str) -> None:
        """Note the new token."""
        self.secrets.append(secret)
        super().on_update_secret(connection, secret)
        self.renewed.release()


class Names:
    """Host names of a test's own; all else is resolved as ever.

    :ivar asked: the thread of each look-up
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._known: dict[str, Callable[[], list[Any]]] = {}
        self._real = socket.getaddrinfo
        self.asked: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def say(self, host: str, *addresses: tuple[str, int]) -> None:
        """Have a name lead to these."""
        self.ask(host, lambda: [record(*address) for address in addresses])

    def ask(self, host: str, look_up: Callable[[], list[Any]]) -> None:
        """Have a name looked up so."""
        self._known[host] = look_up

    def _look_up(self, host: str, *args: Any, **kwargs: Any) -> Any:
        if host not in self._known:
            return self._real(host, *args, **kwargs)
        self.asked.append(threading.current_thread().name)
        return self._known[host]()


def record(host: str, port: int) -> Any:
    """Return an address as `socket.getaddrinfo` does."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)[0]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Host names of the test's own."""
    return Names(monkeypatch)


@contextmanager
def silent(kind: str) -> Iterator[tuple[str, int]]:
    """Yield an address at which nothing is ever said."""
    with ExitStack() as stack:
        if kind == "nothing there":
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server.close()
        elif kind == "accepts, and is silent":
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        else:  # the kernel answers no SYN once the backlog is full
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(3):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                assert filler.connect_ex(server.getsockname()) in (0, errno.EINPROGRESS)
        if kind == "nothing there":
            yield "::1", 1
        else:
            yield server.getsockname()[:2]


@pytest.mark.parametrize("kind", ["nothing there", "accepts, and is silent", "never connects"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_silent_address_leaves_time_for_the_next(
    connect: Connect, serve: Serve, names: Names, kind: str, count: int
) -> None:
    """Of several addresses those that do not answer cost a part of the one attempt."""
    broker = serve()
    with silent(kind) as address:
        names.say("several.test", *[address] * count, ("127.0.0.1", broker.port))
        producer = connect("amqp://u:p@several.test/", connection_timeout=4.0)
        states = events_of(producer, "disconnected", "gave_up", "connected")
        with in_time(4.0):
            assert producer.publish(make_message(), timeout=LIMIT).confirmed
        assert producer.status().reconnect_attempts == 0
        states.wait_for("connected")
        assert states.seen == ["connected"]
        broker.connections[0].reset()  # from now on the good one is tried first
        states.wait_for("disconnected", "connected")
        with in_time(1.0):
            assert producer.publish(make_message(), timeout=LIMIT).confirmed
    assert set(names.asked) == {"mlproducer-resolver"}


def test_credentials_are_refused_once_for_all_addresses(
    connect: Connect, serve: Serve, names: Names
) -> None:
    """The brokers behind one name share their users: no lockout by trying each."""
    asks = Asks(lambda _: False)
    brokers = [serve(asks) for _ in range(3)]
    names.say("several.test", *[("127.0.0.1", broker.port) for broker in brokers])
    producer = connect("amqp://u:p@several.test/", reconnect_max_delay=30.0)
    with pytest.raises(AuthenticationError):
        producer.publish(make_message())
    assert len(asks.came) == 1


def test_a_name_server_that_does_not_answer(connect: Connect, serve: Serve, names: Names) -> None:
    """The attempt ends in time, and the next one does not wait behind it."""
    broker = serve()
    stuck = threading.Event()

    def look_up() -> list[Any]:
        if len(names.asked) == 1:
            stuck.wait(LIMIT)
        return [record("127.0.0.1", broker.port)]

    names.ask("slow.test", look_up)
    producer = connect("amqp://u:p@slow.test/", connection_timeout=0.2)
    with pytest.raises(NotConnectedError, match="in time"):
        producer.publish(make_message(), retry=False)
    assert producer.wait_connected(LIMIT)
    stuck.set()
    assert producer.publish(make_message()).confirmed
    assert broker.accepted == 1


def test_closing_waits_for_no_look_up(connect: Connect, names: Names) -> None:
    """A name server that does not answer does not hold up the end."""
    asked, stuck = threading.Event(), threading.Event()

    def look_up() -> list[Any]:
        asked.set()
        stuck.wait(LIMIT)
        return []

    names.ask("slow.test", look_up)
    producer = connect("amqp://u:p@slow.test/", connection_timeout=60.0)
    producer.start()
    assert asked.wait(LIMIT)
    with in_time(LIMIT / 2):
        producer.close(LIMIT)
    stuck.set()
    for thread in threading.enumerate():
        if thread.name == "mlproducer-resolver":
            thread.join(LIMIT)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".test", ".test"])
def test_a_name_that_is_none(host: str) -> None:
    """What cannot be encoded as a host name is said in words, not raised by the loop."""
    endpoint = Endpoint(Broker(host=host, port=5672), declarations=())
    with pytest.raises(UnreachableError, match=r"is no host name: .*longer than 63|not resolve"):
        endpoint.addresses()


def test_a_name_that_is_none_fails_no_loop(
    connect: Connect, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """An attempt with such a name is one that failed."""

    def refuse() -> list[Any]:
        raise UnicodeError("label empty or too long")

    names.ask("bad.test", refuse)
    producer = connect("amqp://u:p@bad.test/")
    with pytest.raises(NotConnectedError, match="is no host name"):
        producer.publish(make_message(), retry=False)
    assert "loop failed" not in caplog.text


def test_no_descriptor_for_a_socket_fails_no_loop(
    connect: Connect, serve: Serve, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """What pika raises when it makes a socket is an attempt that failed; the next address is tried.

    An address family that the kernel lacks fails so, as a process without descriptors does.
    """
    broker = serve()
    family = (255, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 1))
    names.ask("odd.test", lambda: [family, record("127.0.0.1", broker.port)])
    producer = connect("amqp://u:p@odd.test/")
    assert producer.publish(make_message()).confirmed
    names.ask("worse.test", lambda: [family])
    producer = connect("amqp://u:p@worse.test/")
    with pytest.raises(NotConnectedError, match="no connection can be made"):
        producer.publish(make_message(), retry=False)
    assert "loop failed" not in caplog.text


# --- as whom -----------------------------------------------------------------------------------


def test_credentials_are_asked_for_each_attempt(connect: Connect, serve: Serve) -> None:
    """A callable gives the password of the hour, on a thread that may wait for it."""
    asks = Asks(lambda password: password != "old")
    broker = serve(asks)
    passwords = iter(["old", "new", "newer"])
    threads: list[str] = []

    def credentials() -> tuple[str, str]:
        threads.append(threading.current_thread().name)
        return "app", next(passwords)

    producer = connect(f"amqp://127.0.0.1:{broker.port}/", credentials=credentials)
    assert producer.wait_connected(LIMIT)
    broker.connections[0].reset()
    while len(asks.came) < 3:
        producer.publish(make_message())
    assert asks.came == [("app", "old"), ("app", "new"), ("app", "newer")]
    assert set(threads) == {"mlproducer-resolver"}


def raises() -> Any:
    """Fail as a token service does that quotes what it was sent."""
    raise RuntimeError(f"cannot log in with {SECRET}")


@pytest.mark.parametrize(
    ("credentials", "words"),
    [
        (raises, "raised RuntimeError"),
        (lambda: sys.exit(SECRET), "raised SystemExit"),
        (lambda: None, r"must give \(user, password\)"),
        (lambda: ("u", SECRET.encode()), "must give"),
        (lambda: ("u", SECRET, -1), "must give"),
        (lambda: ("u", SECRET, "soon"), "must give"),
        (lambda: ("u", SECRET, float("nan")), "must give"),
        (lambda: {"u": SECRET}, "must give"),
    ],
)
def test_credentials_that_are_none(
    connect: Connect,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    credentials: Any,
    words: str,
) -> None:
    """What the callable raises or gives by mistake is told without what it holds."""
    broker = serve()
    producer = connect(f"amqp://127.0.0.1:{broker.port}/", credentials=credentials)
    with caplog.at_level(logging.DEBUG), pytest.raises(NotConnectedError, match=words) as caught:
        producer.publish(make_message(), retry=False)
    assert SECRET not in f"{caught.value!r} {caplog.text}"
    assert broker.accepted == 0


def test_a_token_is_renewed_before_it_ends(connect: Connect, serve: Serve) -> None:
    """On the open connection, with Connection.UpdateSecret, also where a try fails."""
    asks = Asks()
    broker = serve(asks)
    given: list[Any] = [("u", "first", 0.5), ("u", "second", 0.5), None, ("u", "third", 100.0)]
    producer = connect(
        f"amqp://127.0.0.1:{broker.port}/", credentials=lambda: given.pop(0) if given else None
    )
    assert producer.wait_connected(LIMIT)
    for _ in range(2):
        assert asks.renewed.acquire(timeout=LIMIT)
    assert asks.secrets == ["second", "third"]
    assert [password for _, password in asks.came] == ["first"]
    assert producer.publish(make_message()).confirmed
    assert broker.accepted == 1


def test_a_token_that_is_about_to_end_is_not_renewed_all_the_time(
    connect: Connect, serve: Serve
) -> None:
    """A callable that keeps its token may give what is left of it, again and again."""
    asks, asked = Asks(), []

    def credentials() -> tuple[str, str, float]:
        asked.append(time.monotonic())
        return "u", "the same", 0.001

    producer = connect(f"amqp://127.0.0.1:{serve(asks).port}/", credentials=credentials)
    assert producer.wait_connected(LIMIT)
    for _ in range(3):
        assert asks.renewed.acquire(timeout=LIMIT)
    assert min(gaps(asked)) >= connector_module.RENEW_SHORTEST


def test_a_password_file_is_read_for_each_attempt(
    connect: Connect, serve: Serve, tmp_path: Path
) -> None:
    """A password that was rotated is used without a restart."""
    asks = Asks(lambda password: password == "new")
    broker = serve(asks)
    file = tmp_path / "password"
    file.write_text("old\n")
    producer = connect(broker, password_file=str(file))
    with pytest.raises(AuthenticationError):
        producer.publish(make_message())
    file.write_text("new\n")
    producer.reconnect()
    assert producer.wait_connected(LIMIT)
    assert [password for _, password in asks.came][-1] == "new"


def test_a_url_file_is_read_for_each_attempt(serve: Serve, tmp_path: Path) -> None:
    """The broker that it names by then is the next; a file that is broken costs an attempt."""
    first, second = serve(), serve()
    file = tmp_path / "url"
    file.write_text(f"{first.url}\n")
    settings: dict[str, Any] = {**QUICK, "url_file": str(file)}
    with MLProducer(Settings(**settings)) as producer:
        assert producer.publish(make_message()).confirmed
        assert producer.status().broker == f"127.0.0.1:{first.port}"
        states = events_of(producer, "connected", "disconnected")
        file.write_text("nonsense")
        first.stop_listening()
        first.connections[0].reset()
        states.wait_for("disconnected")
        with pytest.raises(NotConnectedError, match="url_file"):
            producer.publish(make_message(), retry=False)
        file.write_text(second.url)
        states.wait_for("disconnected", "connected")
        assert producer.status().broker == f"127.0.0.1:{second.port}"
        producer.close(0.5)


# --- refusals, and how soon it is tried again --------------------------------------------------


def test_after_403_only_a_call_hurries(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused credentials are tried again at the longest delay; a call starts an attempt."""
    monkeypatch.setattr(connector_module, "CALL_AFTER", 0.3)
    asks = Asks(lambda password: False)
    broker = serve(asks)
    producer = connect(broker, reconnect_initial_delay=0.01, reconnect_max_delay=30.0)
    began = time.monotonic()
    with pytest.raises(AuthenticationError):
        producer.publish(make_message())
    for _ in range(10):  # too soon for another
        with pytest.raises(AuthenticationError):
            producer.publish(make_message())
    assert len(asks.came) == 1
    asks.accepts = bool
    deadline = time.monotonic() + LIMIT
    while producer.status().connection_state is not ConnectionState.CONNECTED:
        assert time.monotonic() < deadline
        try:
            producer.publish(make_message())
        except AuthenticationError:
            threading.Event().wait(0.02)
    _, second = asks.times
    assert second - began >= 0.3  # counted from where the attempt begins, not where it is seen


def test_after_530_the_ordinary_backoff(connect: Connect, serve: Serve) -> None:
    """A virtual host that is missing may be back at any moment."""

    class Missing(Asks):
        def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
            if len(self.times) < 4:
                connection.close_connection(530, "NOT_ALLOWED - vhost limit not found")
            else:
                super().on_open(connection, virtual_host)

    asks = Missing()
    producer = connect(serve(asks), reconnect_initial_delay=0.05, reconnect_max_delay=30.0)
    with pytest.raises(AuthenticationError, match="530"):
        producer.publish(make_message())
    assert producer.wait_connected(LIMIT)
    assert all(gap < 1.0 for gap in gaps(asks.times))


@pytest.mark.parametrize("code", [320, 501, 504, 506, 541])
@pytest.mark.parametrize("at", ["start", "open"])
def test_all_else_in_the_handshake_is_transient(
    connect: Connect, serve: Serve, code: int, at: str
) -> None:
    """A node that starts, or lacks resources, is no refusal, whatever its words."""

    class Busy(Behaviour):
        def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
            if at == "start":
                connection.close_connection(code, "ACCESS_REFUSED 403 limit")
            else:
                super().on_start_ok(connection, start_ok)

        def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
            connection.close_connection(code, "NOT_ALLOWED 530 limit")

    producer = connect(serve(Busy()))
    assert not producer.publish(make_message()).confirmed  # it is deferred, and tried again
    with pytest.raises(NotConnectedError, match=str(code)):
        producer.publish(make_message(), retry=False)


def test_a_mechanism_that_is_not_ours(connect: Connect, serve: Serve) -> None:
    """It is said what the broker offers."""

    class Kerberos(Behaviour):
        mechanisms = "GSSAPI RABBIT-CR-DEMO"

    producer = connect(serve(Kerberos()))
    with pytest.raises(AuthenticationError, match=r"GSSAPI RABBIT-CR-DEMO .*PLAIN"):
        producer.publish(make_message())


# --- when the attempts are used up -------------------------------------------------------------


SLOW: dict[str, float] = {"reconnect_initial_delay": 0.5, "reconnect_max_delay": 0.5}


def test_after_gave_up_an_attempt_now_and_then(connect: Connect, serve: Serve) -> None:
    """What waits is delivered although there is no call: a readiness probe keeps callers away."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, max_reconnect_attempts=2, gave_up_interval=0.2, **SLOW)
    happened = events_of(producer, "gave_up", "connected", "confirmed")
    future = producer.submit(make_message())  # accepted before the second attempt
    happened.wait_for("gave_up")
    refused = producer.status().reconnect_attempts
    assert refused >= 2
    deadline = time.monotonic() + LIMIT
    while producer.status().reconnect_attempts < refused + 2:
        assert time.monotonic() < deadline
    assert happened.seen == ["gave_up"]  # once, however many follow
    assert not producer.is_healthy()
    broker.listen_again()
    assert future.result(LIMIT).confirmed
    happened.wait_until(lambda: happened.seen[:2] == ["gave_up", "connected"])


def test_no_attempts_after_gave_up_where_none_are_wanted(connect: Connect, serve: Serve) -> None:
    """An interval of 0 leaves it to the next call."""
    broker = serve()
    broker.stop_listening()
    producer = connect(
        broker, max_reconnect_attempts=1, reconnect_initial_delay=0.01, gave_up_interval=0.0
    )
    happened = events_of(producer, "gave_up")
    producer.start()
    happened.wait_for("gave_up")
    broker.listen_again()
    assert not producer.wait_connected(0.3)
    assert producer.publish(make_message()).result(LIMIT).confirmed


# --- what the broker is told, and where descriptors end ----------------------------------------


def test_client_properties(connect: Connect, serve: Serve) -> None:
    """Product, version and connection name; nothing else of the host, nor of pika."""
    asks = Asks()
    broker = serve(asks)
    assert connect(broker).wait_connected(LIMIT)
    properties = dict(asks.properties)
    assert properties.pop("product") == "mlproducer"
    assert properties.pop("version") not in ("", pika.__version__)
    assert str(properties.pop("connection_name")).endswith(f":{os.getpid()}")
    capabilities = properties.pop("capabilities")
    assert capabilities["publisher_confirms"]
    assert properties == {}
    assert connect(broker, connection_name="billing").wait_connected(LIMIT)
    assert asks.properties["connection_name"] == "billing"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), AssertionError()])
def test_what_cannot_be_started_is_an_error_of_ours(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A process without descriptors is told so by our own error."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(Runtime, "__init__", refuse)
    with pytest.raises(NotConnectedError, match="cannot be started"):
        connect("amqp://u:p@127.0.0.1/").publish(make_message())


FEW = """
import resource, sys
from mlproducer import MLProducer, Message, Settings, errors
few, enough = Settings(url=sys.argv[1], connection_timeout=1.0), Settings(url=sys.argv[1])
with MLProducer(enough) as producer:  # so that all is imported
    producer.publish(Message(body=b"x", routing_key="k"))
for limit in range(3, 16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 64))
    settings, timeout = (few, 0.5) if limit < 15 else (enough, 30.0)
    producer = MLProducer(settings)
    try:
        producer.publish(Message(body=b"x", routing_key="k"), timeout=timeout, retry=False)
    except errors.MLProducerError as error:
        print(limit, type(error).__name__)
    else:
        print(limit, "confirmed")
    producer.close(0.2)
"""


def test_few_descriptors(serve: Serve) -> None:
    """Whatever `publish` raises where descriptors end is one of ours."""
    ended = subprocess.run(
        [sys.executable, "-c", FEW, serve().url],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    said = ended.stdout.split("\n")
    assert ended.returncode == 0, ended.stderr
    assert said[-2].endswith("confirmed"), said


# --- after the main thread ---------------------------------------------------------------------

ENDS_AT_ONCE = """
import sys
from mlproducer import MLProducer, Message, Settings
producer = MLProducer(Settings(url=sys.argv[1], declare_topology="off"))
future = producer.submit(Message(body=b"x", routing_key="k", message_id="first"))
"""

WORKS_ON = """
import sys, threading, time
from mlproducer import MLProducer, Message, Settings
producer = MLProducer(Settings(url=sys.argv[1], declare_topology="off", publish_timeout=120.0))
assert producer.publish(Message(body=b"x", routing_key="k", message_id="first")).confirmed
def work():
    threading.main_thread().join(120.0)
    time.sleep(0.2)  # until the interpreter has begun to shut down
    print("go", flush=True)
    assert sys.stdin.readline() == "lost\\n"
    receipt = producer.publish(Message(body=b"x", routing_key="k", message_id="second"))
    receipt.result(120.0)
threading.Thread(target=work).start()
"""


def interpreters() -> list[str]:
    """Return this Python, and those from 3.12 on that are installed beside it."""
    installed = Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python")
    return [sys.executable, *map(str, sorted(installed))]


@pytest.mark.parametrize("python", interpreters())
def test_names_resolve_after_the_main_thread_has_ended(python: str) -> None:
    """Python 3.12 starts no thread any more by then; the resolver is there from the start."""
    paths = [str(Path(module.__file__ or "").parents[1]) for module in (mlproducer, pika)]
    with FakeBroker() as broker:
        url = f"amqp://guest:guest@localhost:{broker.port}/"
        run: dict[str, Any] = {"env": {"PYTHONPATH": ":".join(paths)}, "text": True}
        for _ in range(3):
            subprocess.run([python, "-c", ENDS_AT_ONCE, url], timeout=LIMIT, check=True, **run)
        assert len(broker.messages) == 3
        with subprocess.Popen(
            [python, "-c", WORKS_ON, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **run
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "go\n"
            broker.connections[0].reset()
            _, _ = process.communicate("lost\n", timeout=LIMIT)
            assert process.returncode == 0
        assert broker.messages[-1].properties.message_id == "second"


# --- the order of brokers ----------------------------------------------------------------------


def test_brokers_keep_their_order_when_files_are_read_again(tmp_path: Path) -> None:
    """The shuffle is the process's, not the attempt's."""
    file = tmp_path / "url"
    hosts = [f"host{number}" for number in range(20)]
    file.write_text(",".join(f"amqp://u:p@{host}/" for host in hosts))
    directory = Endpoints(Settings(url_file=str(file)))
    before = [endpoint.broker.host for endpoint in directory.known]
    file.write_text(",".join(f"amqp://u:q@{host}/" for host in reversed(hosts)))
    with pytest.raises(UnreachableError):
        directory.find(0)
    after = [endpoint.broker.host for endpoint in directory.known]
    assert after == before
    assert sorted(before) == sorted(hosts)
    assert {endpoint.broker.password for endpoint in directory.known} == {"q"}
