"""Publishes from functions that run at the exit, one before the library's own and one after.

With the argument ``used`` the producer has been used before. Otherwise it is used first at exit,
where Python 3.12 starts no thread.
"""

from __future__ import annotations

import atexit
import sys


def too_late() -> None:
    """Publish when the producer has been closed: registered first, so called last."""
    try:
        producer.publish(message("too late"))
    except errors.PublishError as error:
        tell(refused=type(error).__name__)


atexit.register(too_late)

from telling import message, tell  # noqa: E402 - the library must not be imported before

from mlproducer import MLProducer, errors  # noqa: E402

producer = MLProducer()


def in_time() -> None:
    """Publish while the interpreter is exiting."""
    try:
        tell(confirmed=producer.publish(message("in time")).confirmed)
    except errors.NotConnectedError as error:
        tell(refused=type(error).__name__)


atexit.register(in_time)

if "used" in sys.argv:
    producer.publish(message("before"))
