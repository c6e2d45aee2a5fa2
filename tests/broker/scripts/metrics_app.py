"""A WSGI application whose workers publish, and show the metrics of all workers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from telling import message

from mlproducer import MLProducer, SummarizationTask
from mlproducer.errors import InvalidMessageError
from mlproducer.observe import metrics

producer = MLProducer()


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Publish in three ways, or show the metrics."""
    start_response("200 OK", [("Content-Type", metrics.CONTENT_TYPE)])
    if environ["PATH_INFO"] == "/metrics":
        return [metrics.exposition(producer.registry)]
    confirmed = producer.publish(SummarizationTask("share", {"text": "text"})).confirmed
    producer.submit(message("submitted")).result(30.0)
    try:
        producer.publish(None)  # type: ignore[arg-type]
    except InvalidMessageError:
        return [json.dumps({"pid": os.getpid(), "confirmed": confirmed}).encode()]
    raise AssertionError("None was published")
