"""Publishes in children of multiprocessing, started by the method that the first argument names."""

from __future__ import annotations

import multiprocessing
import sys

from telling import message, tell

from mlproducer import MLProducer

SUBMITTED = 50

producer = MLProducer()


def work(name: str) -> None:
    """Publish one, submit many, and return."""
    confirmed = producer.publish(message(f"{name}-published")).confirmed
    for number in range(SUBMITTED):
        producer.submit(message(f"{name}-{number}"))
    tell(child=name, confirmed=confirmed)


def main(method: str) -> None:
    """Start two children beside a producer in use."""
    context = multiprocessing.get_context(method)
    producer.publish(message("parent"))
    children = [context.Process(target=work, args=[f"child-{n}"]) for n in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30.0)
    confirmed = producer.publish(message("parent-again")).confirmed
    tell(codes=[child.exitcode for child in children], confirmed=confirmed)


if __name__ == "__main__":
    main(sys.argv[1])
