"""Listens for the NOTIFY that a COMMIT with rows of an outbox brings, and has them sent at once.

Owns a connection of its own, since LISTEN holds a session. Nothing depends on it: where it cannot
listen, the next sweep finds the rows. A pooler such as pgbouncer gives each transaction another
session, so that LISTEN would be heard by no one; it is told by the session's number, which is not
the one that the connection was given.

Runs on: a thread ``mlproducer-listen``.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable

from mlproducer import _clock as time
from mlproducer._guard import write
from mlproducer._store_url import PostgreSQLAddress
from mlproducer.stores.postgres import sql
from mlproducer.stores.postgres.session import CONNECT_TIMEOUT, FOREIGN, describe, dial

logger = logging.getLogger(__name__)

CHECK = 60.0
"""Seconds of quiet after which the server is asked whether it is still there."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
POOLED_PAUSE = 600.0
"""Seconds after which it is tried again."""


class Listener:
    """Calls ``wake`` when rows may have come, from `run` until `stop`.

    :param wake: is called on the thread of `run`; must return at once
    """

    def __init__(self, address: PostgreSQLAddress, wake: Callable[[], None]) -> None:
        self._address = address
        self._wake = wake
        self._ear, self._bell = socket.socketpair()
        self._stopped = False

    def stop(self) -> None:
        """Have `run` end."""
        self._stopped = True
        try:
            self._bell.send(b"\0")
        except OSError:
            return  # it has ended

    def run(self) -> None:
        """Listen, and connect again whenever the connection is lost."""
        pause = FIRST_PAUSE
        while not self._stopped:
            try:
                pooled = self._listen()
            except FOREIGN as error:
                if pause == FIRST_PAUSE:
                    text = "no notifications from %s, which %s; rows wait for a sweep meanwhile"
                    write(logger, logging.WARNING, text, self._address.name, describe(error))
            else:
                pause = POOLED_PAUSE if pooled else FIRST_PAUSE
            self._heard(None, pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        self._ear.close()
        self._bell.close()

    def _listen(self) -> bool:
        """Listen until `stop`, or give up because there is a pooler in between."""
        connection = dial(self._address, name="mlproducer-listen")
        try:
            connection.deadline = time.monotonic() + CONNECT_TIMEOUT
            row = connection.execute("SELECT pg_backend_pid()").fetchone()
            if row is None or row[0] != connection.pgconn.backend_pid:
                text = (
                    "between here and %s there is a pooler, which lets no notifications through: "
                    "rows of the outbox wait for the next sweep"
                )
                write(logger, logging.WARNING, text, self._address.name)
                return True
            connection.execute(f'LISTEN "{sql.channel(self._address.table)}"'.encode())
            self._wake()  # for what came before
            while not self._stopped:
                if self._heard(connection.pgconn.socket, CHECK):
                    connection.pgconn.consume_input()
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
        return False

    def _heard(self, descriptor: int | None, patience: float) -> bool:
        """Wait until there is something to read, or `stop`; false if nothing came."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(patience * 1000))
