"""More messages, more threads: what stays the same and what does not.

One ``publish_many`` over a generator of 1,000,000 tasks (50,000 with ``--quick``) against ones of
10,000, before and after it. Of the long one the median pace from each 10,000th task to the next
counts, since other work on the machine may hold it up for a while. Receipts are held, as a user
would, and the memory that the process has grown by is compared with what as many receipts take by
themselves. So that the queue does not grow with them, and the broker's work with it, it is emptied
every second meanwhile, by a connection of the harness: a purge is one command for the broker, while
a consumer would cost it as much again as the publishing.

Then 200 threads in blocking ``publish()`` against 32. By Little's law the mean wait of n threads
is n / rate; the 99th percentile is compared with that.

Runs on: the main thread, and one that empties the queue.
"""

from __future__ import annotations

import statistics
import sys
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.contestants.work import STRIDE
from benchmarks.harness import BLOCKING, PIPELINED, Contestant, Player, Turn
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Plot, Report, Series, at_least, at_most, ratios
from mlproducer import Receipt

FEW = 10_000
ID = sys.getsizeof(str(uuid.UUID(int=0)))
MANY, QUICK_MANY = 1_000_000, 50_000
PURGE_INTERVAL = 1.0
JOIN_LIMIT = 30.0


def run(lab: Lab) -> Report:
    """Compare lengths, then numbers of threads."""
    contestant = lab.contestant(OURS, workers=200)
    if contestant is None:
        raise RuntimeError("the library itself is not installed")
    with contestant:
        figures, plot = _lengths(lab, contestant)
        return Report(figures=[*figures, *_threads(lab, contestant)], plots=[plot])


def _lengths(lab: Lab, contestant: Contestant) -> tuple[list[Figure], Plot]:
    many = QUICK_MANY if lab.scale.quick else MANY

    def publish(count: int) -> Turn:
        lab.broker.purge()
        return Player(OURS, contestant, PIPELINED).play(count)

    publish(FEW)
    short = [publish(FEW) for _ in range(lab.scale.rounds)]
    with emptying(lab.broker.purge):
        long = Player(OURS, contestant, PIPELINED).play(many)
    short += [publish(FEW) for _ in range(lab.scale.rounds)]
    receipt = bytes_of_a_receipt()
    paces = long.paces()
    tenth = max(1, len(paces) // 10)
    start, end = statistics.median(paces[:tenth]), statistics.median(paces[-tenth:])
    pace = statistics.median(paces)
    figures = [
        Figure(
            f"rate, {many:,} / {FEW:,} messages",
            [pace / each.rate for each in short],
            target=at_least(0.9),
        ),
        Figure("pace, last tenth / first tenth", [end / start]),
        Figure("memory per message / a receipt's", [long.growth / receipt], target=at_most(1.2)),
        Figure("memory per message", [long.growth], "bytes"),
        Figure("a receipt", [receipt], "bytes"),
        Figure("a receipt over its id", [receipt - ID], "bytes", at_most(200)),
        Figure(f"pace, {many:,} messages", paces, "messages/s"),
        Figure(f"rate, {FEW:,} messages", [each.rate for each in short], "messages/s"),
    ]
    numbers = [STRIDE * number for number in range(1, len(paces) + 1)]
    curve = Series("publish_many", numbers, paces)
    return figures, Plot("scaling_pace", "Pace of one call", "messages", "messages/s", [curve])


def _threads(lab: Lab, contestant: Contestant) -> list[Figure]:
    few, many = (Player(f"{n} threads", contestant, BLOCKING, n) for n in (32, 200))
    match = lab.play([few, many])
    rates = match.rates(many.label)
    p99 = match.of(many.label, lambda turn: turn.wait("p99"))
    implied = [many.workers / rate for rate in rates]
    return [
        Figure(
            "rate, 200 / 32 threads", ratios(rates, match.rates(few.label)), target=at_least(1.0)
        ),
        Figure("200 threads, p99 / implied mean wait", ratios(p99, implied), target=at_most(2.0)),
        Figure("200 threads, p99", [1e3 * wait for wait in p99], "ms"),
        Figure("200 threads, rate", rates, "messages/s"),
        Figure("32 threads, rate", match.rates(few.label), "messages/s"),
    ]


@contextmanager
def emptying(purge: Callable[[], None]) -> Iterator[None]:
    """Empty the queue every second."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(PURGE_INTERVAL):
            purge()

    thread = threading.Thread(target=work, name="benchmark-purge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(JOIN_LIMIT)


def bytes_of_a_receipt() -> float:
    """Weigh receipts with ids of their own, in a list."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        receipts = [Receipt(str(uuid.uuid4()), 1, number / 7) for number in range(FEW)]
        after, _ = tracemalloc.get_traced_memory()
        return (after - before) / len(receipts)
    finally:
        tracemalloc.stop()
