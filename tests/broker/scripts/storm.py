"""Forks 50 times while threads publish, and says how the publishing threads fared."""

from __future__ import annotations

import itertools
import os
import threading
import time

from telling import message, tell

from mlproducer import MLProducer

CHILDREN = 30
AT_ONCE = 2
THREADS = 4

producer = MLProducer()
stop = threading.Event()


def publish(thread: int, published: list[tuple[bool, float]]) -> None:
    """Publish, one message after the other, until the storm is over."""
    for number in itertools.count():
        if stop.is_set():
            return
        started = time.monotonic()
        receipt = producer.publish(message(f"parent-{thread}-{number}"))
        published.append((receipt.confirmed, time.monotonic() - started))


def child(number: int) -> None:
    """Publish one message, as a child does."""
    started = time.monotonic()
    confirmed = producer.publish(message(f"child-{number}")).confirmed
    tell(child=number, confirmed=confirmed, seconds=time.monotonic() - started)
    os._exit(0 if confirmed else 1)


def main() -> None:
    """Publish and fork."""
    producer.publish(message("first"))
    published: list[tuple[bool, float]] = []
    threads = [
        threading.Thread(target=publish, args=[n, published], daemon=True) for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    codes = []
    for first in range(0, CHILDREN, AT_ONCE):
        pids = []
        for number in range(first, first + AT_ONCE):
            pid = os.fork()
            if pid == 0:
                child(number)
            pids.append(pid)
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    stop.set()
    for thread in threads:
        thread.join(30.0)
    waits = sorted(seconds for _, seconds in published)
    tell(
        codes=codes,
        published=len(published),
        confirmed=sum(confirmed for confirmed, _ in published),
        longest=waits[-1],
        median=waits[len(waits) // 2],
        p99=waits[len(waits) * 99 // 100],
    )
    producer.close()


if __name__ == "__main__":
    main()
