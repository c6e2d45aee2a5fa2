"""Producers against fake brokers: short delays, and nothing left behind.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from mlproducer import MLProducer, Settings, _answers, _async_answers
from mlproducer._engine import io_thread
from mlproducer.testing.fake_broker import Behaviour, FakeBroker
from tests.helpers import LIMIT
from tests.stopwatch import in_time
from tests.threaded.moods import FAKE_BROKER

CLOSE_TIMEOUT = 0.5

QUICK = {
    "circuit_breaker_threshold": 1_000_000,
    "max_message_retries": 1000,
    "publish_timeout": LIMIT,
    "connection_timeout": LIMIT,
    "reconnect_initial_delay": 0.05,
    "reconnect_max_delay": 0.2,
    "max_reconnect_attempts": 1000,
    "message_retry_base_delay": 0.05,
    "message_retry_max_delay": 0.2,
    "retry_sweep_interval": 0.05,
    "declare_topology": "off",
}
"""Short delays, a handshake of few frames, and a breaker that stays out of it.

What ought to be answered is waited for; tests of what is not have limits of their own.
"""

Connect = Callable[..., MLProducer]
Serve = Callable[..., FakeBroker]


@pytest.fixture(autouse=True)
def no_hurry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a publisher whose time is up wait for what the I/O thread and the store say then.

    They have a tenth of a second, which a busy machine may let pass. Tests of that are marked
    ``hurry``.
    """
    if request.node.get_closest_marker("hurry") is None:
        monkeypatch.setattr(_answers, "GRACE", LIMIT)
        monkeypatch.setattr(_async_answers, "GRACE", LIMIT)
        monkeypatch.setattr(io_thread, "STORE_LIMIT", LIMIT)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start fake brokers: ``serve(Behaviour())``. They outlive the producers."""
    with ExitStack() as brokers:

        def start(behaviour: Behaviour | None = None) -> FakeBroker:
            return brokers.enter_context(FakeBroker(behaviour))

        yield start


@pytest.fixture
def connect(serve: Serve) -> Iterator[Connect]:
    """Make producers: ``connect(broker_or_url, **settings)``; each closes in time."""
    producers: list[MLProducer] = []

    def make(broker: FakeBroker | str, **settings: Any) -> MLProducer:
        url = broker if isinstance(broker, str) else broker.url
        producers.append(MLProducer(Settings(url=url, **{**QUICK, **settings})))
        return producers[-1]

    yield make
    for producer in producers:
        with in_time(CLOSE_TIMEOUT + 0.5):
            producer.close(CLOSE_TIMEOUT)
    left = [each for each in threading.enumerate() if _is_ours(each)]
    for thread in left:
        thread.join(LIMIT)  # a close that is in time leaves one that has no CPU to end by itself
    assert [each.name for each in left if each.is_alive()] == []


def _is_ours(thread: threading.Thread) -> bool:
    name = thread.name
    return name.startswith("mlproducer-") and name not in ("mlproducer-proxy", FAKE_BROKER)
