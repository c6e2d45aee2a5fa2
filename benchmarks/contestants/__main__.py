"""A contestant's process: jobs come in as lines of JSON, figures go out as lines of JSON.

Runs on: the main thread, and the threads that a contestant makes.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from typing import Any

from benchmarks.contestants.base import Client
from benchmarks.contestants.meter import cpu_by_thread, resident, summary


def main() -> None:
    """Connect the client that is named, then answer jobs until the input ends."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    client: Client = importlib.import_module(f"benchmarks.contestants.{name}").Client(**options)
    _say({"ready": name})
    for line in sys.stdin:
        _say(_answer(client, json.loads(line)))
    client.close()


def _answer(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job; only what lies between the clocks is measured."""
    gc.collect()
    before = resident()
    threads = cpu_by_thread()
    cpu, started = time.process_time(), time.perf_counter()
    if job["way"] == "pipelined":
        kept = client.pipelined(job["count"])
        waits: list[float] = []
    else:
        kept = waits = client.blocking(job["count"], job["workers"])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    grown = resident() - before
    del kept
    return {
        "count": job["count"],
        "seconds": seconds,
        "cpu": cpu,
        "grown": grown,
        "threads": {
            thread: spent - threads.get(thread, 0.0) for thread, spent in cpu_by_thread().items()
        },
        "marks": getattr(client, "marks", []),
        **summary(waits),
    }


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
