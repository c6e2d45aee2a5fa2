"""What the stores on a server share: a call that got no answer is undone before anything else.

The answer to a call can be lost after the server has carried it out. The caller then gets a
`StoreError`, and has to be able to rely on it: nothing of the call may take effect. So each call
that stores, claims or releases rows has a number, under which the next call undoes it. A failover
may keep the call and lose the undoing; so the last ones are undone again over each new connection,
which may lead to another server.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from attrs import frozen

from mlproducer._foreign_calls import write
from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Claim, Entry

logger = logging.getLogger(__name__)

MIN_PATIENCE = 0.05
"""Seconds that the server has in any case."""

MOST_UNDONE = 8
"""Calls that are undone again over a new connection; before a failover there are one or two."""

ROOM = 16 * 1024 * 1024
"""Bytes of messages that one call reads, so that a backlog of large ones does not fill memory."""

DAY = 86_400.0

_inherited: list[object] = []
"""Connections of a parent process. They are kept, since garbage collection would close them, and
say goodbye to the server over a socket that the parent still uses."""


class _Connection(Protocol):
    def get_ready(self) -> bool: ...
    def drop(self) -> None: ...


@frozen
class Call:
    """A call that has got no answer yet.

    :ivar undo: how it is undone
    """

    undo: str
    number: int
    claims: Sequence[Claim] = ()


class StoreOnServer(ABC):
    """The calls of one process to a store on a server.

    :ivar name: the place, for logs and errors
    """

    name: str
    _connection: _Connection

    def _start(self) -> None:
        """Set the state of a process that has made no call yet; subclasses add their own."""
        self._pid = os.getpid()
        self._number = 0
        self._unanswered: Call | None = None
        self._undone: deque[Call] = deque(maxlen=MOST_UNDONE)
        self._new_connection = False
        self._unfreed: list[tuple[Claim, float]] = []

    @abstractmethod
    def _undo(self, call: Call) -> None:
        """Undo a call; nothing happens where it never took effect."""

    @abstractmethod
    def _free(self, delayed: Sequence[tuple[Claim, float]]) -> None:
        """Make rows due after their delays; a second time it does nothing."""

    def _get_ready(self) -> None:
        """Connect if need be, and finish what earlier calls left undone."""
        self._leave_parent()
        self._new_connection = self._connection.get_ready() or self._new_connection
        self._undo_again()
        self._settle()

    def _leave_parent(self) -> None:
        """In a forked child, leave the parent's connection alone, and start as another owner."""
        if self._pid != os.getpid():
            _inherited.append(self._connection)
            self._start()

    def _settle(self) -> None:
        if self._unanswered is not None:
            self._undo(self._unanswered)
            if not self._unanswered.claims:  # a release is not: it may have been repeated since
                self._undone.append(self._unanswered)
            self._unanswered = None
        if self._unfreed:
            self._free(self._unfreed)
            self._unfreed = []

    def _undo_again(self) -> None:
        if self._new_connection:
            for call in self._undone:
                self._undo(call)
            self._new_connection = False

    def _next_call(self, undo: str, claims: Sequence[Claim] = ()) -> int:
        """Number a call that is to be undone unless it gets an answer: `_answered`."""
        self._number += 1
        self._unanswered = Call(undo, self._number, claims)
        return self._number

    def _answered(self) -> None:
        self._unanswered = None

    def _free_stored(self, entries: Iterable[Entry], claims: Iterable[Claim]) -> None:
        """Make rows that were stored just now due after their delays.

        Rows are stored claimed, and freed by a second call: until the answer to the first is here,
        no other process may send a message whose publisher may be told that it was not stored.
        """
        self._unfreed = [
            (claim, entry.delay)
            for entry, claim in zip(entries, claims, strict=True)
            if entry.delay is not None
        ]
        try:
            self._settle()
        except StoreError as error:
            text = "messages are stored, but stay claimed until this has ended: %s"
            write(logger, logging.WARNING, text, error)
