"""The code in the pages runs, in the order of its page, beside a scripted broker or a real one.

Pages about Celery, Django, Flask, asyncio and the outbox have tests of their own.

Runs on: pytest's main thread; callbacks on a producer's threads.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import queue
import re
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults, shift_path_info

import celery
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

import mlproducer
import mlproducer.outbox
import mlproducer.tracing
import mlproducer.wsgi
from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.errors import NotConnectedError, PublishError
from mlproducer.testing import FakeBroker, RecordingProducer
from mlproducer.testing.store_conformance import StoreConformance
from tests.pages import ROOT, run, snippets

LIMIT = 120.0
PACKAGE = ROOT / "mlproducer"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    """A broker that confirms everything."""
    with FakeBroker() as fake:
        yield fake


@pytest.fixture
def sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back after the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def task(number: int = 1) -> SummarizationTask:
    """Return a task."""
    return SummarizationTask(number, {"text": "some text"})


@pytest.mark.usefixtures("sigterm")
def test_the_first_page(
    broker: FakeBroker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first message, Celery, and a script; what is about the outbox has a test of its own."""
    page = ROOT / "README.rst"
    first, install, _outbox, script = snippets(page.read_text())
    monkeypatch.setenv("RABBITMQ_URL", broker.url)
    module: dict[str, Any] = {}
    run(first, page, module)
    assert module["receipt"].confirmed
    assert "CONFIRMED" in capsys.readouterr().out
    module["producer"].close()

    app = celery.Celery("page", broker=broker.url)
    run(install, page, {"app": app})
    module["PublishError"] = PublishError
    module |= {"signal": signal, "sys": sys, "tasks": [task(), task(2)]}
    run(script, page, module)
    assert len(broker.messages) == 3
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)
    mlproducer_celery = importlib.import_module("mlproducer.contrib.celery")
    mlproducer_celery.uninstall(app)


def test_the_reference(broker: FakeBroker) -> None:
    """Publishing with a hook and a policy, credentials by a callable, a topology of one's own."""
    page = PACKAGE / "README.rst"
    module: dict[str, Any] = {"url": broker.url, "read_token": lambda: "token"}
    for snippet in snippets(page.read_text()):
        run(snippet, page, module)
    assert [each.properties.headers["tenant"] for each in broker.messages] == ["acme", "acme"]
    assert broker.messages[0].properties.message_id == "share-1-summary"
    assert module["producer"].settings.topology.exchange == "shop"


def test_monitoring(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks, the page over HTTP, gunicorn's hook, and a trace's context."""
    page = PACKAGE / "observe/README.rst"
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    callbacks, served, flask, django, gunicorn, tracing, sentry = snippets(page.read_text())
    with MLProducer(Settings(url=broker.url)) as producer:
        module: dict[str, Any] = {"mlproducer": mlproducer, "producer": producer, "task": task()}
        module |= {"notify": lambda *words: told.put(words), "make_app": mlproducer.wsgi.make_app}
        module |= {"DispatcherMiddleware": DispatcherMiddleware, "shift_path_info": shift_path_info}
        module |= {"traceparent": TRACEPARENT, "tracestate": "k=v"}
        run(callbacks, page, module)
        run(tracing, page, module)
        [message] = broker.messages
        assert message.properties.headers["traceparent"].split("-")[1] == TRACEPARENT.split("-")[1]
        module["sentry_sdk"] = types.SimpleNamespace(
            get_traceparent=lambda: "1-2-1", get_baggage=lambda: "a=b"
        )
        run(sentry, page, module)
        producer.publish(task())
        assert broker.messages[1].properties.headers["headers"]["sentry-trace"] == "1-2-1"
        run(served.replace("9187", "0"), page, module)
        assert module["server"].port
        module["server"].close()

        other = types.SimpleNamespace(wsgi_app=_hello)
        run(flask, page, module | {"app": other})
        assert Client(other.wsgi_app).get("/ml/health").status_code == 200
        assert Client(other.wsgi_app).get("/").text == "hello"
        module["get_wsgi_application"] = lambda: _hello
        run(django, page, module)
        assert Client(module["application"]).get("/ml/health").status_code == 200
        assert Client(module["application"]).get("/").text == "hello"
    run(gunicorn, page, module)
    monkeypatch.setattr(module["multiprocess"], "mark_process_dead", told.put)
    module["child_exit"](None, types.SimpleNamespace(pid=7))
    assert told.get(timeout=LIMIT) == 7


def _hello(_environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def test_a_store_of_ones_own() -> None:
    """The suite that the page begins is one, and its store can be used."""
    page = PACKAGE / "stores/README.rst"
    module: dict[str, Any] = {}
    run(snippets(page.read_text())[0], page, module)
    suite = module["TestMyStore"]()
    assert isinstance(suite, StoreConformance)
    assert suite.make_store(1.0).depth().total == 0


def test_asyncio_callbacks(recording_producer: RecordingProducer) -> None:
    """What became of a message is looked up by its id."""
    page = PACKAGE / "contrib/asyncio.rst"
    module: dict[str, Any] = {"producer": recording_producer, "outcomes": {}}
    run(snippets(page.read_text())[1], page, module)
    receipt = asyncio.run(recording_producer.apublish(task()))
    assert module["outcomes"] == {receipt.message_id: "confirmed"}


@pytest.mark.usefixtures("sigterm")
def test_processes(recording_producer: RecordingProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of gunicorn starts the producer, Celery's signal closes it, SIGTERM exits."""
    page = PACKAGE / "contrib/deployment.rst"
    gunicorn, child, script = snippets(page.read_text())
    project = types.ModuleType("myproject.ml")
    project.producer = recording_producer  # type: ignore[attr-defined] # it is ours
    monkeypatch.setitem(sys.modules, "myproject", types.ModuleType("myproject"))
    monkeypatch.setitem(sys.modules, "myproject.ml", project)
    module: dict[str, Any] = {"producer": recording_producer, "signal": signal, "sys": sys}
    run(gunicorn, page, module)
    module["post_fork"](None, None)
    assert recording_producer.is_healthy()
    run(child, page, module)
    signals = module["worker_process_shutdown"]
    before = list(signals.receivers or [])
    try:
        signals.send(sender=None, pid=1, exitcode=0)
    finally:
        signals.receivers = before[:-1]
        signals.sender_receivers_cache.clear()
    with pytest.raises(mlproducer.errors.ProducerClosedError):
        recording_producer.publish(task())
    run(script, page, module)
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)


