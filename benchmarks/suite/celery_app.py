"""A Celery application, before and after ``install``: what a call takes.

``delay()`` by one thread, and by 32. Stock Celery, the same with ``confirm_publish``, and through a
producer. The first waits for nothing, and so is no measure for what waits: the second is.

Runs on: the main thread.
"""

from __future__ import annotations

from benchmarks.harness import BLOCKING
from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_least, at_most, ratios

INSTALLED, CONFIRMED, STOCK = "Celery, installed", "Celery", "Celery, unconfirmed"
NAMES = (INSTALLED, CONFIRMED, STOCK)
WORKERS = 32


def run(lab: Lab) -> Report:
    """Compare the median wait of one thread, and the rates of 32."""
    alone = lab.contest(NAMES, way=BLOCKING, delay=True)
    together = lab.contest(NAMES, way=BLOCKING, workers=WORKERS, delay=True)
    p50 = {name: alone.of(name, lambda turn: turn.wait("p50") * 1e6) for name in NAMES}
    rate = {name: together.rates(name) for name in NAMES}
    figures = [
        Figure(
            f"p50 of 1 thread, {INSTALLED} / {CONFIRMED}",
            ratios(p50[INSTALLED], p50[CONFIRMED]),
            target=at_most(0.8),
        ),
        Figure(
            f"rate of 32, {INSTALLED} / {CONFIRMED}",
            ratios(rate[INSTALLED], rate[CONFIRMED]),
            target=at_least(2.5),
        ),
        *(Figure(f"p50 of 1 thread, {name}", p50[name], "us") for name in NAMES),
        *(Figure(f"rate of 32, {name}", rate[name], "messages/s") for name in NAMES),
    ]
    return Report(figures=figures)
