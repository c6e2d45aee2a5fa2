"""A Celery application whose task publishes by a producer of its module, in use since import."""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import worker_ready
from kombu import Exchange, Queue
from telling import message, tell

from mlproducer import MLProducer

NAME = "relay"

producer = MLProducer()
producer.publish(message("main"))

app = Celery(NAME, broker=os.environ["RABBITMQ_URL"])
app.conf.worker_max_tasks_per_child = 5
app.conf.worker_concurrency = 2
app.conf.task_queues = [
    Queue(
        NAME,
        Exchange("bookmarkai.ml", type="topic"),
        routing_key=NAME,
        queue_arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": 20,
            "x-dead-letter-exchange": "bookmarkai.ml.dlx",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
]


@app.task(name=NAME)
def relay(number: int) -> None:
    """Publish one message, submit another."""
    confirmed = producer.publish(message(f"{number}-published")).confirmed
    producer.submit(message(f"{number}-submitted"))
    tell(pid=os.getpid(), number=number, confirmed=confirmed)


@worker_ready.connect
def ready(**_: object) -> None:
    """Let the test begin."""
    tell(ready=True)