def test_kubernetes() -> None:
    """The manifests parse; variables, probes and grace periods are those that the page is about."""
    yaml = pytest.importorskip("yaml")
    manifests, pod = snippets((PACKAGE / "contrib/kubernetes.rst").read_text(), "yaml")
    web, relay = (each["spec"]["template"]["spec"] for each in yaml.safe_load_all(manifests))
    store = yaml.safe_load(pod)
    containers = [*web["containers"], *relay["containers"], *store["containers"]]
    named = {each["name"] for container in containers for each in container["env"]}
    assert named <= set(re.findall(r"``(\w+)``", (ROOT / "README.rst").read_text()))
    [init], [container] = store["initContainers"], store["containers"]
    assert init["securityContext"]["runAsUser"] == container["securityContext"]["runAsUser"]
    [setting] = container["env"]
    assert str(Path(setting["value"].removeprefix("sqlite:///")).parent) == init["command"][-1]
    graceful = int(web["containers"][0]["command"][2])
    assert web["terminationGracePeriodSeconds"] > graceful + Settings().exit_timeout
    assert (
        relay["terminationGracePeriodSeconds"]
        > importlib.import_module("mlproducer.cli.relay").DRAIN
    )
    [program] = relay["containers"]
    port = program["command"][program["command"].index("--port") + 1]
    for probe in ("readinessProbe", "livenessProbe"):
        assert str(program[probe]["httpGet"]["port"]) == port
        app = mlproducer.wsgi.make_app(RecordingProducer(Settings()))
        assert Client(app).get(program[probe]["httpGet"]["path"]).status_code in (200, 503)


def test_migrating(broker: FakeBroker) -> None:
    """The old calls by their new names, and the old paths."""
    page = PACKAGE / "contrib/migrating.rst"
    calls, paths = snippets(page.read_text())

    def get(app: Any, path: str) -> Any:
        environ: dict[str, Any] = {}
        setup_testing_defaults(environ)
        answer = Client(app).get(path, environ_base=environ)
        return types.SimpleNamespace(status=answer.status_code, body=answer.data)

    with MLProducer(Settings(url=broker.url)) as producer:
        module = {"producer": producer, "make_app": mlproducer.wsgi.make_app, "get": get}
        run(calls, page, module)
        run(paths, page, module)
        health = json.loads(get(module["app"], "/v1/ml/analytics/health").body)
    assert health["rabbitmq"]["connectionState"] == "CONNECTED"
    assert [each.routing_key for each in broker.messages] == [
        "ml.summarize", "ml.transcribe", "ml.embed", "ml.embed"
    ]  # fmt: skip


TESTING = PACKAGE / "testing/README.rst"


def _testing() -> dict[str, Any]:
    module: dict[str, Any] = {
        "MLProducer": MLProducer,
        "Settings": Settings,
        "SummarizationTask": SummarizationTask,
        "NotConnectedError": NotConnectedError,
        "pytest": pytest,
        "app": celery.Celery("page", broker="amqp://localhost//", backend="cache+memory://"),
    }
    for snippet in snippets(TESTING.read_text()):
        run(snippet, TESTING, module)
    return module


def test_testing_without_a_broker(recording_producer: RecordingProducer) -> None:
    """The page's tests with a recording producer pass."""
    module = _testing()
    importlib.import_module(*module["pytest_plugins"])
    for name in ("test_summarize", "test_no_broker", "test_billing"):
        recording_producer.clear()
        module[name](recording_producer)
    importlib.import_module("mlproducer.contrib.celery").uninstall(module["app"])


@pytest.mark.broker
@pytest.mark.parametrize("name", ["test_confirmed", "test_frozen_broker"])
def test_testing_with_a_broker(request: pytest.FixtureRequest, name: str) -> None:
    """The page's tests with a real broker pass."""
    test = _testing()[name]
    test(**{each: request.getfixturevalue(each) for each in inspect.signature(test).parameters})
