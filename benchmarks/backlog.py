"""A backlog in a durable store: one process leaves it there, another one drains it.

``python -m benchmarks.backlog leave|drain COUNT BROKER_URL STORE_URL`` prints one line of JSON.

Runs on: the main thread.
"""

from __future__ import annotations

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
    """Do one of the two."""
    producer = MLProducer(Settings(url=broker, store_url=store))
    producer.start()
    try:
        return leave(producer, count) if mode == "leave" else drain(producer, count)
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


def _tasks(count: int) -> Iterator[SummarizationTask]:
    for number in range(count):
        yield SummarizationTask(f"share-{number}", {"text": TEXT})


def _memory() -> int:
    """Give the resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5])))
