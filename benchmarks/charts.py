"""Draws what was measured, as PNG, where matplotlib is installed.

Runs on: the main thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import RATIO, Plot, Report

try:
    from matplotlib.figure import Figure as Canvas
except ImportError:
    Canvas = None


def draw(reports: dict[str, Report], directory: Path) -> list[Path]:
    """Draw the ratios of each benchmark, and the curves that it gave; nothing without matplotlib.

    :returns: the files
    """
    if Canvas is None:
        return []
    files = []
    for name, report in reports.items():
        if any(figure.unit == RATIO for figure in report.figures):
            files.append(_ratios(name, report, directory / f"{name}.png"))
        files += [_curves(plot, directory / f"{plot.name}.png") for plot in report.plots]
    return files


def _ratios(name: str, report: Report, path: Path) -> Path:
    """Draw a bar for each median, with its extremes, and a mark for its target."""
    figures = [figure for figure in report.figures if figure.unit == RATIO][::-1]
    canvas = Canvas(figsize=(8, 1.2 + 0.45 * len(figures)), layout="constrained")
    axes = canvas.subplots()
    medians = [figure.median for figure in figures]
    below = [figure.median - min(figure.values) for figure in figures]
    above = [max(figure.values) - figure.median for figure in figures]
    axes.barh([figure.name for figure in figures], medians, xerr=[below, above], color="#4878a8")
    for row, figure in enumerate(figures):
        if figure.target is not None:
            axes.plot([figure.target.bound] * 2, [row - 0.4, row + 0.4], color="#c03028")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    if max(medians) > 20 * min(medians):
        axes.set_xscale("log", subs=(2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"{name}: ratios; lines are extremes, red marks targets")
    return _save(canvas, path)


def _curves(plot: Plot, path: Path) -> Path:
    canvas = Canvas(figsize=(9, 5), layout="constrained")
    axes = canvas.subplots()
    for series in plot.series:
        axes.plot(series.x, series.y, label=series.name, linewidth=1.2)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.legend()
    return _save(canvas, path)


def _save(canvas: Any, path: Path) -> Path:
    canvas.savefig(path, dpi=110)
    return path
