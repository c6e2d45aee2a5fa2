"""A guard for continuous integration: what a message costs, in units that do not drift.

The stages of a message are timed against a yardstick of plain Python in the same process, by turns,
and the quickest of many turns of each counts: noise only ever adds. That is rough, and its limit is
wide. The calls that a message makes are counted, which gives the same number every time, on every
machine and nearly every version of Python; their limit is narrow.

Runs on: the main thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from types import FrameType

from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most
from benchmarks.way import BURST, Way

MAX_RATIO = 10.0
"""Cost of a message, in yardsticks."""

MAX_CALLS = 84.0
"""Calls of Python and of C functions for a message."""

REPEATS = 500


def run(_lab: Lab) -> Report:
    """Measure both."""
    with closing(Way()) as way:
        ratio, calls = cost(way), calls_per_message(way)
    figures = [
        Figure("cost of a message / yardstick", [ratio], target=at_most(MAX_RATIO)),
        Figure("calls", [calls], "calls/message", at_most(MAX_CALLS)),
    ]
    return Report(figures=figures)


def cost(way: Way) -> float:
    """Give what a message costs in yardsticks, each at its quickest."""
    turns = [(_time(lambda: _burst(way)), _time(_yardsticks)) for _ in range(REPEATS)]
    ours, yardstick = (min(each) for each in zip(*turns, strict=True))
    return ours / yardstick


def calls_per_message(way: Way) -> float:
    """Count the calls of one burst; of a few the least, since what the collector calls adds."""
    _burst(way)
    return min(_count(lambda: _burst(way)) for _ in range(5)) / BURST


def _count(work: Callable[[], None]) -> int:
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def _burst(way: Way) -> None:
    for _, step in way.steps():
        step()


def _time(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class _Piece:
    __slots__ = ("name", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def shown(self) -> str:
        return f"{self.name}:{self.size}"


def _yardsticks() -> None:
    for number in range(BURST):
        _yardstick(number)


def _yardstick(number: int) -> None:
    """Make objects, look things up, join: what such a library does all day."""
    pieces = [_Piece(name, number) for name in ("a", "b", "c", "d", "e", "f", "g", "h")]
    table = {piece.name: piece for piece in pieces}
    ",".join([table[piece.name].shown() for piece in pieces]).encode()
