"""Celery's ``send_task`` with ``confirm_publish``, from a pool of one connection per worker.

Tuned as far as its settings go: no results, no events, no retry policy, and the representations of
the arguments are given, so that Celery does not make them from the text.

Runs on: the contestant's threads.
"""

from __future__ import annotations

from celery import Celery

from benchmarks.contestants.base import ThreadedClient
from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, TASK_NAME, arguments

_ROUTE = {"exchange": EXCHANGE, "routing_key": ROUTING_KEY, "mandatory": True}


def _summarize(**_: object) -> None:
    """Stand for a worker's task."""


class Client(ThreadedClient):
    """A Celery application.

    :param delay: call ``delay()`` of a task, as most programs do, which makes the representations
    """

    def __init__(self, url: str, workers: int = 1, *, delay: bool = False) -> None:
        self.app = Celery("benchmark", broker=url)
        self.app.conf.update(
            broker_transport_options={"confirm_publish": True},
            broker_pool_limit=workers,
            broker_heartbeat=0,
            task_ignore_result=True,
            task_publish_retry=False,
        )
        self._task = self.app.task(name=TASK_NAME, **_ROUTE)(_summarize)
        self._delays = delay

    def publish(self, worker: int, number: int) -> None:
        """Send one."""
        if self._delays:
            self._task.delay(**arguments(number))
            return
        self.app.send_task(
            TASK_NAME,
            kwargs=arguments(number),
            exchange=EXCHANGE,
            exchange_type="topic",
            routing_key=ROUTING_KEY,
            argsrepr="(...)",
            kwargsrepr="{...}",
            ignore_result=True,
            mandatory=True,
        )

    def close(self) -> None:
        """Close the pool."""
        self.app.close()
