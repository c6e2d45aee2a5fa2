"""What an outbox costs: a COMMIT with one, from COMMIT to confirm, a backlog relayed, the table.

PostgreSQL is private, with fsync, and shares the machine with the broker. Transactions insert one
row, with and without a task of 1 kB beside it, in turns. A process drains a backlog as a relay
does, in turns with `publish_many`. Rows that go through the table leave it as small as it was.

Runs on: the main thread, and threads that commit.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import psycopg

from benchmarks.contestants.work import TEXT
from benchmarks.harness import PIPELINED, Player
from benchmarks.lab import OURS, Lab
from benchmarks.report import Figure, Report, at_least, ratios
from benchmarks.suite.stores import drained
from mlproducer import MLProducer, Settings, SummarizationTask, outbox
from mlproducer.stores.postgres import PostgreSQLStore
from mlproducer.testing import PostgreSQLServer

BACKLOG, QUICK_BACKLOG = 100_000, 10_000
THROUGH, QUICK_THROUGH = 100_000, 10_000
BATCH = 5_000
THREADS = (1, 8, 32)
WAITS = 200
LIMIT = 60.0

SERVER = {"fsync": "on", "shared_buffers": "128MB", "max_wal_size": "4GB"}


def run(lab: Lab) -> Report:
    """Measure each."""
    with PostgreSQLServer(config=SERVER) as server:
        server.call("CREATE TABLE orders (id bigint)", user="app")
        with closing(PostgreSQLStore(server.url)) as store:
            store.create()
        return Report(
            figures=[
                *_commits(lab, server),
                *_waits(lab, server),
                *_relayed(lab, server),
                *_size(lab, server),
            ]
        )


# --- COMMIT --------------------------------------------------------------------------------------


def _commits(lab: Lab, server: PostgreSQLServer) -> Iterator[Figure]:
    """Compare transactions with and without a task, of 1, 8 and 32 threads."""
    producer = MLProducer(Settings(url=lab.broker.url, store_url=server.url))
    plain: list[float] = []
    for threads in THREADS:
        with_task = []
        plain = []
        for _ in range(lab.scale.rounds):
            plain.append(_rate(server, threads, lab.scale.seconds, None))
            with_task.append(_rate(server, threads, lab.scale.seconds, producer))
        label = f"{threads} thread{'s' * (threads > 1)}"
        yield Figure(f"{label}: COMMITs with a task / without", ratios(with_task, plain))
        yield Figure(f"{label}: COMMITs with a task", with_task, "1/s")
    _empty(server)


def _rate(
    server: PostgreSQLServer, threads: int, seconds: float, producer: MLProducer | None
) -> float:
    """Commit for so long, and give COMMITs per second."""
    _empty(server)
    over = threading.Event()
    counts = [0] * threads
    ready = threading.Barrier(threads + 1)

    def work(number: int) -> None:
        with psycopg.connect(server.url) as connection:
            ready.wait(LIMIT)
            while not over.is_set():
                connection.execute("INSERT INTO orders VALUES (1)")
                if producer is not None:
                    outbox.add(connection, _task(counts[number]), producer=producer)
                connection.commit()
                counts[number] += 1

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for each in running:
        each.start()
    ready.wait(LIMIT)
    begun = time.perf_counter()
    over.wait(seconds)
    over.set()
    for each in running:
        each.join(LIMIT)
    return sum(counts) / (time.perf_counter() - begun)


def _waits(lab: Lab, server: PostgreSQLServer) -> Iterator[Figure]:
    """Commit one task after another, and wait for the confirm of each."""
    settings = Settings(url=lab.broker.url, store_url=server.url)
    middle, long = [], []
    with MLProducer(settings) as producer, psycopg.connect(server.url) as connection:
        producer.start()
        producer.wait_connected(LIMIT)
        for _ in range(lab.scale.rounds):
            waits = []
            for number in range(WAITS // (4 if lab.scale.quick else 1)):
                receipt = outbox.add(connection, _task(number), producer=producer)
                connection.commit()
                begun = time.perf_counter()
                receipt.result(LIMIT)
                waits.append(1000 * (time.perf_counter() - begun))
            cuts = statistics.quantiles(waits, n=100)
            middle.append(cuts[49])
            long.append(cuts[98])
    yield Figure("COMMIT to confirm, median", middle, "ms")
    yield Figure("COMMIT to confirm, 99th percentile", long, "ms")


# --- a backlog, and the table --------------------------------------------------------------------


def _relayed(lab: Lab, server: PostgreSQLServer) -> Iterator[Figure]:
    """Have a process deliver a backlog, in turns with one that publishes as many."""
    count = QUICK_BACKLOG if lab.scale.quick else BACKLOG
    relayed, published = [], []
    contestant = lab.contestant(OURS)
    if contestant is None:
        raise RuntimeError("the library itself is not installed")
    with contestant:
        for _ in range(min(3, lab.scale.rounds)):  # each takes half a minute
            _fill(lab, server, count)
            lab.broker.purge()
            relayed.append(count / drained(count, lab.broker.url, server.url)["seconds"])
            lab.broker.purge()
            published.append(Player(OURS, contestant, PIPELINED).play(count).rate)
    lab.broker.purge()
    name = f"relaying {count:,} rows / publish_many"
    yield Figure(name, ratios(relayed, published), target=at_least(0.5))
    yield Figure("relaying", relayed, "messages/s")


def _size(lab: Lab, server: PostgreSQLServer) -> Iterator[Figure]:
    """Send rows through the table, some thousands at a time, and see how large it is then.

    After each batch it is vacuumed as autovacuum does, which wakes up less often than they come.
    """
    count = QUICK_THROUGH if lab.scale.quick else THROUGH
    _empty(server)
    tables, indexes = [], []
    with closing(PostgreSQLStore(server.url)) as store:
        for _ in range(count // BATCH):
            _fill(lab, server, BATCH)
            while rows := store.claim(1000):
                store.done([row.claim for row in rows])
            server.call("VACUUM (TRUNCATE FALSE) mlproducer_messages")
            ((table, index),) = server.call(
                "SELECT pg_table_size(t), pg_indexes_size(t)"
                " FROM (VALUES ('mlproducer_messages'::regclass)) AS v(t)"
            )
            tables.append(table / 1e6)
            indexes.append(index / 1e6)
    name = f"{count:,} rows gone through, {BATCH:,} at a time"
    yield Figure(f"{name}: table", tables, "MB")
    yield Figure(f"{name}: indexes", indexes, "MB")


def _fill(lab: Lab, server: PostgreSQLServer, count: int) -> None:
    """Add one task, and copy its row."""
    producer = MLProducer(Settings(url=lab.broker.url, store_url=server.url))
    with psycopg.connect(server.url) as connection:
        outbox.add(connection, _task(0), producer=producer)
        found = connection.execute(
            "SELECT string_agg(column_name, ', ') FROM information_schema.columns"
            " WHERE table_name = 'mlproducer_messages' AND column_name <> 'key'"
        ).fetchone()
        columns = "" if found is None else found[0]
        connection.execute(
            f"INSERT INTO mlproducer_messages ({columns})"
            f" SELECT {columns} FROM mlproducer_messages, generate_series(2, {count})"
        )


def _empty(server: PostgreSQLServer) -> None:
    server.call("TRUNCATE mlproducer_messages, mlproducer_messages_fates, orders", user="app")


def _task(number: int) -> SummarizationTask:
    return SummarizationTask(f"share-{number}", {"text": TEXT})
