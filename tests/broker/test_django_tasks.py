"""Tasks of Django 6 that a stock Celery worker of the project runs.

Runs on: pytest's main thread; project and worker in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlproducer.testing import RabbitMQNode
from tests.contrib.test_django import LIMIT, Project

pytest.importorskip("django.tasks", reason="django.tasks came with Django 6")
if importlib.util.find_spec("celery") is None:
    pytest.skip("needs Celery", allow_module_level=True)

PROGRAM = """
from shares.background import add, tell
from mlproducer.contrib.django import producer
print(add.enqueue(1, b=2).id, tell.enqueue("hello").id)
"""


def test_a_worker_runs_them(tmp_path: Path, rabbitmq_node: RabbitMQNode) -> None:
    """With its arguments, its context and its own id; functions and coroutines."""
    project = Project(tmp_path / "project", rabbitmq_node.url_for("/"))
    reports = tmp_path / "reports"
    reports.touch()
    project.environ["REPORTS"] = str(reports)
    argv = ["-m", "celery", "-A", "mysite.celery", "worker", "-P", "solo", "-l", "INFO"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, *argv],
            cwd=project.directory,
            env=project.environ,
            stdout=log,
            stderr=log,
        )
    try:
        told = tmp_path / "worker.log"
        deadline = time.monotonic() + LIMIT
        while " ready." not in told.read_text():  # then there is the queue
            assert time.monotonic() < deadline, told.read_text()
            time.sleep(0.1)  # a file tells of no line that is added
        ran = project.manage("shell", "-c", PROGRAM)
        assert ran.returncode == 0, ran.stderr
        first, second = ran.stdout.split()[-2:]
        runs: list[Any] = []
        deadline = time.monotonic() + LIMIT
        while len(runs) < 2:
            assert time.monotonic() < deadline, told.read_text()
            time.sleep(0.1)
            runs = [json.loads(line) for line in reports.read_text().splitlines()]
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(LIMIT)
    told_of_itself = {"text": "hello", "id": second, "attempt": 1, "priority": 10}
    assert sorted(runs, key=len) == [{"sum": 3}, told_of_itself]  # the second has priority
    assert f"mlproducer.django.run[{first}] succeeded" in told.read_text()
    assert "Traceback" not in told.read_text()
