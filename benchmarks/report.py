"""What a benchmark found: figures with one value per round, against a target where there is one.

A figure is a ratio wherever two things can be compared, so that it means the same on any machine.
Tables are simple tables of reStructuredText, ready for the README.

Runs on: the main thread; everything here is frozen.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import field, frozen

RATIO = "x"


@frozen
class Target:
    """What the median of a figure has to reach."""

    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def at_least(bound: float) -> Target:
    """Give the target that more is better than."""
    return Target(bound, at_least=True)


def at_most(bound: float) -> Target:
    """Give the target that less is better than."""
    return Target(bound, at_least=False)


@frozen
class Figure:
    """One line of a table.

    :ivar values: one for each round
    :ivar unit: ``x`` for a ratio
    """

    name: str
    values: Sequence[float]
    unit: str = RATIO
    target: Target | None = None

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """Whether the target is reached; nothing where there is none."""
        if self.target is None:
            return ""
        return "met" if self.target.met(self.median) else "missed"

    def to_json(self) -> dict[str, Any]:
        """Give all that is known."""
        return {
            "name": self.name,
            "unit": self.unit,
            "values": list(self.values),
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "target": str(self.target or ""),
            "verdict": self.verdict,
        }

    def row(self) -> tuple[str, ...]:
        """Give the cells of its line."""
        extremes = min(self.values), self.median, max(self.values)
        target = f"{self.target} {self.verdict}" if self.target else ""
        return (self.name, *map(shown, extremes), self.unit, target)


@frozen
class Series:
    """A curve for a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@frozen
class Plot:
    """A chart of curves.

    :ivar name: of the file, without ``.png``
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


@frozen(kw_only=True)
class Report:
    """What one benchmark gives back."""

    figures: Sequence[Figure]
    notes: Sequence[str] = ()
    plots: Sequence[Plot] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Give figures and notes; curves are for the charts."""
        return {
            "figures": [figure.to_json() for figure in self.figures],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Give the table, and the notes under it."""
        head = ("", "min", "median", "max", "", "target")
        lines = [simple_table(head, [figure.row() for figure in self.figures])]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def simple_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a simple table; the first column is text, the others stand to the right."""
    cells = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = "  ".join("=" * max(width, 2) for width in widths)
    lines = []
    for row in cells:
        padded = [row[0].ljust(max(widths[0], 2))]
        padded += [
            text.rjust(max(width, 2)) for text, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def shown(value: float) -> str:
    """Show three digits or all that stand before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [first / second for first, second in zip(above, below, strict=True)]
