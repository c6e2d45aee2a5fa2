"""AMQPStorm: one connection, and a channel with confirms for each worker.

A publish that waits for its confirm looks for it every 10 ms, whatever the broker does; that is
AMQPStorm's own constant, and there is no setting for it.

Runs on: the contestant's threads, and AMQPStorm's reader.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import amqpstorm

from benchmarks.contestants.base import ThreadedClient
from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, message


class Client(ThreadedClient):
    """Channels, one per worker."""

    def __init__(self, url: str, workers: int = 1) -> None:
        parts = urlsplit(url)
        self._connection = amqpstorm.Connection(
            parts.hostname,
            unquote(parts.username or "guest"),
            unquote(parts.password or "guest"),
            port=parts.port or 5672,
            virtual_host=unquote(parts.path[1:]) or "/",
            heartbeat=0,
        )
        self._channels = [self._connection.channel() for _ in range(workers)]
        for channel in self._channels:
            channel.confirm_deliveries()

    def publish(self, worker: int, number: int) -> None:
        """Publish one."""
        task_id, headers, body = message(number)
        confirmed = self._channels[worker].basic.publish(
            body,
            ROUTING_KEY,
            EXCHANGE,
            {
                "content_type": "application/json",
                "content_encoding": "utf-8",
                "headers": headers,
                "delivery_mode": 2,
                "correlation_id": task_id,
                "message_id": task_id,
            },
            mandatory=True,
        )
        if not confirmed:
            raise RuntimeError("not confirmed")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
