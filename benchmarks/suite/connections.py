"""One, two and four connections (``ML_CONNECTIONS``), near the broker and far from it.

First on one node of the same machine, pipelined and with 32 threads. Then far away: behind proxies
that deliver 20 ms later, in both directions, one before that node, and one before each of a cluster
of three. There window / round-trip messages a second are possible, the round-trip being the median
wait of one thread on the same way. With a window of 1,000 that is more than brokers on a small
machine may carry, so the C client goes the same way, and for the cluster a window of 100 stands
beside it. Those with a window are connected to the node that leads the queue; those that are
compared by their connections choose their nodes at random, as producers do.

Runs on: the main thread, and the proxies' threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pika

from benchmarks.harness import BLOCKING, PIPELINED, Match, Player
from benchmarks.lab import C_HEADERS, OURS, Broker, C, Lab
from benchmarks.report import Figure, Report, at_least, ratios
from mlproducer.testing import Proxy, RabbitMQCluster

CONNECTIONS = (1, 2, 4)
WORKERS = 32
WINDOW, SMALL_WINDOW = 1000, 100
DELAY = 0.02
ROUND_TRIP = "round-trip"
ROUNDS = 3
"""Fewer than elsewhere, since a turn of each takes longest here."""


def run(lab: Lab) -> Report:
    """Compare numbers of connections on one node; then, unless in a hurry, what is far away."""
    figures = _near(lab)
    if lab.scale.quick:
        return Report(figures=figures, notes=["what is far away is left out of --quick"])
    figures += _far_node(lab)
    with RabbitMQCluster(3) as cluster:
        figures += _far_cluster(lab, cluster)
    return Report(figures=figures)


def _near(lab: Lab) -> list[Figure]:
    figures = []
    with ExitStack() as stack:
        players = _producers(lab, stack, None)
        for way, workers, title in ((PIPELINED, 1, "pipelined"), (BLOCKING, WORKERS, "32 threads")):
            match = lab.play(
                [Player(each.label, each.contestant, way, workers) for each in players], ROUNDS
            )
            figures += _compared(match, f"one node, {title}")
    return figures


def _producers(lab: Lab, stack: ExitStack, url: str | None) -> list[Player]:
    """Connect a producer for each number of connections."""
    players = []
    for number in CONNECTIONS:
        contestant = lab.contestant(OURS, url=url, connections=number)
        if contestant is not None:
            players.append(Player(_label(number), stack.enter_context(contestant)))
    return players


def _label(number: int) -> str:
    return f"{number} connection{'s' if number > 1 else ''}"


def _compared(match: Match, where: str) -> list[Figure]:
    one = match.rates(_label(1))
    return [
        *(
            Figure(f"{where}: rate, {number} / 1 connections", ratios(match.rates(label), one))
            for number in CONNECTIONS[1:]
            if (label := _label(number)) in match
        ),
        Figure(f"{where}: rate, 1 connection", one, "messages/s"),
    ]


def _far_node(lab: Lab) -> list[Figure]:
    with ExitStack() as stack:
        url = _delayed(lab.broker.url, stack)
        match = lab.play(_windowed(lab, url, [WINDOW], stack), ROUNDS)
    return _against_the_window(match, [WINDOW], "far node")


def _far_cluster(lab: Lab, cluster: RabbitMQCluster) -> list[Figure]:
    where, windows = "far cluster", [SMALL_WINDOW, WINDOW]
    with ExitStack() as stack:
        leader = Broker("three nodes", cluster.nodes[0].url)
        stack.callback(leader.close)
        urls = [_delayed(node.url, stack) for node in cluster.nodes]
        players = _windowed(lab, urls[0], windows, stack)
        players += _producers(lab, stack, ",".join(urls))
        match = lab.play(players, ROUNDS, broker=leader)
    return [*_against_the_window(match, windows, where), *_compared(match, where)]


def _delayed(url: str, stack: ExitStack) -> str:
    """Put a proxy before a node."""
    node = pika.URLParameters(url)
    proxy = stack.enter_context(Proxy((node.host, node.port)))
    proxy.delay(DELAY)
    return proxy.url(url)


def _windowed(lab: Lab, url: str, windows: Sequence[int], stack: ExitStack) -> list[Player]:
    """Connect what publishes with each window, and one thread for the round-trip."""
    players = []
    for window in windows:
        ours = lab.contestant(OURS, url=url, max_in_flight=window)
        if ours is not None:
            players.append(Player(_within(OURS, window), stack.enter_context(ours)))
    players.append(Player(ROUND_TRIP, players[0].contestant, BLOCKING, 1))
    for name in (C, C_HEADERS):
        native = lab.contestant(name, url=url)
        if native is not None:
            stack.enter_context(native)
            players += [
                Player(_within(name, window), native, BLOCKING, window) for window in windows
            ]
    return players


def _within(name: str, window: int) -> str:
    return f"{name}, {window:,} in flight"


def _against_the_window(match: Match, windows: Sequence[int], where: str) -> list[Figure]:
    """Compare with what is possible."""
    trips = match.of(ROUND_TRIP, lambda turn: turn.wait("p50"))
    figures = [Figure(f"{where}: round-trip", [1e3 * trip for trip in trips], "ms")]
    for window in windows:
        possible = [window / trip for trip in trips]
        figures += [
            Figure(
                f"{where}: {label} / possible",
                ratios(match.rates(label), possible),
                target=at_least(0.8) if name == OURS else None,
            )
            for name in (OURS, C, C_HEADERS)
            if (label := _within(name, window)) in match
        ]
    return figures
