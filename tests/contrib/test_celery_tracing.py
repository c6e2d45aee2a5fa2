"""Tracing tools beside `install`: spans as without it, and the trace goes on in a stock worker.

Runs on: pytest's main thread; sender and worker in processes of their own, since the tools patch
Celery for a whole process.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections import Counter

import pytest

from mlproducer.testing.plugin import VirtualHost
from tests.broker.scripts import Program

pytestmark = pytest.mark.broker

TOOLS = {
    "opentelemetry": ("opentelemetry.instrumentation.celery", "PRODUCER", "CONSUMER"),
    "sentry": ("sentry_sdk", "queue.submit.celery", "queue.task.celery"),
}


def is_installed(module: str) -> bool:
    """Return whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is part of
        return False


@pytest.mark.parametrize("tool", TOOLS)
def test_the_same_spans(rabbitmq_vhost: VirtualHost, tool: str) -> None:
    """As many with a producer as without; the worker's is a child of the one that sent the task."""
    module, sending, running = TOOLS[tool]
    if not (is_installed(module) and is_installed("celery")):
        pytest.skip(f"needs {module}")
    argv = [sys.executable, "-m", "celery", "--app", "instrumented_app", "worker", "-P", "solo"]
    environ, kinds = {"TOOL": tool}, {}
    with Program([*argv, "--without-mingle"], rabbitmq_vhost.url, environ) as worker:
        assert worker.next() == {"ready": True}
        for installed in ({}, {"INSTALL": "1"}):
            script = [sys.executable, "instrumented_app.py"]
            with Program(script, rabbitmq_vhost.url, {**environ, **installed}) as sender:
                ended = sender.end()
            assert ended.returncode == 0, ended.stderr
            sent = {span["span"]: span for span in ended.reports}
            span = worker.next()
            while span["kind"] != running:
                span = worker.next()
            assert sent[span["parent"]]["kind"] == sending
            assert sent[span["parent"]]["trace"] == span["trace"]
            kinds[bool(installed)] = Counter(each["kind"] for each in sent.values())
        worker.signal(signal.SIGTERM)
        assert worker.end().returncode == 0
    del kinds[False]["queue.publish"]  # which Sentry puts around kombu's own sending
    assert kinds[True] == kinds[False]
