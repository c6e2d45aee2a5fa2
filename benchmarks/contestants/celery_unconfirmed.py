"""Celery's ``send_task`` as it is: it returns once the bytes are in the socket's buffer.

Runs on: the contestant's threads.
"""

from __future__ import annotations

from benchmarks.contestants import celery_app


class Client(celery_app.Client):
    """A Celery application that waits for no confirm."""

    def __init__(self, url: str, workers: int = 1, *, delay: bool = False) -> None:
        super().__init__(url, workers, delay=delay)
        self.app.conf.broker_transport_options = {}
