"""Publishes under eventlet, which patches before or after this library is imported.

With the argument ``late`` the library is imported first.
"""

from __future__ import annotations

import sys
import warnings

warnings.simplefilter("ignore")  # eventlet says of itself that it is deprecated

if "late" in sys.argv:
    import mlproducer  # noqa: F401

import eventlet  # noqa: E402

eventlet.monkey_patch()

import json  # noqa: E402
import os  # noqa: E402

from mlproducer import Message, MLProducer, Settings  # noqa: E402

ticks = 0


def tick() -> None:
    """Count turns."""
    global ticks  # noqa: PLW0603 - one green thread writes it
    while True:
        eventlet.sleep(0.001)
        ticks += 1


def main() -> None:
    """Publish from many green threads."""
    producer = MLProducer(Settings(url=os.environ["RABBITMQ_URL"]))
    eventlet.spawn(tick)

    def publish(number: int) -> str:
        message = Message(body=b"x", routing_key="ml.embed", message_id=f"m{number}")
        return producer.publish(message).outcome.name

    outcomes = list(eventlet.GreenPool(50).imap(publish, range(50)))
    report = {"outcomes": outcomes, "ticks": ticks, "left": producer.flush(30.0)}
    producer.close(2.0)
    os.write(1, json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
