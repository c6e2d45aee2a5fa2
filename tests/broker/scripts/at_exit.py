"""Publishes from functions that run at the interpreter's exit, before the library's own and after."""

from __future__ import annotations

import atexit

from telling import tell


def too_late() -> None:
    """Publish when the producer has been closed: registered first, so called last."""
    try:
        producer.publish(message("too late"))
    except errors.ProducerClosedError as error:
        tell(refused=type(error).__name__)


atexit.register(too_late)

from telling import message  # noqa: E402 - it imports the library, which must come second here

from mlproducer import MLProducer, errors  # noqa: E402

producer = MLProducer()


def in_time() -> None:
    """Publish, for the first time, while the interpreter is exiting."""
    tell(confirmed=producer.publish(message("in time")).confirmed)


atexit.register(in_time)
