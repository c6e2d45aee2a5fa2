"""32 threads, each waiting for every confirm.

Blocking ``publish()`` from 32 threads, against a C client with a window of 32, without headers and
with ours, and against the Python clients with 32 threads or, for aio-pika, 32 coroutines.

Runs on: the main thread.
"""

from __future__ import annotations

from benchmarks.harness import BLOCKING, Match
from benchmarks.lab import C_HEADERS, OURS, C, Lab
from benchmarks.report import Figure, Report, at_least, ratios
from benchmarks.suite.pipelined import rate_ratios, rates

WORKERS = 32
PEERS = ("pika", "kombu", "aio-pika", "AMQPStorm", "Celery")
NAMES = (OURS, C, C_HEADERS, *PEERS)


def run(lab: Lab) -> Report:
    """Compare rates."""
    match = lab.contest(NAMES, way=BLOCKING, workers=WORKERS)
    targets = {C_HEADERS: at_least(0.75), "Celery": at_least(5.0)}
    figures = [
        *rate_ratios(match, NAMES, targets),
        *_best_peer(match),
        *rates(match, NAMES),
    ]
    return Report(figures=figures)


def _best_peer(match: Match) -> list[Figure]:
    """Take in each round the best of the Python clients."""
    peers = [match.rates(name) for name in PEERS if name in match]
    if not peers:
        return []
    best = [max(each) for each in zip(*peers, strict=True)]
    name = f"rate, {OURS} / best Python client"
    return [Figure(name, ratios(match.rates(OURS), best), target=at_least(1.6))]
