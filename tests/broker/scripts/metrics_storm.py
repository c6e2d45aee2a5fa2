"""Forks while threads publish and scrape; each child says what its own metrics show."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from telling import message, tell

from mlproducer import MLProducer
from mlproducer.observe import metrics

CHILDREN = 30

producer = MLProducer()
stop = threading.Event()


def publish() -> None:
    """Publish, one message after the other, until the storm is over."""
    while not stop.is_set():
        producer.publish(message("parent"))


def scrape() -> None:
    """Read the metrics, again and again; not through the registry, whose lock is not ours."""
    while not stop.is_set():
        shown()


def shown() -> dict[str, float]:
    """Return the counts and gauges that are not zero, histograms left out."""
    collector = metrics._collectors[metrics.REGISTRY]
    samples = [sample for metric in collector.collect() for sample in metric.samples]
    short = {each.name.removeprefix("ml_producer_"): each.value for each in samples if each.value}
    return {name: short.get(name, 0.0) for name in ("tasks_sent_total", "connection_state")}


def child() -> None:
    """Look at the metrics, publish one message, and look again."""
    before = shown()
    confirmed = producer.publish(message("child")).confirmed
    second = MLProducer()
    tell(before=before, after=shown(), confirmed=confirmed, with_second=second.is_healthy())
    producer.close()
    os._exit(0)


def main() -> None:
    """Publish, scrape and fork."""
    producer.publish(message("parent"))
    work: list[Callable[[], None]] = [publish, publish, scrape, scrape]
    threads = [threading.Thread(target=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            child()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    stop.set()
    for thread in threads:
        thread.join(30.0)
    tell(codes=codes)
    producer.close()


if __name__ == "__main__":
    main()
