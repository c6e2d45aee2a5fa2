"""Listen for the NOTIFY that a COMMIT with rows of an outbox sends, so that they go out at once.

LISTEN needs a session, so the listener has a connection of its own. Nothing depends on it: where
it cannot listen, the next sweep finds the rows. Behind a pooler such as pgbouncer each transaction
may run in another session, and notifications get lost; a pooler is recognized by the session's
process id, which then differs from the one that the connection was given.

Runs on: a thread ``mlproducer-listen``.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable

from mlproducer import _clock as time
from mlproducer._core.backoff import Backoff
from mlproducer._foreign_calls import write
from mlproducer._store_url import PostgreSQLAddress
from mlproducer.stores.postgres import sql
from mlproducer.stores.postgres.session import CONNECT_TIMEOUT, FOREIGN, describe, dial

logger = logging.getLogger(__name__)

CHECK = 60.0
"""Seconds without a notification after which the connection is tested."""

AGAIN = 0.02
"""Seconds after a notification when rows are looked for again: a COMMIT beside the one that sent it
sends none, and may have ended a moment later."""

PAUSE = Backoff(0.5, 30.0)
"""Before a connection that was lost, or could not be made, is tried again."""

POOLED_PAUSE = 600.0
"""Seconds after which it is tried again behind a pooler."""


class Listener:
    """Calls ``wake`` when rows may have come, from `run` until `stop`.

    :param wake: called on the thread of `run`; it must return at once
    """

    def __init__(self, address: PostgreSQLAddress, wake: Callable[[], None]) -> None:
        self._address = address
        self._wake = wake
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._stopped = False
        self._failures = 0  # since it last listened

    def stop(self) -> None:
        """End `run`; from any thread."""
        self._stopped = True
        try:
            self._wake_writer.send(b"\0")
        except OSError:
            return  # `run` has ended, and closed it

    def run(self) -> None:
        """Listen, and connect again whenever the connection is lost."""
        while not self._stopped:
            try:
                self._listen()
            except FOREIGN as error:
                if not self._failures:
                    text = "no notifications from %s, which %s; meanwhile rows wait for a sweep"
                    write(logger, logging.WARNING, text, self._address.name, describe(error))
                pause = PAUSE.delay(self._failures)
                self._failures += 1
            else:
                pause = POOLED_PAUSE  # unless it was stopped
            self._wait_readable(None, pause)
        self._wake_reader.close()
        self._wake_writer.close()

    def _listen(self) -> None:
        """Listen until `stop`; return at once where there is a pooler."""
        connection = dial(self._address, name="mlproducer-listen")
        try:
            connection.deadline = time.monotonic() + CONNECT_TIMEOUT
            row = connection.execute("SELECT pg_backend_pid()").fetchone()
            if row is None or row[0] != connection.pgconn.backend_pid:
                text = (
                    "%s is behind a pooler, through which notifications do not come: rows of the "
                    "outbox wait for the next sweep"
                )
                write(logger, logging.WARNING, text, self._address.name)
                return
            connection.execute(f'LISTEN "{sql.channel(self._address.table)}"'.encode())
            self._failures = 0
            self._wake()  # for rows that came before LISTEN
            came = True
            while not self._stopped:
                if self._wait_readable(connection.pgconn.socket, AGAIN if came else CHECK):
                    connection.pgconn.consume_input()
                elif came:
                    self._wake()
                else:
                    connection.deadline = time.monotonic() + CONNECT_TIMEOUT
                    connection.execute("SELECT 1")
                came = False
                while connection.pgconn.notifies() is not None:
                    came = True
                if came:
                    self._wake()
        finally:
            connection.close()

    def _wait_readable(self, descriptor: int | None, patience: float) -> bool:
        """Wait until there is something to read, or for `stop`; return false if nothing came."""
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(patience * 1000))
