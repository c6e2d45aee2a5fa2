"""Ctrl-C in the middle of publishing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlproducer._engine import io_thread
from mlproducer._engine.engine import Engine
from tests.helpers import LIMIT, make_message, wait_until
from tests.threaded.brokers import Silent, ack
from tests.threaded.conftest import Connect, Serve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("way", "window"),
    [("publish", 1), ("publish", 1000), ("submit", 1), ("publish_many", 2)],
)
def test_interrupted_200_times(way: str, window: int) -> None:
    """The producer works on, no slot of the window is lost, and nothing arrives twice (77)."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.threaded.interrupted", way, str(window)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    assert report.pop("interrupts") > 20
    report.pop("confirmed")
    assert report == {
        "after": True,
        "left": 0,
        "twice": [],
        "pending": 0,
        "connections": 1,
        "abandoned": [],
    }


def cut(*what: str) -> dict[str, Any]:
    """Run the program that cuts a call at each of its steps."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.threaded.cut", *what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.parametrize("by", ["ctrl-c", "handler"])
@pytest.mark.parametrize("way", ["publish", "submit", "publish_many"])
def test_publishing_is_cut_at_each_step(way: str, by: str) -> None:
    """No slot of the window leaks, nothing arrives twice, and what was returned is confirmed.

    A signal handler may raise the error of a message of its own: it is not taken for this one's.
    """
    report = cut(way, by)
    assert report.pop("steps") > 40
    assert report == {
        "leaks": [],
        "twice": [],
        "confirmed": True,
        "refused and sent": [],
        "abandoned": [],
        "threads": [],
    }


def test_the_start_is_cut_at_each_step() -> None:
    """Nothing is left that the next close() does not end, and the next publish() works."""
    report = cut("start")
    assert report["steps"] > 20
    assert report["left"] == []


def test_close_is_cut_at_each_step() -> None:
    """The next close() has the one report, has told every publisher, and leaves no thread."""
    report = cut("close")
    assert report["steps"] > 50
    assert report["wrong"] == []


@pytest.mark.parametrize("way", ["publish", "submit"])
def test_interrupted_twice(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The second interrupt comes while the message is taken back: its slot is given back later."""
    monkeypatch.setattr(io_thread, "TICK", 0.05)
    producer = connect(serve(), max_in_flight=1, publish_timeout=0.05)
    assert producer.wait_connected(LIMIT)
    runtime: Any = producer._life.runtime

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "post", interrupt)
        patch.setattr(Engine, "post_stored", interrupt)
        patch.setattr(Engine, "take_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            getattr(producer, way)(make_message("m"))
    assert wait_until(lambda: not len(runtime.gate))
    assert producer.publish(make_message("next"), timeout=LIMIT).confirmed


@pytest.mark.parametrize("connections", [1, 2])
@pytest.mark.parametrize("way", ["publish", "submit"])
def test_handed_over_late(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch, way: str, connections: int
) -> None:
    """A publisher that got no processor for long, after it had its slot, doubles no message."""
    monkeypatch.setattr(io_thread, "TICK", 0.05)
    broker = serve(Silent())
    producer = connect(broker, publish_timeout=0.05, connections=connections)
    assert producer.wait_connected(LIMIT)
    step = "post" if way == "publish" else "post_stored"
    post: Any = getattr(Engine, step)

    def late(engine: Engine, delivery: Any) -> None:
        assert wait_until(lambda: bool(broker.messages))  # it was taken for lost, and sent
        post(engine, delivery)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, step, late)
        receipt = getattr(producer, way)(make_message("m"))
    ahead = producer.submit(make_message("next"))
    assert wait_until(lambda: len(broker.messages) > 1)
    for each in broker.messages:
        ack(each)
    assert receipt.result(LIMIT).confirmed
    assert ahead.result(LIMIT).confirmed
    assert [each.properties.message_id for each in broker.messages] == ["m", "next"]
    assert broker.accepted == connections


def cut_thread(role: str, store: str, stride: int) -> dict[str, Any]:
    """Run the program that cuts a thread of the library."""
    command = [sys.executable, "-m", "tests.threaded.cut_threads"]
    ended = subprocess.run(
        [*command, role, store, str(stride)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 2),
    reason="with 3.12.1 the interpreter itself crashes where a trace function raises in a thread",
)
@pytest.mark.parametrize(
    ("role", "store", "stride"),
    [("io", "memory", 21), ("io", "sqlite", 35), ("retry", "memory", 15), ("retry", "ahead", 34)],
)
def test_a_thread_is_cut_at_each_step(role: str, store: str, stride: int) -> None:
    """What it does in the middle of a message's life is taken up: no message, or slot, is lost.

    Each step takes a message of its own, and there are hundreds: here are some of them.
    """
    report = cut_thread(role, store, stride)
    assert report["steps"] > 5
    assert report["lost"] == []
