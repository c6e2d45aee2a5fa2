"""One, two and four connections (``ML_CONNECTIONS``), near the broker and far from it.

First on one node of the same machine, pipelined and with 32 threads. Then on a cluster of three
nodes, each behind a proxy that delivers 20 ms later, in both directions. There no more than window
/ round-trip can be confirmed in a second, the round-trip being the median wait of one thread on the
same way. With the default window of 1,000 that is more than a broker and proxies on a small machine
can carry, so the C client goes the same way, and the lesser of both is what is possible. The same
with a window of 100, where less stands in the way.

Runs on: the main thread, and the proxies' threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from attrs import frozen

from benchmarks.harness import BLOCKING, PIPELINED, Match, Player, play
from benchmarks.lab import OURS, Broker, C, Lab
from benchmarks.report import Figure, Report, at_least, ratios
from mlproducer.testing import Proxy, RabbitMQCluster

CONNECTIONS = (1, 2, 4)
WORKERS = 32
WINDOW, SMALL_WINDOW = 1000, 100
DELAY = 0.02
FAR = f"three nodes, {DELAY * 1e3:g} ms away"
ROUND_TRIP, SMALL, SMALL_C = "round-trip", "small window", "C, small window"


def run(lab: Lab) -> Report:
    """Compare numbers of connections, on one node, then on the cluster unless in a hurry."""
    figures = _near(lab)
    if lab.scale.quick:
        return Report(figures=figures, notes=["the cluster of three nodes is left out of --quick"])
    with _far_cluster() as far:
        return Report(figures=[*figures, *_far(lab, far)])


def _near(lab: Lab) -> list[Figure]:
    figures = []
    with ExitStack() as stack:
        players = _producers(lab, stack, None)
        for way, workers, title in ((PIPELINED, 1, "pipelined"), (BLOCKING, WORKERS, "32 threads")):
            match = lab.play(
                [Player(each.label, each.contestant, way, workers) for each in players]
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


@frozen
class FarCluster:
    """Three nodes, and the proxies before them.

    :ivar broker: a node without the proxy, for emptying the queue
    """

    broker: Broker
    urls: Sequence[str]

    @property
    def url(self) -> str:
        """All of them, as the library takes them."""
        return ",".join(self.urls)


@contextmanager
def _far_cluster() -> Iterator[FarCluster]:
    with ExitStack() as stack:
        cluster = stack.enter_context(RabbitMQCluster(3))
        urls = []
        for node in cluster.nodes:
            proxy = stack.enter_context(Proxy((node.host, node.port)))
            proxy.delay(DELAY)
            urls.append(proxy.url(node.url))
        broker = Broker("three nodes", cluster.nodes[0].url)
        stack.callback(broker.close)
        yield FarCluster(broker, urls)


def _far(lab: Lab, far: FarCluster) -> list[Figure]:
    with ExitStack() as stack:
        players = _far_players(lab, far, stack)
        match = play(
            players,
            rounds=lab.scale.rounds,
            seconds=lab.scale.seconds,
            purge=far.broker.purge,
        )
    return [*_against_the_window(match), *_compared(match, FAR)]


def _against_the_window(match: Match) -> list[Figure]:
    """Compare with what window, round-trip and, where there is one, the C client allow."""
    trips = match.of(ROUND_TRIP, lambda turn: turn.wait("p50"))
    figures = [Figure(f"{FAR}: round-trip", [1e3 * trip for trip in trips], "ms")]
    for window, ours, native in ((SMALL_WINDOW, SMALL, SMALL_C), (WINDOW, _label(1), C)):
        allowed = [window / trip for trip in trips]
        ceiling = match.rates(native) if native in match else allowed
        possible = [min(each) for each in zip(allowed, ceiling, strict=True)]
        where = f"{FAR}, {window:,} in flight"
        figures += [
            Figure(
                f"{where}: rate / possible",
                ratios(match.rates(ours), possible),
                target=at_least(0.8),
            ),
            Figure(f"{where}: rate / (window / round-trip)", ratios(match.rates(ours), allowed)),
            Figure(f"{where}: C's rate / (window / round-trip)", ratios(ceiling, allowed)),
        ]
    return figures


def _far_players(lab: Lab, far: FarCluster, stack: ExitStack) -> list[Player]:
    """Connect the producers, and those beside whom they are measured."""
    players = _producers(lab, stack, far.url)
    players.append(Player(ROUND_TRIP, players[0].contestant, BLOCKING, 1))
    small = lab.contestant(OURS, url=far.url, max_in_flight=SMALL_WINDOW)
    native = lab.contestant(C, url=far.urls[0])
    if small is not None:
        players.append(Player(SMALL, stack.enter_context(small)))
    if native is not None:
        players.append(Player(C, stack.enter_context(native)))
        players.append(Player(SMALL_C, native, BLOCKING, SMALL_WINDOW))
    return players
