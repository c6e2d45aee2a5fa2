"""Runs the real commands in processes of their own, and sees that they print no secret.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

LIMIT = 300.0
COMMAND = [sys.executable, "-m", "mlproducer"]


def environ_of(url: str | None, more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment, with nothing of the library's but what is said here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ML_"))}
    return {**kept, **({} if url is None else {"RABBITMQ_URL": url}), **more}


def run(
    *argv: str, url: str | None = None, stdin: str = "", limit: float = LIMIT, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and see that it prints no secret."""
    result = subprocess.run(
        [*COMMAND, *argv],
        env=environ_of(url, environ),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    printed = result.stdout + result.stderr
    assert "PRIVATE" not in printed
    assert "Traceback" not in printed
    password = urlsplit(url or "").password
    assert password is None or password not in printed
    return result


def documents(text: str) -> list[dict[str, Any]]:
    """Read one JSON document a line."""
    return [json.loads(line) for line in text.splitlines()]
