"""A guard for continuous integration: what a message costs, in units that do not drift.

The calls that a message makes, and the interpreter's instructions that it takes, are counted: the
same number every time, on every machine, however busy it is. Versions of Python differ in their
instructions, so that limit is the one of the version that takes most.

Runs on: the main thread.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Any

from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most
from benchmarks.way import BURST, Way

MAX_CALLS = 84.0
"""Calls of Python and of C functions for a message."""

MAX_INSTRUCTIONS = 1350.0
"""Instructions of the interpreter for a message: 1,308 with CPython 3.11, 1,338 with orjson."""


def run(_lab: Lab) -> Report:
    """Count both."""
    with closing(Way()) as way:
        calls, instructions = calls_per_message(way), instructions_per_message(way)
    figures = [
        Figure("calls", [calls], "calls/message", at_most(MAX_CALLS)),
        Figure("instructions", [instructions], "instructions/message", at_most(MAX_INSTRUCTIONS)),
    ]
    return Report(figures=figures)


def calls_per_message(way: Way) -> float:
    """Count the calls of one burst; of a few the least, since what the collector calls adds."""
    return _least(way, _calls)


def instructions_per_message(way: Way) -> float:
    """Count the interpreter's instructions of one burst, likewise."""
    return _least(way, _instructions)


def _least(way: Way, count: Callable[[Callable[[], None]], int]) -> float:
    _burst(way)
    return min(count(lambda: _burst(way)) for _ in range(5)) / BURST


def _burst(way: Way) -> None:
    for _, step in way.steps():
        step()


def _calls(work: Callable[[], None]) -> int:
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def _instructions(work: Callable[[], None]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        if event == "call":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    frame = inspect.currentframe()
    if frame is not None:
        frame.f_trace_opcodes = True  # before the tracing begins, or Python 3.12 counts none
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
