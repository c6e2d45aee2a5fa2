"""What ``import mlproducer`` costs in a fresh process.

Against a process that does nothing; and whether the import brings in a package that is an extra.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most

LIMIT = 30.0
EXTRAS = (
    "orjson",
    "redis",
    "opentelemetry",
    "celery",
    "kombu",
    "sentry_sdk",
    "django",
    "flask",
    "sqlite3",
    "pytest",
)
_LOADED = f"""
import sys, json, mlproducer
print(json.dumps([name for name in {EXTRAS!r} if name in sys.modules]))
"""


def run(lab: Lab) -> Report:
    """Start processes by turns; the first of each warms the file cache."""
    rounds = 5 if lab.scale.quick else 15
    pairs = [(_seconds("import mlproducer"), _seconds("pass")) for _ in range(rounds + 1)][1:]
    loaded = json.loads(_run(_LOADED))
    figures = [
        Figure("import", [1e3 * (ours - bare) for ours, bare in pairs], "ms", at_most(150)),
        Figure("import / bare interpreter", [ours / bare for ours, bare in pairs]),
        Figure("bare interpreter", [1e3 * bare for _, bare in pairs], "ms"),
        Figure("extras that it imports", [len(loaded)], "modules", at_most(0)),
    ]
    return Report(figures=figures, notes=[f"imports {name}" for name in loaded])


def _seconds(code: str) -> float:
    started = time.perf_counter()
    _run(code)
    return time.perf_counter() - started


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT).stdout
