"""What a contestant's module offers as ``Client``, and what most of them share.

Runs on: the contestant's main thread, and the worker threads that `ThreadedClient` starts.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

LIMIT = 120.0
"""Seconds that a worker may take; longer means that it hangs."""


class Client(Protocol):
    """A connected client."""

    def pipelined(self, count: int) -> Any:
        """Publish ``count`` messages, a window of 1,000 in flight, all confirmed at the end.

        :returns: whatever a user would be given, so that its memory can be looked at
        """

    def blocking(self, count: int, workers: int) -> list[float]:
        """Publish from ``workers`` at once, each waiting for every confirm; give the waits."""

    def close(self) -> None:
        """Disconnect."""


class ThreadedClient:
    """A client whose ``publish`` blocks, with threads around it."""

    def publish(self, worker: int, number: int) -> None:
        """Publish one message and wait for its confirm.

        :param worker: which worker calls, from 0
        """
        raise NotImplementedError

    def pipelined(self, count: int) -> Any:
        """Say that this client cannot."""
        raise NotImplementedError(f"{type(self).__module__} waits for each confirm")

    def blocking(self, count: int, workers: int) -> list[float]:
        """Share the messages out among threads; a failure in one is a failure of all."""
        waits: list[list[float]] = [[] for _ in range(workers)]
        failures: list[BaseException] = []

        def work(worker: int) -> None:
            try:
                self._work(worker, range(worker, count, workers), waits[worker])
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)

        threads = [threading.Thread(target=work, args=(each,)) for each in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        if failures:
            raise failures[0]
        if any(thread.is_alive() for thread in threads):
            raise TimeoutError(f"a worker did not end within {LIMIT:g} s")
        return [wait for each in waits for wait in each]

    def _work(self, worker: int, numbers: range, waits: list[float]) -> None:
        publish, clock = self.publish, time.perf_counter
        for number in numbers:
            started = clock()
            publish(worker, number)
            waits.append(clock() - started)

    def close(self) -> None:
        """Disconnect; by default the end of the process does."""
