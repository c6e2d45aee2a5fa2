"""kombu's ``Producer`` with ``confirm_publish``: a connection and a channel for each worker.

py-amqp's connections are not thread-safe, so this is what kombu's own pool of producers amounts to,
without the pool's lock. The body goes through kombu's JSON serializer, as it would.

Runs on: the contestant's threads.
"""

from __future__ import annotations

import uuid

from kombu import Connection, Producer

from benchmarks.contestants.base import ThreadedClient
from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, header, payload


class Client(ThreadedClient):
    """Producers, one per worker."""

    def __init__(self, url: str, workers: int = 1) -> None:
        options = {"confirm_publish": True}
        self._connections = [
            Connection(url, heartbeat=0, transport_options=options) for _ in range(workers)
        ]
        self._producers = [Producer(each.channel()) for each in self._connections]

    def publish(self, worker: int, number: int) -> None:
        """Publish one; kombu raises where it is nacked."""
        task_id = str(uuid.uuid4())
        self._producers[worker].publish(
            payload(number),
            exchange=EXCHANGE,
            routing_key=ROUTING_KEY,
            serializer="json",
            delivery_mode=2,
            headers=header(task_id),
            correlation_id=task_id,
            message_id=task_id,
            mandatory=True,
        )

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.release()
