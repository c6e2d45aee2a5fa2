"""What the commands print: sentences, tables and a progress bar for people, JSON for programs.

Standard output carries the result, and for programs nothing else; complaints and progress go to
standard error. Nothing is known here of brokers or messages.

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
from typing import TextIO

BAR_WIDTH = 24
BAR_INTERVAL = 0.1
LINE_INTERVAL = 5.0
"""Seconds between two redrawings of the bar on a terminal, or two lines in a file."""

_CLEAR = "\r\x1b[K"


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: what was begun is cleared away, as after Ctrl-C."""


class UsageError(Exception):
    """What is asked for cannot be done in this way; the text says in which it can."""


class Console:
    """Where one command prints.

    :param as_json: the reader of standard output is a program
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._terminal = sys.stderr.isatty()
        self._next_drawing = 0.0 if self._terminal else time.monotonic() + LINE_INTERVAL
        self._bar = ""
        self.terminated = False
        self._defers = False

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Have SIGTERM raise `Terminated`, once; Python itself would end without clearing away."""

        def on_sigterm(_number: int, _frame: object) -> None:
            if not self.terminated:
                self.terminated = True
                if not self._defers:
                    raise Terminated

        try:
            before = signal.signal(signal.SIGTERM, on_sigterm)
        except ValueError:  # not on the main thread, where nobody sends us a signal
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferring_sigterm(self) -> Iterator[None]:
        """Only note SIGTERM, in `terminated`, but within `interruptible`."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let SIGTERM raise `Terminated` here: something is waited for."""
        defers, self._defers = self._defers, False
        try:
            if self.terminated and defers:
                raise Terminated
            yield
        finally:
            self._defers = defers

    def say(self, text: str = "") -> None:
        """Tell people how it goes, or how it went."""
        self._print(text, sys.stderr if self._as_json else sys.stdout)

    def complain(self, text: str) -> None:
        """Tell people what went wrong."""
        with suppress(OSError):  # there is nobody else to tell
            self._print(f"mlproducer: {text}", sys.stderr)

    def detail(self, text: str) -> None:
        """Tell people what programs are told by `emit`."""
        if not self._as_json:
            self.say(text)

    def emit(self, value: object) -> None:
        """Tell a program, in one line; people are told otherwise."""
        if self._as_json:
            sys.stdout.write(f"{json.dumps(value)}\n")

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Show names and values to people, in two columns."""
        rows = list(rows)
        names, values = (max(map(len, column)) for column in zip(*rows, strict=True))
        for name, value in rows:
            self.detail(f"  {name:<{names}}  {value:>{values}}")

    def progress(self, share: float | None, text: str) -> None:
        """Show how far it is: a bar on a terminal, in a file a line now and then.

        :param share: from 0 to 1; ``None`` where the end is not known
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
        # Whatever a text was made of: nothing that a terminal would obey gets out here.
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
        """Print what the library logs, from a level on, as complaints."""
        logger = logging.getLogger("mlproducer")
        handler = _Complaints(self)
        handler.setLevel(level)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Complaints(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's text, without a traceback."""
        self._console.complain(f"{record.levelname.lower()}: {record.getMessage()}")


def plain(text: str, *, lines: bool = False) -> str:
    """Escape what could play tricks on a terminal; line ends and tabs stay where ``lines`` is."""
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def _fit(text: str, stream: TextIO) -> str:
    """Escape what the stream's encoding, a terminal's or a pipe's, does not have."""
    encoding = stream.encoding or "utf-8"  # a StringIO has none
    return text.encode(encoding, "backslashreplace").decode(encoding)


def draw(share: float) -> str:
    """Draw a bar with its percentage."""
    share = min(max(share, 0.0), 1.0)
    full = int(share * BAR_WIDTH)
    return f"[{'#' * full}{'.' * (BAR_WIDTH - full)}] {int(share * 100):3d} %"
