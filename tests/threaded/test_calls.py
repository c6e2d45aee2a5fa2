"""How far a message goes: the Python calls that one of them costs, over all threads.

What belongs to the standard library and to the fake broker is left out. Run with ``-s`` to see the
list.

Runs on: pytest's main thread; the messages are another process's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import LIMIT

ROOT = Path(__file__).parents[2]


def count(kind: str) -> dict[str, Any]:
    """Return what a message costs that is confirmed, or nacked."""
    command = [sys.executable, "-m", "tests.threaded.calls", kind]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=4 * LIMIT, check=True
    )
    print(done.stdout)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def test_a_confirmed_message() -> None:
    """From `publish()` to its receipt."""
    figures = count("confirmed")
    assert figures["threads"] == ["MainThread", "mlproducer-io"]
    assert figures["calls"] <= 58
    assert figures["calls of pika"] <= 14
    assert len(figures["files"]) <= 24


def test_a_deferred_message() -> None:
    """Nacked, and put into the memory store, which needs no other thread."""
    figures = count("nacked")
    assert figures["threads"] == ["MainThread", "mlproducer-io"]
    assert figures["calls"] <= 98
    assert len(figures["files"]) <= 33
