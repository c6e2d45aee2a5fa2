"""The Python in the page about Celery runs.

Runs on: pytest's main thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlproducer.contrib import celery
from mlproducer.errors import NotConnectedError
from mlproducer.testing import RecordingProducer
from tests.pages import run, snippets

PAGE = Path(celery.__file__).with_name("README.rst")


def test_snippets(
    recording_producer: RecordingProducer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the page, in one module; a recording producer takes the broker's place."""
    installed: list[dict[str, Any]] = []
    install = celery.install

    def recording(app: Any, producer: Any = None, **options: Any) -> None:
        installed.append(options)
        app.conf.result_backend = "cache+memory://"  # no Redis is there
        install(app, producer or recording_producer, **options)

    monkeypatch.setattr(celery, "install", recording)
    module: dict[str, Any] = {}
    *pieces, worker, other_worker = snippets(PAGE.read_text())
    assert len(pieces) == 5
    for piece in pieces:
        if "except PublishFailedError" in piece:
            recording_producer.fail_next(NotConnectedError("no broker"))
        run(piece, PAGE, module)
    module["install"](module["app"], rollout=1.0)
    recording_producer.clear()
    module["test_billing"](recording_producer)
    assert capsys.readouterr().out == "no broker\nFalse\n"
    assert [each.get("rollout") for each in installed[:3]] == [None, 0.05, installed[2]["rollout"]]
    celery.uninstall(module["app"])

    module = {}
    run(worker, PAGE, module)
    run(other_worker, PAGE, module)
    [queue] = module["app"].conf.task_queues
    assert (queue.exchange.name, queue.routing_key) == ("bookmarkai.ml", queue.name)
    assert "llm_service.tasks.summarize_content" in module["app"].tasks
