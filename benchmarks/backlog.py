"""A backlog in a store: one process leaves it there, another one drains it; or one long stream.

``python -m benchmarks.backlog leave|drain|stream COUNT BROKER_URL STORE_URL`` prints one line of
JSON.

Runs on: the main thread.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contestants.work import TEXT
from mlproducer import MLProducer, Settings, SummarizationTask

CHUNK = 1_000
LIMIT = 300.0


def main(mode: str, count: int, broker: str, store: str) -> dict[str, Any]:
    """Do one of the three."""
    producer = MLProducer(Settings(url=broker, store_url=store))
    producer.start()
    try:
        return {"leave": leave, "drain": drain, "stream": stream}[mode](producer, count)
    finally:
        producer.close(0.0)


def leave(producer: MLProducer, count: int) -> dict[str, Any]:
    """Publish while there is no broker; every message must be taken.

    Memory counts from the second chunk on, since the receipts of one are held at a time.
    """
    begun, before = time.perf_counter(), 0
    for start in range(0, count, CHUNK):
        before = before or (_memory() if start > CHUNK else 0)
        for result in producer.publish_many(_tasks(min(CHUNK, count - start))):
            if isinstance(result, Exception):
                raise result
    return {"seconds": time.perf_counter() - begun, "grown": _memory() - before}


def drain(producer: MLProducer, count: int) -> dict[str, Any]:
    """Wait until all is confirmed, from when the connection stands."""
    producer.wait_connected(LIMIT)
    begun, before = time.perf_counter(), _memory()
    left = producer.flush(LIMIT)
    if left:
        raise TimeoutError(f"{left} of {count} messages are left")
    return {"seconds": time.perf_counter() - begun, "grown": _memory() - before}


def stream(producer: MLProducer, count: int) -> dict[str, Any]:
    """Publish all in one call, from a generator, which looks at the memory on its way.

    The receipts are in the list that the call returns, so memory grows by these; what is given is
    by how much a message lets it grow, in the first half and in the second.
    """
    memory: dict[int, int] = {}

    def tasks() -> Iterator[SummarizationTask]:
        for number, task in enumerate(_tasks(count)):
            if number in marks:
                memory[number] = _memory()
            yield task

    marks = (count // 10, count // 2, count - 1)
    producer.wait_connected(LIMIT)
    begun = time.perf_counter()
    for result in producer.publish_many(tasks()):
        if isinstance(result, Exception) or not result.confirmed:
            raise RuntimeError("not confirmed")
    seconds = time.perf_counter() - begun
    grown = [(memory[b] - memory[a]) / (b - a) for a, b in itertools.pairwise(marks)]
    return {"seconds": seconds, "grown": grown}


def _tasks(count: int) -> Iterator[SummarizationTask]:
    for number in range(count):
        yield SummarizationTask(f"share-{number}", {"text": TEXT})


def _memory() -> int:
    """Give the resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5])))
