"""A process whose memory is looked at: a producer whose messages do not get through.

It answers jobs as a contestant does. `suite.memory` decides what the broker does meanwhile.

Runs on: the main thread, and the producer's.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import tracemalloc
from concurrent.futures import Future
from typing import Any

from mlproducer import MLProducer, Receipt, Settings, SummarizationTask

LIMIT = 30.0


class Hoard:
    """A producer, and the futures of what it was given."""

    def __init__(self, url: str, window: int) -> None:
        self._producer = MLProducer(
            Settings(
                url=url,
                max_in_flight=window,
                circuit_breaker_threshold=1_000_000,
                max_message_retries=1000,
                max_reconnect_attempts=1_000_000,
                reconnect_max_delay=0.5,
            )
        )
        self._futures: list[Future[Receipt]] = []
        self._deferred = threading.Semaphore(0)
        self._producer.on("deferred", self._note)
        if not self._producer.wait_connected(LIMIT):
            raise TimeoutError("not connected")

    def submit(self, count: int, size: int) -> None:
        """Hand messages in, with texts of their own."""
        for number in range(count):
            text = f"{number:08}".ljust(size, "x")
            self._futures.append(self._producer.submit(SummarizationTask("s", {"text": text})))

    def settle(self) -> None:
        """Wait until all are confirmed, and forget them."""
        for future in self._futures:
            future.result(LIMIT)
        self._futures.clear()

    def wait_deferred(self, count: int) -> None:
        """Wait until as many are kept for a retry."""
        for _ in range(count):
            if not self._deferred.acquire(timeout=LIMIT):
                raise TimeoutError("not deferred")

    def _note(self) -> None:
        self._deferred.release()

    def memory(self) -> int:
        """Give the bytes that Python's objects take now."""
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    def close(self) -> None:
        """End at once; nothing will be confirmed."""
        self._producer.close(0.0)


def main() -> None:
    """Answer jobs: a method's name and its arguments."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    tracemalloc.start()
    hoard = Hoard(**options)
    print(json.dumps({"ready": "hoard"}), flush=True)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        answer = getattr(hoard, job.pop("do"))(**job)
        print(json.dumps({"answer": answer}), flush=True)
    hoard.close()


if __name__ == "__main__":
    main()
