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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

import pika
from attrs import frozen

DIRECTORY = Path(__file__).parent
LIMIT = 60.0

FORK_WARNING = "ignore:This process:DeprecationWarning"
"""Python 3.12 and later warn of a fork beside threads, which these scripts do on purpose."""


@frozen
class Ended:
    """How a program ended, and what it said on the way."""

    returncode: int
    reports: list[dict[str, Any]]
    stderr: str


class Program:
    """One run of a program, killed with all its children where the test leaves before its end.

    :param argv: what to run, in the directory of the scripts
    :param url: what it finds in ``RABBITMQ_URL``
    :param descriptors: what it inherits
    """

    def __init__(
        self,
        argv: Sequence[str],
        url: str,
        environ: Mapping[str, str] = MappingProxyType({}),
        descriptors: Collection[int] = (),
    ) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=DIRECTORY,
            env={**os.environ, "RABBITMQ_URL": url, **environ},
            pass_fds=descriptors,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reports: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Program:
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
        """Wait for the program's next report."""
        report = self._reports.get(timeout=timeout)
        assert report is not None, f"the program has ended: {self.stderr()}"
        return report

    def go(self) -> None:
        """Let a program go on that waits for a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, not to its children."""
        self._process.send_signal(number)

    def end(self, timeout: float = LIMIT) -> Ended:
        """Wait for the program's end."""
        returncode = self._process.wait(timeout)
        self._reader.join(timeout)
        reports = []
        while not self._reports.empty():
            report = self._reports.get_nowait()
            if report is not None:
                reports.append(report)
        return Ended(returncode, reports, self.stderr())

    def stderr(self) -> str:
        """Everything that the program has written to its standard error."""
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(b"{"):  # Celery shows a banner
                    self._reports.put(json.loads(line))
        self._reports.put(None)


def script(
    name: str, *arguments: str, url: str, environ: Mapping[str, str] = MappingProxyType({})
) -> Program:
    """Start a script, to which any warning is an error."""
    argv = [sys.executable, "-W", "error", "-W", FORK_WARNING, f"{name}.py", *arguments]
    return Program(argv, url, environ)


def run(
    name: str, *arguments: str, url: str, environ: Mapping[str, str] = MappingProxyType({})
) -> Ended:
    """Run a script to its end."""
    with script(name, *arguments, url=url, environ=environ) as program:
        return program.end(60.0)


def drain(url: str, name: str) -> Counter[str]:
    """Empty a queue, and return how often each message id was in it."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    seen: Counter[str] = Counter()
    while True:
        method, properties, _ = channel.basic_get(name, auto_ack=True)
        if method is None:
            connection.close()
            return seen
        seen[properties.message_id] += 1
