"""Celery: the tasks that an app sends go through a producer, and are not lost.

Two lines beside the app::

    from mlproducer.contrib.celery import install
    install(app)

``delay``, ``apply_async``, ``send_task``, canvas, links, retries and beat then wait for the
broker's confirm. On the workers' side, `deduplicate` skips a task that has been completed.

Runs on: the threads that send tasks, and those that run them.
"""

from __future__ import annotations

from mlproducer.contrib.celery.deduplication import deduplicate
from mlproducer.contrib.celery.sending import (
    PublishFailedError,
    install,
    producer_of,
    uninstall,
)
from mlproducer.contrib.celery.task_message import TaskMessage

__all__ = [
    "PublishFailedError",
    "TaskMessage",
    "deduplicate",
    "install",
    "producer_of",
    "uninstall",
]
