"""A broker and a client with cores of their own, as on two machines.

Elsewhere here both share all cores, so each microsecond of a client is taken from the broker, and
a ratio of rates says what both cost together. Here a node of its own has one half of the cores, and
the clients have the other.

Runs on: the main thread.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager

from benchmarks.harness import BLOCKING, PIPELINED, Match
from benchmarks.lab import C_HEADERS, OURS, Broker, C, Lab
from benchmarks.report import Figure, Report, Target, at_least
from benchmarks.suite.pipelined import rate_ratios, rates
from mlproducer.testing import RabbitMQNode

WORKERS = 32
MANY = (OURS, C, C_HEADERS, "pika select")
WAITING = (OURS, C, C_HEADERS, "kombu", "Celery")


def run(lab: Lab) -> Report:
    """Compare rates of many in flight from one thread, and of 32 threads that wait."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return Report(figures=[], notes=["left out: it takes Linux, and two cores"])
    half = len(cores) // 2
    with ExitStack() as stack:
        with limited_to(cores[:half]):
            node = stack.enter_context(RabbitMQNode())
        stack.enter_context(limited_to(cores[half:]))
        broker = stack.enter_context(closing(Broker("a node with cores of its own", node.url)))
        many = lab.contest(MANY, way=PIPELINED, broker=broker)
        waiting = lab.contest(WAITING, way=BLOCKING, workers=WORKERS, broker=broker)
    targets = {C: at_least(0.75), C_HEADERS: at_least(0.95)}
    figures = _figures("1,000 in flight", many, MANY, targets)
    figures += _figures("32 threads", waiting, WAITING, {C_HEADERS: at_least(0.75)})
    return Report(figures=figures)


@contextmanager
def limited_to(cores: Collection[int]) -> Iterator[None]:
    """Have this process, and those that it starts, run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _figures(
    what: str, match: Match, names: tuple[str, ...], targets: dict[str, Target]
) -> list[Figure]:
    found = [*rate_ratios(match, names, targets), *rates(match, names)]
    return [Figure(f"{what}: {each.name}", each.values, each.unit, each.target) for each in found]
