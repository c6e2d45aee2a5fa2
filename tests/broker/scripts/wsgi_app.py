"""A WSGI application with a producer of its module, imported before gunicorn forks its workers."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from telling import message

from mlproducer import MLProducer

producer = MLProducer()
numbers = itertools.count()

if "PUBLISH_AT_IMPORT" in os.environ:
    producer.publish(message("master"))
    time.sleep(0.3)  # until the threads sleep: uWSGI forks without the interpreter's lock


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Publish one message and submit another, and answer with their ids."""
    name = f"{os.getpid()}-{next(numbers)}"
    confirmed = producer.publish(message(f"{name}-published")).confirmed
    submitted = producer.submit(message(f"{name}-submitted"))
    answer = {
        "pid": os.getpid(),
        "confirmed": confirmed,
        "ids": [f"{name}-published", submitted.message_id],
    }
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
