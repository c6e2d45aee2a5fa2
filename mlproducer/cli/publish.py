"""``mlproducer publish FILE.jsonl|-``: publish a task per line.

Streams: a line is read when there is room in flight, and only while there is a connection, so that
an outage stops the reading instead of filling the store. Every line is accounted for: confirmed,
bad (no task), refused (given back by the library), dead-lettered, or undelivered at the end.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from attrs import asdict, define, field, frozen

from mlproducer import ConnectionState, MLProducer, Receipt
from mlproducer.cli import connectivity
from mlproducer.cli.output import Console, Terminated
from mlproducer.cli.task_lines import TASKS, Task, parse, read_lines
from mlproducer.errors import (
    CircuitOpenError,
    InvalidMessageError,
    InvalidTaskError,
    PublishError,
    RetriesExhaustedError,
)

HELP = "publish a task per line of a file"
DESCRIPTION = (
    "Publish a task per line to the broker in RABBITMQ_URL. A line is a JSON object: "
    f'{{"task": KIND, ...fields}}, where KIND is one of {", ".join(TASKS)}. '
    "Blank lines are skipped, bad ones reported. Exit code 1 if anything was not delivered."
)
LOG_LEVEL = logging.WARNING

CHUNK, CHUNK_BYTES = 5000, 64 * 1024 * 1024
"""Lines, and bytes of lines, that are held at a time."""

MIN_PAUSE = 0.05
"""Seconds before what an open breaker gave back is published again, at the least."""

MAX_WAITING = 1000
"""Messages that may wait for a retry before no further line is read."""

_KEPT = (
    "it stays in the store, from which a producer or mlproducer relay delivers it: not to be "
    "published again"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the file, and how patient to be."""
    parser.add_argument("file", metavar="FILE.jsonl", help="the file; - is standard input")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for a connection, and at the end for deferred messages (60)",
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Publish everything, and return whether all of it was delivered.

    :raises ConfigurationError: no broker is named, or a setting does not parse
    :raises OSError: the file cannot be read
    """
    with _open(arguments.file) as stream:
        producer = MLProducer(arguments.settings())
        try:
            publication = Publication(producer, stream, console, arguments.timeout)
            publication.run()
        finally:
            producer.close(0.0)
    return publication.report()


@define
class Counts:
    """What became of the lines; blank ones are not counted.

    :ivar confirmed: also those that were deferred first
    :ivar deferred: not confirmed at once, whatever became of them
    :ivar refused: given back by the library
    :ivar bad: no task
    :ivar dead_lettered: failed at every retry, and are among the dead letters now
    :ivar undelivered: still waiting for a retry when the time was up; a durable store keeps them
    """

    lines: int = 0
    confirmed: int = 0
    deferred: int = 0
    refused: int = 0
    bad: int = 0
    dead_lettered: int = 0
    undelivered: int = 0

    def rows(self) -> list[tuple[str, int]]:
        """Return the table for people."""
        return [
            ("lines", self.lines),
            ("confirmed", self.confirmed),
            ("deferred at first", self.deferred),
            ("refused", self.refused),
            ("bad", self.bad),
            ("dead-lettered", self.dead_lettered),
            ("undelivered", self.undelivered),
        ]


@frozen
class _Line:
    number: int
    task: Task = field(repr=False)


@frozen
class _Deferred:
    number: int
    receipt: Receipt = field(repr=False)


class Publication:
    """The publishing of one stream."""

    def __init__(
        self, producer: MLProducer, stream: IO[bytes], console: Console, patience: float
    ) -> None:
        self._producer = producer
        self._stream = stream
        self._console = console
        self._patience = patience
        self._size = _size(stream)
        self._read = 0
        self._taken: list[_Line] = []
        self._answered: Iterator[tuple[_Line, Receipt | PublishError]] = iter(())
        self._silent = False
        self._given_back: list[_Line] = []
        self._deferred: list[_Deferred] = []
        self._number = 0
        self._stopped = ""
        self._retry_after = 0.0
        self._hope = threading.Event()
        producer.on("connected", self._hope.set)
        producer.on("circuit_closed", self._hope.set)
        self.counts = Counts()

    def run(self) -> None:
        """Publish every line, and wait for those that were deferred."""
        lines = self._lines()
        try:
            with self._console.deferring_sigterm():
                while self._publish(self._chunk(lines)):
                    self._publish_again()
                    self._collect()
                self._wait_for_deferred()
        except (KeyboardInterrupt, OSError):
            self._count_the_rest()
            self._console.error(
                f"{self.counts.confirmed} confirmed; "
                f"of the {len(self._taken) + len(self._deferred)} read last it is not known"
            )
            raise
        finally:
            self._console.end_progress()

    def _wait_for_deferred(self) -> None:
        if not self._deferred:
            return
        waiting = f"waiting for {len(self._deferred)} deferred messages"
        self._console.say(f"{waiting}, at most {self._patience:g} s")
        try:
            with self._console.interruptible():
                self._producer.flush(self._patience)
        except Terminated:
            self._stop("SIGTERM")
            self._producer.flush(self._producer.settings.exit_timeout)
        self._collect()
        self._give_up()

    def _stop(self, why: str) -> None:
        """Read no further, and wait no longer than a process may at its end."""
        self._stopped = self._stopped or f"stopped by {why} after line {self._number}"
        self._patience = min(self._patience, self._producer.settings.exit_timeout)

    def report(self) -> bool:
        """Print the counts, and return whether every line was delivered."""
        counts = self.counts
        delivered = counts.confirmed == counts.lines and not self._stopped
        try:
            self._console.table((name, str(value)) for name, value in counts.rows())
            self._console.emit({"summary": {**asdict(counts), "stopped": self._stopped or None}})
        except OSError:
            self._console.error(", ".join(f"{value} {name}" for name, value in counts.rows()))
            raise
        if self._stopped:
            self._console.error(self._stopped)
        return delivered

    # --- publishing ----------------------------------------------------------------------------

    def _publish(self, lines: Iterable[_Line]) -> bool:
        """Publish lines and account for them; return whether there were any."""
        self._taken = []
        self._hope.clear()
        results = self._producer.publish_many(self._take(lines))
        taken, self._taken = self._taken, []
        self._answered = zip(taken, results, strict=True)
        self._account()
        return bool(taken)

    def _account(self) -> None:
        for line, result in self._answered:
            if isinstance(result, CircuitOpenError):
                self._given_back.append(line)
                self._retry_after = result.retry_after
            else:
                self._settle(line.number, result)

    def _count_the_rest(self) -> None:
        """Count what has been answered and could not be printed."""
        self._silent = True
        self._account()

    def _take(self, lines: Iterable[_Line]) -> Iterator[Task]:
        for line in lines:
            self._taken.append(line)
            yield line.task

    def _publish_again(self) -> None:
        """Publish what an open circuit breaker has given back: it was not sent, and is ours.

        A new connection ends the breaker's cooldown; then it lets one message through, and the
        others after its confirm.
        """
        deadline = time.monotonic() + self._patience
        while self._given_back and time.monotonic() < deadline:
            left = max(0.0, deadline - time.monotonic())
            if not self._wait_connected(left):
                break
            self._hope.wait(min(left, max(self._retry_after, MIN_PAUSE)))
            if self._console.terminated:
                break
            again, self._given_back = self._given_back, []
            self._publish(again)
            if len(self._given_back) < len(again):
                deadline = time.monotonic() + self._patience
        for line in self._given_back:
            self._fail("refused", line.number, CircuitOpenError("the circuit breaker is open"))
        self._given_back = []

    def _wait_connected(self, limit: float) -> bool:
        try:
            with self._console.interruptible():
                return self._producer.wait_connected(limit)
        except Terminated:
            return False

    # --- reading -------------------------------------------------------------------------------

    def _chunk(self, lines: Iterator[_Line]) -> Iterator[_Line]:
        end = self._read + CHUNK_BYTES
        for line in itertools.islice(lines, CHUNK):
            yield line
            if self._read > end:
                return

    def _lines(self) -> Iterator[_Line]:
        for number, line in enumerate(self._raw_lines(), 1):
            self._number = number
            self._read += len(line)
            if not line.strip():
                continue
            obstacle = self._obstacle(number)
            if obstacle:
                self._stopped = obstacle
                return
            self.counts.lines += 1
            self._show_progress()
            try:
                task = parse(line)
            except InvalidTaskError as error:
                self._fail("bad", number, error)
            else:
                yield _Line(number, task)

    def _raw_lines(self) -> Iterator[bytes]:
        """Yield lines until there are no more, or until SIGTERM."""
        lines = read_lines(self._stream)
        try:
            while True:
                with self._console.interruptible():
                    line = next(lines, None)
                if line is None:
                    return
                yield line
        except Terminated:
            self._stop("SIGTERM")

    def _obstacle(self, number: int) -> str:
        """Wait until a message can go out; say why not, if it still cannot."""
        status = self._producer.status()
        if status.connection_state is not ConnectionState.CONNECTED:
            try:
                with self._console.interruptible():
                    error = connectivity.wait(self._producer, self._patience)
            except Terminated:
                self._number = number - 1
                self._stop("SIGTERM")
                return self._stopped
            if error is not None:
                return f"stopped before line {number}: {error}; {connectivity.advise(error)}"
        if status.retry_queue_size >= MAX_WAITING:
            try:
                with self._console.interruptible():
                    left = self._producer.flush(self._patience)
            except Terminated:
                self._number = number - 1
                self._stop("SIGTERM")
                return self._stopped
            if left >= MAX_WAITING:
                return f"stopped before line {number}: {left} messages wait for a retry"
        return ""

    def _show_progress(self) -> None:
        share = self._read / self._size if self._size else None
        counts = self.counts
        wrong = counts.bad + counts.refused
        self._console.progress(share, f"{counts.lines} lines" + (f", {wrong} bad" if wrong else ""))

    # --- accounting ----------------------------------------------------------------------------

    def _settle(self, number: int, result: Receipt | PublishError) -> None:
        if isinstance(result, InvalidMessageError):
            self._fail("bad", number, result)
        elif isinstance(result, PublishError):
            self._fail("refused", number, result)
        elif result.reason is None:
            self._confirm(number, result)
        else:
            self.counts.deferred += 1
            self._deferred.append(_Deferred(number, result))

    def _collect(self) -> None:
        """Account for the deferred messages that have found their end."""
        deferred, self._deferred = self._deferred, []
        for each in deferred:
            try:
                each.receipt.result(0.0)
            except RetriesExhaustedError as error:
                self._fail("dead_lettered", each.number, error)
            except PublishError as error:
                self._fail("refused", each.number, error)
            except TimeoutError:
                self._deferred.append(each)
            else:
                self._confirm(each.number, each.receipt)

    def _give_up(self) -> None:
        """Account for the deferred messages that have not."""
        for each in self._deferred:
            stored = each.receipt.durable
            self._fail("undelivered", each.number, each.receipt.reason, stored=stored)

    def _confirm(self, number: int, receipt: Receipt) -> None:
        self.counts.confirmed += 1
        self._emit(number, "confirmed", receipt.message_id)

    def _fail(
        self, outcome: str, number: int, error: Exception | None, *, stored: bool = False
    ) -> None:
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)
        if self._silent:
            return
        text = f"line {number}: {outcome.replace('_', '-')}: {error}"
        self._console.error(text + ("; " + _KEPT if stored else ""))
        self._emit(number, outcome, getattr(error, "message_id", None), error, stored=stored)

    def _emit(
        self,
        number: int,
        outcome: str,
        message_id: str | None,
        error: Exception | None = None,
        *,
        stored: bool = False,
    ) -> None:
        if self._silent:
            return
        record: dict[str, Any] = {"line": number, "outcome": outcome, "message_id": message_id}
        if error is not None:
            record |= {"error": type(error).__name__, "text": str(error)}
        if stored:
            record["stored"] = True
        self._console.emit(record)


def _open(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if name == "-":
        if sys.stdin is None:
            raise OSError(errno.EBADF, "is closed", "standard input")
        return contextlib.nullcontext(sys.stdin.buffer)
    return Path(name).open("rb")


def _size(stream: IO[bytes]) -> int:
    """Bytes of a regular file; 0 where the end is not known."""
    return os.fstat(stream.fileno()).st_size


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)) and value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0")
