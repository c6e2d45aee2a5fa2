"""Ctrl-C in the middle of publishing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
        timeout=60,
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
