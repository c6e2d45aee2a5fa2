"""10,000 producers lose their broker at once: how they come back (a simulation).

Under the documented backoff (0.5 s, doubling, up to 32 s, and up to 30 % on top), without jitter,
and with other jitters. The peak is the most connection attempts that a broker which takes them all
sees in any second from its return; how long it takes until 99 % are back is told for that broker,
and for one that takes 1,000 connections a second and refuses the rest. With an outage of 0 s the
connections are lost and the broker is there.

Runs on: the main thread.
"""

from __future__ import annotations

from benchmarks.lab import Lab
from benchmarks.report import Figure, Plot, Report, Series
from benchmarks.storm import STRATEGIES, TICKS, Scenario, Storm, simulate

OUTAGES = (0.0, 5.0, 60.0)
CAPACITY = 1000
MOST = 0.99


def run(lab: Lab) -> Report:
    """Play every strategy through every scenario, with several seeds."""
    seeds = range(1 if lab.scale.quick else 3)
    figures: list[Figure] = []
    plots: list[Plot] = []
    for outage in OUTAGES:
        free = _play(Scenario(outage=outage), seeds)
        limited = _play(Scenario(outage=outage, capacity=CAPACITY), seeds)
        figures += _figures(outage, free, limited)
        plots += [_plot(free), _plot(limited)]
    return Report(figures=figures, plots=plots)


def _play(scenario: Scenario, seeds: range) -> dict[str, list[Storm]]:
    return {
        name: [simulate(scenario, delay, seed) for seed in seeds]
        for name, delay in STRATEGIES.items()
    }


def _figures(
    outage: float, free: dict[str, list[Storm]], limited: dict[str, list[Storm]]
) -> list[Figure]:
    figures = []
    for name in STRATEGIES:
        peaks = [storm.peak for storm in free[name]]
        label = f"{outage:g} s outage, {name}"
        figures.append(Figure(f"{label}: peak", peaks, "connects/s"))
        for storms, limit in ((free, ""), (limited, f" at {CAPACITY:,}/s")):
            waits = [storm.back_within(MOST) for storm in storms[name]]
            figures.append(Figure(f"{label}: {MOST:.0%} back{limit}", waits, "s"))
    return figures


def _plot(storms: dict[str, list[Storm]]) -> Plot:
    scenario = next(iter(storms.values()))[0].scenario
    limit = "" if scenario.capacity is None else f"_{scenario.capacity}"
    taken = "" if scenario.capacity is None else f", takes {scenario.capacity:,} a second"
    return Plot(
        f"storm_{scenario.outage:g}s{limit}",
        f"{scenario.producers:,} producers lose their broker, which is down for "
        f"{scenario.outage:g} s{taken}",
        "seconds",
        "connection attempts in the last second",
        [_series(name, each[0].per_second()) for name, each in storms.items()],
    )


def _series(name: str, counts: list[int]) -> Series:
    return Series(name, [end / TICKS for end in range(1, len(counts) + 1)], counts)
