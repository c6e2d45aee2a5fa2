"""Open an application's own SQLite file, to take rows of an outbox from it; for development.

Runs on: the relay's main thread.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mlproducer.errors import StoreError


@contextmanager
def opened(path: str, busy: float) -> Iterator[sqlite3.Connection]:
    """Open a file that exists; each statement is a transaction.

    :param busy: seconds to wait for another connection that writes
    :raises StoreError: the file cannot be used, or a statement in the block fails
    """
    try:
        uri = f"{Path(path).absolute().as_uri()}?mode=rw"
        made = sqlite3.connect(uri, timeout=busy, uri=True, isolation_level=None)
        with closing(made) as connection:
            yield connection
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", type(error).__name__)
        failure = StoreError(f"the outbox in {path} cannot be used: {code}")
    else:
        return
    raise failure


@contextmanager
def alone(path: str) -> Iterator[bool]:
    """Keep other relays from this file's rows; false where one of them is at it.

    The lock is on a file beside it: SQLite's own on the file would be lost with any descriptor.

    :raises StoreError: that file cannot be made
    """
    beside = f"{path}-relay"
    try:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{beside} cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
