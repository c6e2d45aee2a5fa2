"""How far it grows: 10,000,000 messages in one call, 1,000 threads, 64 producers, rows into stores.

Not among those that run by default, since it takes a quarter of an hour:
``python -m benchmarks growth`` (with ``--quick`` a minute or two).

One call takes its tasks from a generator. Its memory is to grow by the receipts that it returns,
and by no more in its second half than in its first. Then 1,000 threads against 32, and 64 threads
with a producer each against 64 with one. Then each store takes what is published while there is no
broker.

Runs on: the main thread, and one that empties the queue.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.harness import BLOCKING, Player
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Report, at_least, at_most, ratios
from benchmarks.suite.scaling import bytes_of_a_receipt, emptying
from benchmarks.suite.stores import process
from mlproducer.testing import PostgreSQLServer, RedisServer
from mlproducer.testing.erlang import free_port

MANY, QUICK_MANY = 10_000_000, 100_000
ROWS, QUICK_ROWS = 100_000, 10_000
MEMORY_ROWS = 10_000
"""As many as the memory store takes."""

LIMIT = 7200.0


def run(lab: Lab) -> Report:
    """Let each grow."""
    return Report(figures=[*_one_call(lab), *_threads(lab), *_producers(lab), *_rows(lab)])


def _one_call(lab: Lab) -> list[Figure]:
    count = QUICK_MANY if lab.scale.quick else MANY
    with emptying(lab.broker.purge):
        done = process("stream", count, lab.broker.url, "memory://", LIMIT)
    first, second = done["grown"]
    return [
        Figure(f"{count:,} messages: rate", [count / done["seconds"]], "messages/s"),
        Figure("memory per message, second half / first", [second / first], target=at_most(1.1)),
        Figure("memory per message / a receipt's", [second / bytes_of_a_receipt()]),
    ]


def _threads(lab: Lab) -> list[Figure]:
    with _ours(lab, 1000) as contestant:
        few, many = (Player(f"{n} threads", contestant, BLOCKING, n) for n in (32, 1000))
        match = lab.play([few, many])
    rates = ratios(match.rates(many.label), match.rates(few.label))
    return [Figure("rate, 1,000 / 32 threads", rates)]


def _producers(lab: Lab) -> list[Figure]:
    with _ours(lab, 64) as one, _ours(lab, 64, producers=64) as many:
        players = [Player("one", one, BLOCKING, 64), Player("64", many, BLOCKING, 64)]
        match = lab.play(players)
    return [
        Figure(
            "64 threads, rate, 64 producers / one", ratios(match.rates("64"), match.rates("one"))
        )
    ]


@contextmanager
def _ours(lab: Lab, workers: int, **options: int) -> Iterator[object]:
    contestant = lab.contestant(OURS, workers=workers, **options)
    if contestant is None:
        raise RuntimeError("the library itself is not installed")
    with contestant:
        yield contestant


def _rows(lab: Lab) -> list[Figure]:
    count = QUICK_ROWS if lab.scale.quick else ROWS
    nobody = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        urls = {"memory": "memory://", "SQLite": f"sqlite:///{folder / 'rows.db'}"}
        urls["Redis"] = stack.enter_context(RedisServer()).url
        urls["PostgreSQL"] = stack.enter_context(PostgreSQLServer()).url
        rates = {}
        for name, url in urls.items():
            rows = MEMORY_ROWS if name == "memory" else count
            rates[name] = rows / process("leave", rows, nobody, url)["seconds"]
    return [
        Figure(f"rows a second into {name}", [rate], "rows/s", at_least(10_000))
        for name, rate in rates.items()
    ]
