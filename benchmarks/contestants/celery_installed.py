"""Celery's ``send_task`` through a producer, which waits for the confirm.

Runs on: the contestant's threads.
"""

from __future__ import annotations

from benchmarks.contestants import celery_app
from mlproducer.contrib.celery import install, producer_of, uninstall


class Client(celery_app.Client):
    """A Celery application with `install`."""

    def __init__(self, url: str, workers: int = 1, *, delay: bool = False) -> None:
        super().__init__(url, workers, delay=delay)
        install(self.app)
        producer_of(self.app).start()
        if not producer_of(self.app).wait_connected(20.0):
            raise TimeoutError("not connected within 20 s")

    def close(self) -> None:
        """Close the producer, and the pool."""
        uninstall(self.app)
        super().close()
