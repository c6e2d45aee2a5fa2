"""Publishes 100,000 messages of 1 kB to a broker that is down, and says what it cost.

Its argument is the threshold of the circuit breaker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from collections import Counter
from pathlib import Path

from mlproducer import Message, MLProducer, Settings
from mlproducer.errors import PublishError

MESSAGES = 100_000
IMPORTED = 20
"""Publishes after which everything that is imported at first use is there."""

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    """Publish, and report once at the end."""
    threshold = int(sys.argv[1])
    producer = MLProducer(
        Settings(url=os.environ["RABBITMQ_URL"], circuit_breaker_threshold=threshold)
    )
    answers: Counter[str] = Counter()
    names = [""] * MESSAGES
    seconds = array("d", bytes(8 * MESSAGES))  # all there before memory is measured
    before = largest = 0
    for number in range(MESSAGES):
        message = Message(body=b"x" * 1000, routing_key="ml.embed", message_id=f"m{number}")
        started = time.perf_counter()
        try:
            answer = producer.publish(message).outcome.name
        except PublishError as error:
            answer = type(error).__name__
        seconds[number] = time.perf_counter() - started
        names[number] = sys.intern(answer)
        answers[answer] += 1
        if number == IMPORTED:
            before = resident()
        if number % 1000 == 0:
            largest = max(largest, resident())
    waits: dict[str, list[float]] = {}
    for name, wait in zip(names, seconds, strict=True):
        waits.setdefault(name, []).append(wait)
    status = producer.status()
    report = {
        "answers": answers,
        "grown": max(largest, resident()) - before,
        "kept": status.retry_queue_size,
        "median": {name: sorted(each)[len(each) // 2] for name, each in waits.items()},
        "p99": {name: sorted(each)[len(each) * 99 // 100] for name, each in waits.items()},
        "longest": {name: max(each) for name, each in waits.items()},
    }
    report["abandoned"] = len(producer.close(0.0).abandoned)
    os.write(1, json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
