"""What ``import mlproducer`` costs in a fresh process.

Against a process that does nothing; and whether the import brings in a package that is an extra.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most, ratios

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
    with tempfile.TemporaryDirectory() as compiled:  # whatever the environment says of bytecode
        own = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": compiled}
        return _report({**os.environ, **own}, rounds)


def _report(environ: Mapping[str, str], rounds: int) -> Report:
    codes = ("import mlproducer", "from mlproducer import MLProducer", "pass")
    turns = [[_seconds(code, environ) for code in codes] for _ in range(rounds + 1)][1:]
    package, producer, bare = zip(*turns, strict=True)
    loaded = json.loads(_run(_LOADED, environ))
    figures = [
        Figure("import mlproducer / bare interpreter", ratios(package, bare), target=at_most(2.5)),
        Figure("and MLProducer / bare interpreter", ratios(producer, bare)),
        Figure("bare interpreter", [1e3 * each for each in bare], "ms"),
        Figure("extras that it imports", [len(loaded)], "modules", at_most(0)),
    ]
    return Report(figures=figures, notes=[f"imports {name}" for name in loaded])


def _seconds(code: str, environ: Mapping[str, str]) -> float:
    started = time.perf_counter()
    _run(code, environ)
    return time.perf_counter() - started


def _run(code: str, environ: Mapping[str, str]) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environ, check=True, capture_output=True, text=True, timeout=LIMIT
    )
    return done.stdout
