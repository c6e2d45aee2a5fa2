"""Output of the commands: text, tables and a progress bar for people, JSON for programs.

Standard output has the result, and with ``--json`` nothing else; errors and progress go to standard
error. Must not know brokers or messages.

Runs on: the main thread; log records and callbacks print from the threads on which they happen.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

BAR_WIDTH = 24
BAR_INTERVAL = 0.1
LINE_INTERVAL = 5.0
"""Seconds between two redrawings of the bar on a terminal, or two lines in a file."""

_CLEAR = "\r\x1b[K"


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; what was started is cleaned up, as after Ctrl-C."""


class UsageError(Exception):
    """The arguments or settings do not fit the command; the text says what does."""


class Console:
    """The output of one command.

    :param as_json: whether standard output is for programs
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._terminal = sys.stderr.isatty()
        self._next_drawing = 0.0 if self._terminal else time.monotonic() + LINE_INTERVAL
        self._bar = ""
        self.terminated = False
        self._defers = False

    @contextmanager
    def handling_sigterm(self) -> Iterator[None]:
        """Raise `Terminated` at the first SIGTERM; Python itself would exit without cleaning up."""

        def on_sigterm(_number: int, _frame: object) -> None:
            if not self.terminated:
                self.terminated = True
                if not self._defers:
                    raise Terminated

        try:
            before = signal.signal(signal.SIGTERM, on_sigterm)
        except ValueError:  # not the main thread, which alone gets signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferring_sigterm(self) -> Iterator[None]:
        """Only set `terminated` at SIGTERM, except within `interruptible`."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Terminated` at SIGTERM within the block, which waits for something."""
        defers, self._defers = self._defers, False
        try:
            if self.terminated and defers:
                raise Terminated
            yield
        finally:
            self._defers = defers

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Raise `Terminated` and `KeyboardInterrupt` not within the block, but at its end.

        A second Ctrl-C does not wait for it.
        """
        interrupted: list[int] = []

        def on_sigint(number: int, frame: FrameType | None) -> None:
            if interrupted:
                signal.default_int_handler(number, frame)
            interrupted.append(number)

        defers, self._defers = self._defers, True
        before: Any = None
        try:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                with suppress(ValueError):  # not the main thread, which alone gets signals
                    before = signal.signal(signal.SIGINT, on_sigint)
            yield
        finally:
            self._defers = defers
            if before is not None:
                signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt
        if self.terminated and not defers:
            raise Terminated

    def say(self, text: str = "") -> None:
        """Print a line for people."""
        self._print(text, sys.stderr if self._as_json else sys.stdout)

    def error(self, text: str) -> None:
        """Print what went wrong to standard error."""
        with suppress(OSError):  # there is no other place to report it
            self._print(f"mlproducer: {text}", sys.stderr)

    def detail(self, text: str) -> None:
        """Print for people what `emit` prints for programs."""
        if not self._as_json:
            self.say(text)

    def emit(self, value: object) -> None:
        """Print a value as a line of JSON, if standard output is for programs."""
        if self._as_json:
            sys.stdout.write(f"{json.dumps(value)}\n")

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values for people, in two columns."""
        rows = list(rows)
        names, values = (max(map(len, column)) for column in zip(*rows, strict=True))
        for name, value in rows:
            self.detail(f"  {name:<{names}}  {value:>{values}}")

    def progress(self, share: float | None, text: str) -> None:
        """Show progress: a bar on a terminal, a line now and then in a file.

        :param share: from 0 to 1; ``None`` if the end is not known
        """
        now = time.monotonic()
        if now < self._next_drawing:
            return
        self._next_drawing = now + (BAR_INTERVAL if self._terminal else LINE_INTERVAL)
        line = text if share is None else f"{draw(share)} {text}"
        if self._terminal:
            self._bar = line[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(_CLEAR + self._bar)
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end_progress(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar = ""
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()

    def _print(self, text: str, stream: TextIO) -> None:
        # Whatever a text is made of, no control sequence reaches a terminal.
        text = _fit(plain(text, lines=True), stream)
        bar = self._bar
        if bar:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()
        print(text, file=stream, flush=True)
        if bar:
            sys.stderr.write(bar)
            sys.stderr.flush()

    @contextmanager
    def showing_log(self, level: int) -> Iterator[None]:
        """Print what the library logs at a level or above to standard error."""
        logger = logging.getLogger("mlproducer")
        handler = _LogHandler(self)
        handler.setLevel(level)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's text, without a traceback."""
        self._console.error(f"{record.levelname.lower()}: {record.getMessage()}")


def plain(text: str, *, lines: bool = False) -> str:
    """Escape what is not printable; with ``lines`` keep line ends and tabs."""
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def _fit(text: str, stream: TextIO) -> str:
    """Escape what the stream's encoding cannot represent."""
    encoding = stream.encoding or "utf-8"  # a StringIO has none
    return text.encode(encoding, "backslashreplace").decode(encoding)


def draw(share: float) -> str:
    """Draw a bar with its percentage."""
    share = min(max(share, 0.0), 1.0)
    full = int(share * BAR_WIDTH)
    return f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] {int(share * 100):3d} %"
