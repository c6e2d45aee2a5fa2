"""Our own library, with its default settings.

A task is made for each message within the measured time. Anything but a confirm at once is an
error: a benchmark that defers messages measures something else.

Runs on: the contestant's threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.contestants.base import ThreadedClient
from benchmarks.contestants.work import STRIDE, TEXT
from mlproducer import MLProducer, Receipt, Settings, SummarizationTask
from mlproducer.errors import PublishError

CONNECT_LIMIT = 20.0


class Client(ThreadedClient):
    """A producer, or several.

    :param workers: how many threads will publish; of no interest here
    :param producers: how many the threads share among them
    :param settings: what else to set
    :ivar marks: when each 10,000th task of the last pipelined job was taken
    """

    def __init__(self, url: str, workers: int = 1, *, producers: int = 1, **settings: Any) -> None:
        self.marks: list[float] = []
        self._producers = [MLProducer(Settings(url=url, **settings)) for _ in range(producers)]
        for each in self._producers:
            if not each.wait_connected(CONNECT_LIMIT):
                raise TimeoutError(f"not connected within {CONNECT_LIMIT:g} s")

    def publish(self, worker: int, number: int) -> None:
        """Publish one."""
        producer = self._producers[worker % len(self._producers)]
        receipt = producer.publish(SummarizationTask(f"share-{number}", {"text": TEXT}))
        if receipt.reason is not None:
            raise receipt.reason

    def pipelined(self, count: int) -> list[Receipt | PublishError]:
        """Publish many, from a generator; give the receipts."""
        self.marks.clear()
        receipts = self._producers[0].publish_many(self._tasks(count))
        for each in receipts:
            if isinstance(each, PublishError):
                raise each
            if each.reason is not None:
                raise each.reason
        return receipts

    def _tasks(self, count: int) -> Iterator[SummarizationTask]:
        for number in range(count):
            if number % STRIDE == 0:
                self.marks.append(time.perf_counter())
            yield SummarizationTask(f"share-{number}", {"text": TEXT})

    def close(self) -> None:
        """Close the producers."""
        for each in self._producers:
            each.close()
