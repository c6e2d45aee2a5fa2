"""Counts of one process, to which any thread may add at any time, without a lock.

Publishers, the I/O thread and scrapes would share such a lock, and a forked child, or a signal
handler that publishes, could find it held for ever. So each thread adds to cells of its own, and a
reader adds them up. A thread's cells outlive it, and are used by the next thread with its id.
Greenlets share those of their thread: gevent's have so many ids that cells would pile up, and none
gives way to another amid a count.

Runs on: any thread.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mlproducer.observe.metric_families import FAMILIES, Family, Kind

Labels = tuple[str, ...]


def _of_threads() -> Any:
    """Return the function that gives a thread's id, also where gevent has patched it."""
    monkey = sys.modules.get("gevent.monkey")
    return threading.get_ident if monkey is None else monkey.get_original("_thread", "get_ident")


get_ident = _of_threads()


class Series(Protocol):
    """One series of a counter or histogram; to be kept where it is used often."""

    def inc(self, amount: int = 1) -> None:
        """Add to a counter."""

    def observe(self, amount: float) -> None:
        """Add a value to a histogram."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Add values to a histogram."""


class Counts(Protocol):
    """A set of counters and histograms."""

    def series(self, family: Family, labels: Labels = ()) -> Series:
        """Return the series with these labels, the same one each time."""


class Cells:
    """A series in plain memory.

    A counter has one cell; a histogram has one for each bucket, one for values beyond them, and at
    the end the sum.
    """

    __slots__ = ("_bounds", "_of", "_width")

    def __init__(self, family: Family) -> None:
        self._bounds = family.buckets
        self._width = len(family.buckets) + 2 if family.kind is Kind.HISTOGRAM else 1
        self._of: dict[int, list[float]] = {}

    def inc(self, amount: int = 1) -> None:
        """Add to a counter."""
        try:
            cells = self._of[get_ident()]
        except KeyError:
            cells = self._first()
        # Without a call in it, this statement is not interrupted by a signal handler or finalizer,
        # and no other thread writes to this thread's cells.
        cells[0] += amount

    def observe(self, amount: float) -> None:
        """Add a value to a histogram."""
        try:
            cells = self._of[get_ident()]
        except KeyError:
            cells = self._first()
        cells[bisect_left(self._bounds, amount)] += 1
        cells[-1] += amount

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Add values to a histogram."""
        if not amounts:
            return
        self.observe(amounts[0])  # makes this thread's cells, if need be
        cells, bounds = self._of[get_ident()], self._bounds
        for amount in amounts[1:]:
            cells[bisect_left(bounds, amount)] += 1
            cells[-1] += amount

    def _first(self) -> list[float]:
        """Return this thread's cells; a finalizer may have made them since they were missed."""
        return self._of.setdefault(get_ident(), [0.0] * self._width)

    def total(self) -> list[float]:
        """Return the sum over all threads."""
        total = [0.0] * self._width
        # copy() is one step under the GIL; a loop over the dict itself would fail where a thread
        # adds its cells meanwhile.
        for cells in self._of.copy().values():
            total = [a + b for a, b in zip(total, cells, strict=True)]
        return total


class Tally:
    """Counters and histograms in plain memory."""

    def __init__(self) -> None:
        self._series: dict[tuple[Family, Labels], Cells] = {}
        self.clear()

    def series(self, family: Family, labels: Labels = ()) -> Cells:
        """Return the series with these labels, the same one each time."""
        found = self._series.get((family, labels))
        return found or self._series.setdefault((family, labels), Cells(family))

    def totals(self) -> Mapping[Family, Mapping[Labels, list[float]]]:
        """Return the sum of each series, for every family that is counted."""
        totals: dict[Family, dict[Labels, list[float]]] = {
            family: {} for family in FAMILIES if family.kind is not Kind.GAUGE
        }
        for (family, labels), cells in self._series.copy().items():
            totals[family][labels] = cells.total()
        return totals

    def clear(self) -> None:
        """Start from zero, in a forked child, whose parent continues counting."""
        self._series = {
            (family, ()): Cells(family)
            for family in FAMILIES
            if family.kind is not Kind.GAUGE and not family.labels
        }
