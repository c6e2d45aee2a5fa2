"""A WSGI application with a producer of its module, imported before gunicorn forks its workers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from telling import message

from mlproducer import MLProducer

producer = MLProducer()
numbers = itertools.count()


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
