"""A Celery application, and a program that calls it in every way; with and without a producer.

``BROKER`` and ``BACKEND`` say where; ``INSTALL`` has tasks sent through a producer; ``QUORUM`` has
quorum queues. Run as a program it prints what came of each call, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError
from kombu import Exchange, Queue

LIMIT = 180.0

app = Celery("shop", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.broker_connection_retry_on_startup = True
app.conf.result_expires = 60
app.conf.task_send_sent_event = True
app.conf.task_routes = {"shop.routed": {"queue": "express", "routing_key": "express.routed"}}
ARGUMENTS: dict[str, Any] = {"x-max-priority": 10}
if os.environ.get("QUORUM"):
    ARGUMENTS = {"x-queue-type": "quorum"}
jobs = Exchange("jobs", type="topic")
app.conf.task_default_queue = app.conf.task_default_routing_key = "shop"
app.conf.task_queues = [
    Queue("shop", jobs, "shop", queue_arguments=ARGUMENTS),
    Queue("express", jobs, "express.#", queue_arguments=ARGUMENTS),
]
app.conf.beat_schedule = {"each": {"task": "shop.tick", "schedule": 0.5}}
if os.environ.get("INSTALL"):
    from mlproducer.contrib.celery import deduplicate, install

    install(app)
    if app.conf.result_backend.startswith("redis"):
        deduplicate(app, f"{app.conf.result_backend}?prefix=notes")


@app.task(name="shop.add")
def add(x: int, y: int) -> int:
    """Add."""
    return x + y


@app.task(name="shop.routed", bind=True)
def routed(self: Any) -> list[Any]:
    """Tell how it came."""
    info = self.request.delivery_info
    return [info["exchange"], info["routing_key"], info["priority"]]


@app.task(name="shop.seen", bind=True)
def seen(self: Any, *args: Any) -> dict[str, Any]:
    """Tell what the worker has read of its message."""
    request = self.request
    return {
        "args": args,
        "a": request.headers.get("a") if request.headers else None,
        "timelimit": request.timelimit,
        "stamps": getattr(request, "stamps", None),
        "priority": request.delivery_info["priority"],
    }


@app.task(name="shop.flaky", bind=True, max_retries=3)
def flaky(self: Any, countdown: float) -> int:
    """Succeed at the third attempt."""
    if self.request.retries < 2:
        raise self.retry(countdown=countdown)
    return int(self.request.retries)


@app.task(name="shop.fails")
def fails() -> None:
    """Fail."""
    raise ValueError("it fails")


@app.task(name="shop.total")
def total(numbers: list[int]) -> int:
    """Add up."""
    return sum(numbers)


@app.task(name="shop.swap", bind=True)
def swap(self: Any, x: int) -> None:
    """Let another task do it."""
    raise self.replace(add.s(x, 1))


@app.task(name="shop.spread", bind=True)
def spread(self: Any, n: int) -> None:
    """Let many tasks do it."""
    raise self.replace(chord((add.s(i, i) for i in range(n)), total.s()))


@app.task(name="shop.note", ignore_result=True)
def note(result: Any, name: str) -> None:
    """Store a value where the caller looks for it."""
    app.backend.set(name, json.dumps(result))


@app.task(name="shop.noted_error", ignore_result=True)
def noted_error(request: Any, exc: Any, traceback: Any) -> None:
    """Store the failure of another task."""
    app.backend.set("error", json.dumps(type(exc).__name__))


@app.task(name="shop.tick", ignore_result=True)
def tick() -> None:
    """Count."""
    app.backend.client.incr("ticks")


@app.task(name="shop.late", ignore_result=True, acks_late=True)
def late() -> None:
    """Count, and acknowledge after that."""
    app.backend.client.incr("late")


def waited(name: str) -> Any:
    """Wait for what `note` stores."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        value = app.backend.get(name)
        if value is not None:
            app.backend.delete(name)
            return json.loads(value)
        time.sleep(0.05)
    raise TimeoutError(name)


def duration(call: Callable[[], Any]) -> list[Any]:
    """Return a result, and whether it took from two to six seconds."""
    started = time.monotonic()
    return [call(), 1.5 < time.monotonic() - started < 6]


def revoked() -> str:
    """Call off a task that waits."""
    waiting = add.apply_async((1, 2), countdown=3)
    app.control.revoke(waiting.id)
    try:
        return str(waiting.get(timeout=LIMIT))
    except TaskRevokedError:
        return "revoked"


def failure() -> str:
    """Call what fails."""
    try:
        fails.delay().get(timeout=LIMIT)
    except ValueError as error:
        return str(error)
    return "it does not fail"


def soon() -> datetime:
    """Return a moment in two seconds."""
    return datetime.now(timezone.utc) + timedelta(seconds=2.5)


def calls() -> dict[str, Callable[[], Any]]:
    """Return each call, which returns what came of it."""

    def get(result: Any) -> Any:
        return result.get(timeout=LIMIT)

    either = {
        "delay": lambda: get(add.delay(1, 2)),
        "options": lambda: get(
            seen.apply_async(
                ("x",),
                priority=3,
                expires=60,
                headers={"a": "b"},
                time_limit=50,
                soft_time_limit=40,
                serializer="json",
                compression="zlib",
                delivery_mode="transient",
                shadow="other",
                confirm_timeout=4,
            )
        ),
        # Celery's delayed delivery to quorum queues knows only whole seconds.
        "retry": lambda: get(flaky.delay(1.2 if os.environ.get("QUORUM") else 0.2)),
        "no_retry": lambda: get(add.apply_async((1, 2), retry=False)),
        "failure": failure,
        "chain": lambda: get(chain(add.s(1, 2), add.s(3), add.s(4))()),
        "group": lambda: sorted(get(group(add.s(i, i) for i in range(4))())),
        "by_name": lambda: get(app.send_task("shop.add", (5, 6))),
        "starmap": lambda: get(add.starmap([(1, 2), (3, 4)]).delay()),
        "chunks": lambda: get(add.chunks([(1, 2), (3, 4), (5, 6)], 2).delay()),
        "routed": lambda: get(routed.delay()),
        "queue": lambda: get(routed.apply_async(queue="shop", routing_key="shop", priority=7)),
        "countdown": lambda: duration(lambda: get(add.apply_async((1, 2), countdown=2))),
        "eta": lambda: duration(lambda: get(add.apply_async((1, 2), eta=soon()))),
    }
    if os.environ["BACKEND"].startswith("rpc"):
        return either
    return {
        **either,
        "chord": lambda: get(chord((add.s(i, i) for i in range(4)), total.s())()),
        "replace": lambda: get(swap.delay(4)),
        "replace_many": lambda: get(spread.delay(4)),
        "link": lambda: [add.apply_async((1, 2), link=note.s("link")) and waited("link")],
        "link_error": lambda: [
            fails.apply_async((), link_error=noted_error.s()) and waited("error")
        ],
        "nested": lambda: sorted(get((add.s(1, 1) | group(add.s(1), add.s(2) | add.s(3))).delay())),
        "revoke": revoked,
    }


if __name__ == "__main__":
    json.dump({name: call() for name, call in calls().items()}, sys.stdout)
