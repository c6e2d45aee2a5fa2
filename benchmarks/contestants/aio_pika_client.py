"""aio-pika: one connection, one channel with confirms, and as many coroutines as may be in flight.

``connect`` rather than ``connect_robust``, and coroutines that live as long as the round rather
than one per message: both are the faster choice.

Runs on: the contestant's main thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import aio_pika

from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, message

WINDOW = 1000


class Client:
    """An exchange to publish to, and the loop on which that happens."""

    def __init__(self, url: str, workers: int = 1) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._connect(f"{url}?heartbeat=0"))

    def pipelined(self, count: int) -> None:
        """Publish many."""
        self.blocking(count, WINDOW)

    def blocking(self, count: int, workers: int) -> list[float]:
        """Publish from as many coroutines, each waiting for every confirm."""
        waits: list[float] = []
        self._loop.run_until_complete(self._share(iter(range(count)), workers, waits))
        return waits

    def close(self) -> None:
        """Disconnect."""
        self._loop.run_until_complete(self._connection.close())
        self._loop.close()

    async def _connect(self, url: str) -> None:
        self._connection = await aio_pika.connect(url)
        channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await channel.get_exchange(EXCHANGE, ensure=False)

    async def _share(self, numbers: Iterator[int], workers: int, waits: list[float]) -> None:
        await asyncio.gather(*(self._work(numbers, waits) for _ in range(workers)))

    async def _work(self, numbers: Iterator[int], waits: list[float]) -> None:
        publish, clock = self._exchange.publish, time.perf_counter
        for number in numbers:
            started = clock()
            await publish(_message(number), ROUTING_KEY, mandatory=True)
            waits.append(clock() - started)


def _message(number: int) -> aio_pika.Message:
    task_id, headers, body = message(number)
    return aio_pika.Message(
        body,
        content_type="application/json",
        content_encoding="utf-8",
        headers=headers,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        correlation_id=task_id,
        message_id=task_id,
    )
