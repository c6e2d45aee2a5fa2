"""Publishes from functions that run at the exit, one before the library's own and one after."""

from __future__ import annotations

import atexit


def too_late() -> None:
    """Publish when the producer has been closed: registered first, so called last."""
    try:
        producer.publish(message("too late"))
    except errors.ProducerClosedError as error:
        tell(refused=type(error).__name__)


atexit.register(too_late)

from telling import message, tell  # noqa: E402 - the library must not be imported before

from mlproducer import MLProducer, errors  # noqa: E402

producer = MLProducer()


def in_time() -> None:
    """Publish, for the first time, while the interpreter is exiting."""
    tell(confirmed=producer.publish(message("in time")).confirmed)


atexit.register(in_time)
