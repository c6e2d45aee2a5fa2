"""Flask: an app factory, one producer for the process, the test client, blueprint and commands.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mlproducer import MLProducer, SummarizationTask
from mlproducer.errors import ConfigurationError
from mlproducer.testing import FakeBroker, RecordingProducer
from tests.pages import run, snippets

flask = pytest.importorskip("flask")

from mlproducer.contrib import flask as contrib  # noqa: E402 - needs Flask
from mlproducer.contrib.flask import MLProducerExtension  # noqa: E402 - needs Flask

REAL = {"MLPRODUCER_PRODUCER": "mlproducer.MLProducer"}

ml = MLProducerExtension()


def create_app(**config: Any) -> Any:
    """Make an app as users do."""
    app = flask.Flask(__name__)
    app.config.update(config)
    ml.init_app(app)
    app.register_blueprint(ml.blueprint, url_prefix="/ml")

    @app.post("/shares/<int:share_id>/summary")
    def summarize(share_id: int) -> Any:
        task = SummarizationTask(share_id, {"text": flask.request.form["text"]})
        receipt = ml.producer.publish(task)
        return {"confirmed": receipt.confirmed}, 202

    return app


def producer_of(app: Any) -> MLProducer:
    """Return the producer of an app."""
    with app.app_context():
        return ml.producer


def test_thirty_apps_share_one_producer() -> None:
    """However many apps a process makes, there is one connection; other settings, another one."""
    with FakeBroker() as broker:
        apps = [create_app(**REAL, MLPRODUCER_URL=broker.url) for _ in range(30)]
        producer = producer_of(apps[0])
        for number, app in enumerate(apps):
            answer = app.test_client().post(f"/shares/{number}/summary", data={"text": "x"})
            assert answer.json == {"confirmed": True}
            assert producer_of(app) is producer
        assert broker.accepted == 1
        assert len(broker.messages) == 30
        other = create_app(**REAL, MLPRODUCER_URL=broker.url, MLPRODUCER_PUBLISH_TIMEOUT=1.0)
        assert producer_of(other) is not producer
        producer.close()


def test_an_app_in_a_test_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a producer of its own, and publishes nothing, whatever the environment names."""
    with FakeBroker() as broker:
        monkeypatch.setenv("RABBITMQ_URL", broker.url)
        first, second = create_app(), create_app(TESTING=True)
        assert first.test_client().post("/shares/7/summary", data={"text": "x"}).status_code == 202
        producer = producer_of(first)
        assert isinstance(producer, RecordingProducer)
        producer.assert_published(SummarizationTask(7, {"text": "x"}))
        assert isinstance(producer_of(second), RecordingProducer)
        assert producer_of(second) is not producer
        assert broker.accepted == 0


UNITTEST = """
import unittest
import flask
from mlproducer.contrib.flask import MLProducerExtension

class Test(unittest.TestCase):
    def test(self):
        app, ml = flask.Flask(__name__), MLProducerExtension()
        ml.init_app(app)
        with app.app_context():
            ml.producer.publish_summarization_task(7, {"text": "x"})
            self.assertEqual(len(ml.producer.published), 1)
"""


def test_unittest_records_too(tmp_path: Path) -> None:
    """Also where an app forgets to say that it is tested."""
    (tmp_path / "test_app.py").write_text(UNITTEST)
    with FakeBroker() as broker:
        environ = {**os.environ, "RABBITMQ_URL": broker.url}
        argv = [sys.executable, "-m", "unittest", "test_app"]
        subprocess.run(argv, cwd=tmp_path, env=environ, check=True, timeout=60)
        assert broker.accepted == 0


def test_between_two_tests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that a test has left publishes nothing either; the first variable is a test's."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert isinstance(producer_of(create_app(TESTING=False)), RecordingProducer)


def test_producer_of_ones_own(recording_producer: RecordingProducer) -> None:
    """It may be handed in."""
    app = create_app(MLPRODUCER_PRODUCER=recording_producer)
    assert producer_of(app) is recording_producer


def test_without_an_app() -> None:
    """Each mistake is told in words."""
    with pytest.raises(RuntimeError, match="application context"):
        _ = ml.producer
    with pytest.raises(RuntimeError, match="init_app"):
        producer_of(flask.Flask(__name__))
    with pytest.raises(ConfigurationError, match=r"app.config: .*did you mean store_url"):
        producer_of(create_app(MLPRODUCER_STORE_ULR="memory://"))


def test_blueprint() -> None:
    """Health, metrics and the page answer beside each other."""
    client = create_app().test_client()
    assert client.get("/ml/health").status_code == 503
    client.post("/shares/7/summary", data={"text": "x"})
    assert client.get("/ml/health").json["healthy"] is True
    assert b"ml_producer_" in client.get("/ml/metrics").data
    assert "tasks" in client.get("/ml/metrics/json").json
    page = client.get("/ml/")
    assert "sha256" in page.headers["Content-Security-Policy"]
    assert client.get("/ml/page.json").status_code == 200
    assert client.get("/ml").location.endswith("/ml/")
    assert client.post("/ml/health").status_code == 405


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows runs, in its order, in one module, with nothing that it does not show."""
    shop = types.ModuleType("shop")
    shop.__file__ = __file__  # where Flask looks for templates
    monkeypatch.setitem(sys.modules, "shop", shop)
    module = vars(shop)
    page = Path(contrib.__file__).with_name("README.rst")
    for snippet in snippets(page.read_text()):
        run(snippet, page, module)
    module["test_summarize"]()
    client = module["create_app"](TESTING=True).test_client()
    assert client.get("/ml/").status_code == 403
    assert client.get("/ml/health").status_code == 503


def test_commands(capfd: pytest.CaptureFixture[str]) -> None:
    """They have the app's settings, and their own exit codes."""
    url = "amqp://u:p@127.0.0.1:1/"
    runner = create_app(MLPRODUCER_URL=url, MLPRODUCER_CONNECTION_TIMEOUT=1.0).test_cli_runner()
    ran = runner.invoke(args=["mlproducer", "check", "--json"])
    assert ran.exit_code == 1
    assert '"broker": "127.0.0.1:1"' in ran.output + capfd.readouterr().out
    assert runner.invoke(args=["mlproducer", "nonsense"]).exit_code == 2
    assert "dead-letters" in runner.invoke(args=["mlproducer", "--help"]).output
