"""Publishes under gevent, and counts how often another greenlet gets its turn meanwhile.

The test stalls the network between the second and the third report.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

from mlproducer import Message, MLProducer, Settings  # noqa: E402

TICK = 0.01
ticks = 0


def tell(**report: Any) -> None:
    """Report something to the test."""
    os.write(1, json.dumps(report).encode() + b"\n")


def tick() -> None:
    """Count turns."""
    global ticks  # noqa: PLW0603 - one greenlet writes it
    while True:
        gevent.sleep(TICK)
        ticks += 1


def waited() -> float:
    """Return the seconds for which the one thread of all greenlets has waited for a CPU."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def publish(producer: MLProducer, name: str, timeout: float = 30.0) -> str:
    """Publish one, and return what was said."""
    message = Message(body=b"x", routing_key="ml.embed", message_id=name)
    return producer.publish(message, timeout=timeout).outcome.name


def main() -> None:
    """Publish from many greenlets, then into a stalled network, then deliver the rest."""
    producer = MLProducer(Settings(url=os.environ["RABBITMQ_URL"], retry_sweep_interval=0.2))
    gevent.spawn(tick)
    jobs = [gevent.spawn(publish, producer, f"m{n}") for n in range(50)]
    gevent.joinall(jobs, timeout=30.0)
    tell(outcomes=[job.value for job in jobs])
    gevent.get_hub().threadpool.apply(os.read, (0, 1))
    before, started, delayed = ticks, time.monotonic(), waited()
    outcome = publish(producer, "late", timeout=1.0)
    took = time.monotonic() - started
    own = took - (waited() - delayed)
    tell(outcome=outcome, took=took, own=own, ticks=ticks - before, expected=own / TICK)
    gevent.get_hub().threadpool.apply(os.read, (0, 1))
    tell(left=producer.flush(30.0))
    producer.close(2.0)


if __name__ == "__main__":
    main()
