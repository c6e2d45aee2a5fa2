"""Calls to code that is not ours: logging handlers, callbacks, tracers, another library's files.

What such code raises ends here. On a thread of ours it would end the loop on which every message
depends, with SystemExit as with any other; on a user's thread it would make `publish()` raise for a
message that is ours. Ctrl-C passes: Python raises it on the main thread, which is never ours.

Runs on: any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable


def guarded(
    function: Callable[..., object], *args: object, **kwargs: object
) -> BaseException | None:
    """Call a function and return what it raised, if it raised."""
    try:
        function(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - nothing of it may pass
        return stopped(error)
    return None


def stopped(error: BaseException) -> BaseException:
    """Return an error that ends here; raise it again where it has to pass."""
    interrupt = not isinstance(error, Exception)
    if interrupt and threading.current_thread() is threading.main_thread():
        raise error
    return error


def write(
    to: logging.Logger,
    level: int,
    text: str,
    *args: object,
    error: BaseException | None = None,
) -> None:
    """Log a line on a thread of ours; what a handler raises ends here.

    :param error: whose traceback follows
    """
    guarded(to.log, level, text, *args, exc_info=error)
