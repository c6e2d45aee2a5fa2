"""Programs that tests run in processes of their own, and how a test runs them.

A script says what happens as lines of JSON on its standard output, and may wait for a line on its
standard input; so a test follows it step by step, and sleeps nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pika
from attrs import frozen

DIRECTORY = Path(__file__).parent
LIMIT = 30.0

FORK_WARNING = "ignore:This process:DeprecationWarning"
"""Python 3.12 and later warn of a fork beside threads, which these scripts do on purpose."""


@frozen
class Ended:
    """How a script ended, and what it said on the way."""

    returncode: int
    reports: list[dict[str, Any]]
    stderr: str


class Script:
    """One run of a script, killed with all its children where the test leaves before its end."""

    def __init__(
        self, name: str, *arguments: str, url: str, environ: dict[str, str] | None = None
    ) -> None:
        argv = [sys.executable, "-W", "error", "-W", FORK_WARNING, str(DIRECTORY / f"{name}.py")]
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*argv, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | {"RABBITMQ_URL": url} | (environ or {}),
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reports: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its children
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(LIMIT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._reader.join(LIMIT)
        self._stderr.close()

    def next(self, timeout: float = LIMIT) -> dict[str, Any]:
        """Wait for the script's next report."""
        report = self._reports.get(timeout=timeout)
        assert report is not None, f"the script has ended: {self.stderr()}"
        return report

    def go(self) -> None:
        """Let a script go on that waits for a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the script itself, not to its children."""
        self._process.send_signal(number)

    def end(self, timeout: float = LIMIT) -> Ended:
        """Wait for the script's end."""
        returncode = self._process.wait(timeout)
        self._reader.join(timeout)
        reports = []
        while not self._reports.empty():
            report = self._reports.get(timeout=0)
            if report is not None:
                reports.append(report)
        return Ended(returncode, reports, self.stderr())

    def stderr(self) -> str:
        """Everything that the script has written to its standard error."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._reports.put(json.loads(line))
        self._reports.put(None)


def run(
    name: str, *arguments: str, url: str, environ: dict[str, str] | None = None, limit: float = 60.0
) -> Ended:
    """Run a script to its end."""
    with Script(name, *arguments, url=url, environ=environ) as script:
        return script.end(limit)


def drain(url: str, name: str) -> Counter[str]:
    """Empty a queue, and give how often each message id was in it."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    seen: Counter[str] = Counter()
    while True:
        method, properties, _ = channel.basic_get(name, auto_ack=True)
        if method is None:
            connection.close()
            return seen
        seen[properties.message_id] += 1
