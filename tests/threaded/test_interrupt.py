"""Ctrl-C in the middle of publishing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert report.pop("steps") > 50
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
