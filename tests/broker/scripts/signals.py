"""Publishes while signals arrive; argument 1 says which, and what is done about them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from types import FrameType

from telling import message, tell, wait_for_go

from mlproducer import MLProducer, Settings, errors

INTERRUPTS = 500
CLOSINGS = 60


def sigterm_by_default() -> None:
    """Publish, and report each, until killed."""
    producer = MLProducer()
    for number in itertools.count():
        producer.publish(message(str(number)))
        tell(published=str(number))


def sigterm_closes() -> None:
    """Publish until a handler of SIGTERM closes the producer and leaves."""
    producer = MLProducer()
    submitted: list[str] = []

    def leave(_number: int, _frame: FrameType | None) -> None:
        started = time.monotonic()
        abandoned = producer.close(2.0).abandoned
        tell(seconds=time.monotonic() - started, abandoned=abandoned, submitted=submitted)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    producer.publish(message("first"))
    tell(connected=True)
    for number in itertools.count():
        producer.submit(message(f"submitted-{number}"))
        submitted.append(f"submitted-{number}")
        producer.publish(message(f"published-{number}"), timeout=30.0)


def ctrl_c() -> None:
    """Leave a publish() that waits, and go on with the producer."""
    producer = MLProducer()
    producer.publish(message("first"))
    tell(connected=True)
    wait_for_go()
    try:
        tell(publishing=True)
        producer.publish(message("interrupted"), timeout=30.0)
    except KeyboardInterrupt:
        tell(interrupted=True)
    wait_for_go()
    tell(confirmed=producer.publish(message("next")).confirmed, left=producer.flush(30.0))
    producer.close()


def interrupts() -> None:
    """Be interrupted at random points of publish(), with a window that would show a lost slot."""
    producer = MLProducer(Settings(url=os.environ["RABBITMQ_URL"], max_in_flight=2))
    producer.publish(message("first"))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    returned: list[str] = []
    for turn in range(INTERRUPTS):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.002))
            for number in range(10_000):
                name = f"{turn}-{number}"
                producer.publish(message(name), timeout=30.0, retry=False)
                returned.append(name)
        except KeyboardInterrupt:
            continue
        tell(error=f"interrupt {turn} was swallowed")
    left = producer.flush(30.0)
    futures = [producer.submit(message(f"last-{number}")) for number in range(10)]
    confirmed = all(future.result(30.0).confirmed for future in futures)
    tell(returned=returned, left=left, pending=producer.status().pending_confirms, last=confirmed)
    producer.close()


def closings() -> None:
    """Close, time and again, a producer from a signal handler that interrupts its calls."""
    producer = MLProducer()
    longest = 0.0
    refused = 0

    def close(_number: int, _frame: FrameType | None) -> None:
        nonlocal longest
        started = time.monotonic()
        producer.close(0.3)
        longest = max(longest, time.monotonic() - started)

    signal.signal(signal.SIGALRM, close)
    for turn in range(CLOSINGS):
        producer = MLProducer()
        call = producer.submit if turn % 2 else producer.publish
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0002, 0.05))
        try:
            for number in itertools.count():
                call(message(f"{turn}-{number}"))
        except errors.ProducerClosedError:
            refused += 1
    tell(longest=longest, refused=refused)


STEPS = {
    each.__name__: each
    for each in (sigterm_by_default, sigterm_closes, ctrl_c, interrupts, closings)
}

if __name__ == "__main__":
    STEPS[sys.argv[1]]()
