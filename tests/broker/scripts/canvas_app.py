"""A Celery application whose tasks use what a message's headers are for, and tell what came of it.

Each line on standard output is ``NAME JSON``.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery, chain, chord, group
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_ready
from kombu import Exchange, Queue

report_to = os.dup(1)
os.dup2(2, 1)  # the banner and the log belong to standard error

app = Celery("canvas", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.task_queues = [Queue("canvas", Exchange("canvas", type="topic"), routing_key="canvas")]
app.conf.task_default_queue = app.conf.task_default_routing_key = "canvas"
app.conf.broker_connection_retry_on_startup = True


def tell(name: str, value: Any) -> None:
    """Write one line, in one piece, since several processes do."""
    os.write(report_to, f"{name} {json.dumps(value, default=repr)}\n".encode())


@worker_ready.connect
def ready(**_: object) -> None:
    """Say that the worker consumes."""
    tell("ready", True)


@app.task(name="canvas.add")
def add(x: int, y: int) -> int:
    """Add."""
    return x + y


@app.task(name="canvas.tell", bind=True)
def told(self: Any, value: Any, name: str) -> None:
    """Tell a result, and where the task comes from."""
    request = self.request
    tell(name, [value, request.root_id, request.parent_id])


@app.task(name="canvas.retry", bind=True, max_retries=3)
def retried(self: Any, name: str) -> None:
    """Tell at the third run how often it was tried, and what its limits are by then."""
    if self.request.retries < 2:
        raise self.retry(countdown=0.05)
    tell(name, [self.request.retries, self.request.root_id, self.request.timelimit])


@app.task(name="canvas.all", bind=True)
def everything(self: Any) -> None:
    """Start a link, a chain, a group, a chord and a replacement from this task's request."""
    add.apply_async((1, 2), link=told.s("link"))
    chain(add.s(1, 2), add.s(3), told.s("chain")).apply_async()
    group(told.s(n, f"group{n}") for n in range(2)).apply_async()
    chord((add.s(n, n) for n in range(3)), told.s("chord")).apply_async()
    raise self.replace(told.s("replaced", "replace"))


@app.task(name="canvas.slow", bind=True)
def slow(self: Any) -> None:
    """Run until the soft limit."""
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        tell("limit", [self.request.timelimit, self.time_limit])


@app.task(name="canvas.rich")
def rich(*args: Any, **kwargs: Any) -> None:
    """Tell the types and values that arrived."""
    tell("rich", [[type(each).__name__, str(each)] for each in (*args, *kwargs.values())])
