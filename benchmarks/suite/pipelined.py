"""Many messages from one thread, 1,000 in flight.

``publish_many`` over full tasks, against a C client that publishes raw bodies, and against what
else can keep many messages in flight: aio-pika, and pika's ``SelectConnection``. The broker decodes
the headers of each message, so the C client goes a second time with ours: the ceiling for all who
publishes Celery tasks.

Runs on: the main thread.
"""

from __future__ import annotations

from benchmarks.harness import PIPELINED, Match, Turn
from benchmarks.lab import C_HEADERS, OURS, C, Lab
from benchmarks.report import Figure, Report, Target, at_least, at_most, ratios

NAMES = (OURS, C, C_HEADERS, "aio-pika", "pika select")


def run(lab: Lab) -> Report:
    """Compare rates, and the processor time of the clients' own processes."""
    match = lab.contest(NAMES, way=PIPELINED)
    figures = [
        *rate_ratios(match, NAMES, {C: at_least(0.75), C_HEADERS: at_least(0.95)}),
        *_cost_of_headers(match),
        *_cpu_ratios(match),
        *rates(match, NAMES),
        *(
            Figure(f"CPU of {name}", match.of(name, lambda turn: turn.cpu), "us/message")
            for name in NAMES
            if name in match
        ),
        *_our_threads(match),
    ]
    return Report(figures=figures)


def rate_ratios(match: Match, names: tuple[str, ...], targets: dict[str, Target]) -> list[Figure]:
    """Give our rate over that of each other."""
    ours = match.rates(OURS)
    return [
        Figure(f"rate, {OURS} / {name}", ratios(ours, match.rates(name)), target=targets.get(name))
        for name in names
        if name != OURS and name in match
    ]


def rates(match: Match, names: tuple[str, ...]) -> list[Figure]:
    """Give the rates themselves."""
    return [
        Figure(f"rate of {name}", match.rates(name), "messages/s")
        for name in names
        if name in match
    ]


def _cost_of_headers(match: Match) -> list[Figure]:
    if C not in match:
        return []
    return [Figure(f"rate, {C_HEADERS} / {C}", ratios(match.rates(C_HEADERS), match.rates(C)))]


def _cpu_ratios(match: Match) -> list[Figure]:
    if "aio-pika" not in match:
        return []
    ours, theirs = (match.of(name, lambda turn: turn.cpu) for name in (OURS, "aio-pika"))
    return [Figure(f"CPU, {OURS} / aio-pika", ratios(ours, theirs), target=at_most(0.2))]


def _our_threads(match: Match) -> list[Figure]:
    def publisher(turn: Turn) -> float:
        return turn.thread_cpu("MainThread")

    def io(turn: Turn) -> float:
        return turn.thread_cpu("mlproducer-io")

    return [
        Figure("CPU of the publisher's thread", match.of(OURS, publisher), "us/message"),
        Figure("CPU of the I/O thread", match.of(OURS, io), "us/message"),
    ]
