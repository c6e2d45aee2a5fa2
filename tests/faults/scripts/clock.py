"""A publisher whose wall clock is moved by the process that started it.

Takes a line of JSON, ``{"publish": n}``, ``{"flush": seconds}`` or ``{"now": null}``, and answers
with one.

Runs on: the process's main thread.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import Any

from mlproducer import Message, MLProducer, Settings

FEW = {
    "publish_timeout": 2.0,
    "reconnect_initial_delay": 0.05,
    "reconnect_max_delay": 0.2,
    "max_reconnect_attempts": 1000,
    "message_retry_base_delay": 0.3,
    "retry_sweep_interval": 0.1,
    "declare_topology": "off",
    "store_lease": 3.0,
    "circuit_breaker_threshold": 1_000_000,
}


def answer(producer: MLProducer, order: dict[str, Any]) -> Any:
    """Do what was ordered."""
    if "publish" in order:
        messages = [Message(body=b"x", routing_key="k") for _ in range(order["publish"])]
        results = producer.publish_many(messages)
        return ["deferred" if result.reason is not None else "confirmed" for result in results]  # type: ignore[union-attr]
    if "flush" in order:
        return producer.flush(order["flush"])
    return datetime.now(timezone.utc).timestamp()


def main(url: str, store_url: str) -> None:
    """Answer until the orders end."""
    with MLProducer(Settings(url=url, store_url=store_url, **FEW)) as producer:
        producer.start()
        for line in sys.stdin:
            print(json.dumps(answer(producer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
