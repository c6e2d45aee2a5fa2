"""Every piece of Python in the README of `mlproducer.contrib` runs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlproducer.contrib import celery
from mlproducer.errors import NotConnectedError
from mlproducer.testing import RecordingProducer

README = Path(celery.__file__).parents[1] / "README.rst"


def _snippets(section: str) -> Iterator[str]:
    page = README.read_text()
    begin = page.index(f"\n{section}\n---")
    end = re.search(r"\n\n[^\n]+\n---+\n", page[begin + 1 :])
    text = page[begin:] if end is None else page[begin : begin + 1 + end.start()] + "\n"
    for each in re.findall(r"^\.\. code:: python\n\n((?:    .*\n|\n)+)", text, re.MULTILINE):
        yield textwrap.dedent(each)


def test_celery(
    recording_producer: RecordingProducer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the page, in one module; the place of a broker is taken."""
    installed: list[dict[str, Any]] = []
    install = celery.install

    def recording(app: Any, producer: Any = None, **options: Any) -> None:
        installed.append(options)
        app.conf.result_backend = "cache+memory://"  # no Redis is there
        install(app, producer or recording_producer, **options)

    monkeypatch.setattr(celery, "install", recording)
    module: dict[str, Any] = {}
    snippets = list(_snippets("Celery"))
    assert len(snippets) == 5
    for snippet in snippets:
        if "except PublishFailedError" in snippet:
            recording_producer.fail_next(NotConnectedError("no broker"))
        exec(compile(snippet, str(README), "exec"), module)
    module["install"](module["app"], rollout=1.0)
    recording_producer.clear()
    module["test_billing"](recording_producer)
    assert capsys.readouterr().out == "no broker\nFalse\n"
    assert [each.get("rollout") for each in installed[:3]] == [None, 0.05, installed[2]["rollout"]]
    celery.uninstall(module["app"])
