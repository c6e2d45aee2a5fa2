"""Forks so many ``TIMES``: each child publishes, and meanwhile its parent; tells what it holds.

``RABBITMQ_URL`` names the broker. The line at the end is JSON: what the parent held after the first
forks, and what it holds after the last one.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from mlproducer import Message, MLProducer

FIRST = 10
"""Forks until what is made once is made."""

LIMIT = 60.0


def main(times: int) -> None:
    """Fork, publish on both sides, and see the child end well."""
    producer = MLProducer()
    before = {}
    for number in range(times):
        child = os.fork()
        if child == 0:
            confirmed = publish(producer, f"child-{number}")
            producer.close(1.0)
            os._exit(0 if confirmed else 1)
        assert publish(producer, f"parent-{number}")
        assert os.waitpid(child, 0)[1] == 0
        if number < FIRST:
            before = held()
    print(json.dumps({"before": before, "after": held()}))
    producer.close(LIMIT)


def publish(producer: MLProducer, name: str) -> bool:
    """Publish one message; true if it was confirmed."""
    message = Message(body=b"x", routing_key="ml.embed", message_id=name)
    return producer.publish(message, timeout=LIMIT).confirmed


def held() -> dict[str, int]:
    """Count threads and descriptors."""
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    return {"threads": threading.active_count(), "descriptors": descriptors}


if __name__ == "__main__":
    main(int(sys.argv[1]))
