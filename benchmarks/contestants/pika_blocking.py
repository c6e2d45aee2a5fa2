"""pika's ``BlockingConnection``: a connection of its own for each worker, which is what it allows.

One connection behind a lock was tried as well, and is slower with many threads. Heartbeats are off,
since an idle connection is not served between rounds.

Runs on: the contestant's threads.
"""

from __future__ import annotations

import pika

from benchmarks.contestants.base import ThreadedClient
from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, message


class Client(ThreadedClient):
    """Channels in confirm mode, one per worker."""

    def __init__(self, url: str, workers: int = 1) -> None:
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0
        self._connections = [pika.BlockingConnection(parameters) for _ in range(workers)]
        self._channels = [connection.channel() for connection in self._connections]
        for channel in self._channels:
            channel.confirm_delivery()

    def publish(self, worker: int, number: int) -> None:
        """Publish one; pika raises where it is nacked or returned."""
        task_id, headers, body = message(number)
        self._channels[worker].basic_publish(
            EXCHANGE,
            ROUTING_KEY,
            body,
            pika.BasicProperties(
                content_type="application/json",
                content_encoding="utf-8",
                headers=headers,
                delivery_mode=2,
                correlation_id=task_id,
                message_id=task_id,
            ),
            mandatory=True,
        )

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()
