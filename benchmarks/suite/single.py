"""One thread that waits for every confirm: how long a publish takes.

The library hands each message over to its I/O thread and back; pika's ``BlockingConnection`` does
everything on the caller's thread.

Runs on: the main thread.
"""

from __future__ import annotations

from benchmarks.harness import BLOCKING
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Report, at_most, ratios

NAMES = (OURS, "pika")


def run(lab: Lab) -> Report:
    """Compare medians of the waits."""
    match = lab.contest(NAMES, way=BLOCKING)
    p50 = {name: match.of(name, lambda turn: turn.wait("p50") * 1e6) for name in NAMES}
    p99 = {name: match.of(name, lambda turn: turn.wait("p99") * 1e6) for name in NAMES}
    figures = [
        Figure(f"p50, {OURS} / pika", ratios(p50[OURS], p50["pika"]), target=at_most(1.0)),
        Figure(f"p99, {OURS} / pika", ratios(p99[OURS], p99["pika"])),
        *(Figure(f"p50 of {name}", p50[name], "us") for name in NAMES),
        *(Figure(f"p99 of {name}", p99[name], "us") for name in NAMES),
    ]
    return Report(figures=figures)
