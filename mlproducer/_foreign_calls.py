"""Calls of foreign code: logging handlers, callbacks, tracers, another library's files.

An exception of such code must not propagate. On a thread of the library it would end the loop on
which every message depends, SystemExit included; on a user's thread `publish()` would raise for a
message that the library owns. Ctrl-C does propagate: Python raises it on the main thread, which is
never one of the library's.

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
    except BaseException as error:  # noqa: BLE001 - nothing may propagate
        return stopped(error)
    return None


def stopped(error: BaseException) -> BaseException:
    """Return an error that must not propagate; raise it again if it must."""
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
    """Log a line; an exception of a handler does not propagate.

    :param error: an error whose traceback is logged too
    """
    guarded(to.log, level, text, *args, exc_info=error)
