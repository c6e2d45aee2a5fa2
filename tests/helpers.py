"""Small things that tests of several rings need: envelopes, deliveries, messages, descriptors.

Runs on: the tests' threads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mlproducer import Message
from mlproducer._core.delivery import Delivery
from mlproducer.message import Envelope

LIMIT = 120.0
"""Seconds after which a test stops waiting for what ought to come.

It ends a test that would hang, and measures nothing: a machine that is busy elsewhere may make any
step wait for seconds. What is promised in seconds is measured by `tests.stopwatch`.
"""

NO_PROPERTIES = b"\x10\x00"
"""An envelope's properties where none matter."""

T = TypeVar("T")

_numbers = itertools.count(1)


def make_envelope(
    message_id: str | None = None,
    *,
    exchange: str = "x",
    routing_key: str = "k",
    properties: bytes = NO_PROPERTIES,
    body: bytes = b"body",
) -> Envelope:
    """Return an envelope with an id of its own; its properties are no valid AMQP."""
    return Envelope(
        message_id or f"m{next(_numbers)}", "raw", exchange, routing_key, properties, body
    )


class Patience(Future[Any]):
    """A future that may be taken over only once, like what a publisher waits for."""

    def set_running_or_notify_cancel(self) -> bool:
        """Take it over, unless it was taken over or withdrawn."""
        taken = self.running() or self.done()
        return not taken and super().set_running_or_notify_cancel()


def make_delivery(
    message_id: str | None = None,
    *,
    exchange: str = "x",
    routing_key: str = "k",
    properties: bytes = NO_PROPERTIES,
    body: bytes = b"body",
    started: float = 0.0,
    deadline: float = 5.0,
    retry: bool = True,
    answers_deferral: bool = True,
) -> Delivery:
    """Return a delivery as `MLProducer.publish` makes it."""
    return Delivery(
        make_envelope(
            message_id,
            exchange=exchange,
            routing_key=routing_key,
            properties=properties,
            body=body,
        ),
        Patience(),
        started=started,
        deadline=deadline,
        retry=retry,
        answers_deferral=answers_deferral,
    )


def make_message(message_id: str | None = None, *, body: bytes = b"body") -> Message:
    """Return a small message for a fake broker, which has every route."""
    return Message(body=body, routing_key="k", message_id=message_id)


class Background:
    """Calls that block, each on a daemon thread of its own, whose ends are asserted."""

    def __init__(self) -> None:
        self._calls: list[tuple[threading.Thread, Future[Any]]] = []

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Start a call and give the future of what it returns or raises."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the future raises it
                future.set_exception(error)

        thread = threading.Thread(target=run, name="test-background", daemon=True)
        self._calls.append((thread, future))
        thread.start()
        return future

    def gather(self, timeout: float = LIMIT) -> list[Any]:
        """Return what the calls returned, in their order, or raise what the first has raised."""
        deadline = time.monotonic() + timeout
        for thread, _ in self._calls:
            thread.join(max(0.0, deadline - time.monotonic()))
        calls, self._calls = self._calls, []
        return [future.result(0) for _, future in calls]


def wait_until(holds: Callable[[], bool]) -> bool:
    """Wait until something holds that is reported nowhere; false after a limit."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.001)
    return True


def descriptors() -> dict[str, str]:
    """What this process has open, and where it leads."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that reads this directory
            found[path.name] = str(path.readlink())
    return found
