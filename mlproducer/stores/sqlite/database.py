"""How the SQLite store uses its file: transactions, their failures, and forks.

A fork waits until no call to SQLite is under way, and finds the file closed. It has to be so: what
SQLite knows of its locks on a file is held once for a process, and a child that inherited it would
believe that it holds its parent's locks, which it does not.

Runs on: the retry thread; a command's thread for what only reads; the thread that forks.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._latch import Token
from mlproducer.errors import StoreError
from mlproducer.stores.sqlite import rows as rows_of
from mlproducer.stores.sqlite.file import Connections, corrupt, is_there, open_file
from mlproducer.stores.sqlite.owners import Owner
from mlproducer.stores.sqlite.reserve import PAGE, Reserve, need, size_on
from mlproducer.stores.sqlite.rows import Fence

T = TypeVar("T")

Connection = sqlite3.Connection
Work = Callable[[Connection], T]

WAIT = 0.25
"""Seconds to wait for another writer."""

LOOK = 0.5
"""Seconds between two looks for owners that have ended."""

MANY = 1_000_000

TRUST = 1.0
"""Seconds between two looks at the disk: for each one the interpreter's lock is let go."""

SHRINK_STEPS = 64
"""How often 64 pages are given back to a full disk before it is left at that."""

FORK_WAIT = 10.0
"""Seconds for which a fork waits for a call that is under way, and a call for another."""


class _LockedError(StoreError):
    """Another writer is in the way."""


class Database:
    """The file as one process uses it: opened at its first use, and again after it was lost.

    :param horizon: seconds; what is due later than that was written by another clock
    :param clock: gives monotonic seconds
    :ivar most_rows: how many rows a call may change: few where it has only the reserve's room
    :ivar owner: this process as a user of the file
    :ivar fence: what its tokens are made of, since the file was opened
    """

    def __init__(self, path: str, horizon: float, clock: Callable[[], float]) -> None:
        self._path = path
        self._horizon = horizon
        self._clock = clock
        self._reserve = Reserve(path)
        self._checked = False
        self._begin()
        _forks.add(self)  # before the first use: a fork has to wait for the opening too

    def _begin(self) -> None:
        self._pid = os.getpid()
        self.owner = Owner(f"{self._path}-owners")
        self.fence = Fence()
        self._token = Token()  # held in each call to SQLite, and by a fork
        self._connections: Connections | None = None
        self._opening = False
        self._shift = 0.0
        self._sure_until = 0.0
        self._room = 0
        self._room_until = 0.0
        self._entered: int | None = None  # where the lock was when this owner was made known
        self._may_own = False
        self._dead: list[int] = []
        self._dead_until = 0.0
        self.most_rows = MANY

    def now(self) -> float:
        """Give the time by the file's clock, within a call."""
        return self._shift + self._clock()

    # --- calls ---------------------------------------------------------------------------------

    def store(self, work: Work[T], patience: float) -> T:
        """Do work in a transaction that is on the disk afterwards, and has to have room there."""
        self._sure_until = 0.0
        with self._use(patience) as connections:
            try:
                return self._store(connections, work, patience)
            except (sqlite3.Error, OSError) as error:
                if not _is_full(error):
                    raise
            self._shrink(connections)
            return self._store(connections, work, patience)

    def _store(self, connections: Connections, work: Work[T], patience: float) -> T:
        self._enter(connections, patience)
        if time.monotonic() >= self._room_until:
            self._reserve.fill()
            self._room, self._room_until = self._reserve.room(), time.monotonic() + TRUST
        return _transact(connections.safe, work, patience)

    def take_room(self, sizes: Iterable[int]) -> None:
        """See, within a call, that messages fit into log and file beside the reserve.

        :raises OSError: they do not
        """
        size = need(sizes)
        if size > self._room:
            self._room = self._reserve.room()
        if size > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= size

    def change(self, work: Work[T], *, safe: bool = False) -> T:
        """Do work in a transaction, also where the disk is full.

        :param safe: it is on the disk afterwards
        """
        return self._even_if_full(lambda each: _transact(each, work, WAIT), safe=safe)

    def own(self, work: Work[T]) -> T:
        """Do work that claims rows, likewise."""
        return self._even_if_full(
            lambda each: _transact(each, work, WAIT), safe=False, entering=True
        )

    def run(self, work: Work[T]) -> T:
        """Run one statement, also where the disk is full."""
        return self._even_if_full(lambda each: _patiently(lambda: work(each), WAIT), safe=False)

    def close(self) -> None:
        """Make this process's claims due, if the file is open, and close it.

        The last process that does so moves the log to the file. While another one writes, the
        claims are left to the others, who see that this owner has ended.
        """
        self.leave_the_parent()
        if self._connections is None:
            return
        try:
            if self._may_own:
                self.change(self._go)
        except _LockedError:
            if not self.owner.place:
                raise
        finally:
            with self._alone():
                self._drop()
                self.owner.leave()
                self._may_own = False

    def _go(self, connection: Connection) -> None:
        values = {"me": self.owner.number, "now": self.now()}
        for statement in rows_of.GIVE_BACK:
            connection.execute(statement, values)

    def _even_if_full(self, work: Work[T], *, safe: bool, entering: bool = False) -> T:
        with self._use() as connections:
            connection = connections.safe if safe else connections.quick
            try:
                if entering:
                    self._enter(connections, WAIT)
                return work(connection)
            except sqlite3.OperationalError as error:
                if not _is_full(error):
                    raise
            self._give_up_reserve()
            _checkpoint(connections)
            self.most_rows = max(1, size_on(self._path) // 4 // PAGE)
            try:
                if entering:
                    self._enter(connections, WAIT)
                return work(connection)
            finally:
                self.most_rows = MANY

    def _enter(self, connections: Connections, patience: float) -> None:
        """Be known as a user of the file, and skip keys, before this process has its first row."""
        self.owner.enter()
        if self._entered == self.owner.place:
            return
        values = {"me": self.owner.number, "place": self.owner.place, "step": self.fence.step}

        def work(connection: Connection) -> None:
            for statement in rows_of.ENTER:
                connection.execute(statement, values)

        _transact(connections.quick, work, patience)
        self._entered, self._may_own = self.owner.place, True

    def dead(self, connection: Connection) -> list[int]:
        """Give the owners that are known to have ended, as of half a second ago."""
        if time.monotonic() >= self._dead_until:
            (owners,) = connection.execute(rows_of.OWNERS).fetchone()
            self._dead = [
                number
                for number, place in json.loads(owners)
                if self.owner.knows_dead(number, place)
            ]
            self._dead_until = time.monotonic() + LOOK
        return self._dead

    def take_over(self, connection: Connection) -> None:
        """Make the claims of dead owners due, within a transaction."""
        dead = self.dead(connection)
        if dead:
            values = {"dead": json.dumps(dead), "now": self.now()}
            for statement in rows_of.TAKE_OVER:
                connection.execute(statement, values)
            self._dead_until = 0.0

    def _shrink(self, connections: Connections) -> None:
        """Give the disk what log and file do not use, a little at a time: that too takes room."""
        self._room_until = 0.0
        _checkpoint(connections)
        for _ in range(SHRINK_STEPS):
            (unused,) = connections.quick.execute("PRAGMA freelist_count").fetchone()
            if unused == 0:
                break
            self._give_up_reserve()
            connections.quick.execute("PRAGMA incremental_vacuum(64)").fetchall()
            _checkpoint(connections)

    def _give_up_reserve(self) -> bool:
        self._room_until = 0.0
        return self._reserve.give_up()

    @contextmanager
    def _use(self, patience: float = WAIT) -> Iterator[Connections]:
        """Give the connections for one call, and tell what fails in the library's words."""
        with self._alone():
            try:
                yield self._opened(patience)
            except sqlite3.Error as error:
                fault = _fault(error)
                if fault not in (LOCKED, FULL):
                    self._drop()
                kind = _LockedError if fault == LOCKED else StoreError
                raise kind(_text(fault, self._path, error)) from None
            except OSError as error:
                fault = FULL if _is_full(error) else str(error.strerror)
                raise StoreError(_text(fault, self._path, error)) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the calls of other threads, and for forks; keep them waiting."""
        self.leave_the_parent()
        if self._token.is_here:  # a signal handler or finaliser amid a call of its own thread
            raise StoreError(f"the store {self._path} is in use by the call that is interrupted")
        try:
            if not self._token.take(time.monotonic() + FORK_WAIT):
                raise StoreError(
                    f"the store {self._path} is in use by another thread of this process"
                )
            yield
        finally:
            self._token.give()

    # --- the file ------------------------------------------------------------------------------

    def _opened(self, patience: float) -> Connections:
        connections = self._connections
        if connections is None:
            return self._open(patience)
        if time.monotonic() < self._sure_until:
            return connections
        if is_there(self._path, connections.inode):
            self._sure_until = time.monotonic() + TRUST
            return connections
        self._drop()
        raise StoreError(
            f"the store {self._path} was removed or replaced while it was in use; what was in it "
            "is gone, and the next call begins anew"
        )

    def _open(self, patience: float) -> Connections:
        if any(path == self._path for path, _ in _inherited):
            raise StoreError(
                f"the store {self._path} was in use when this process was forked, so that it can "
                "not be used here: fork before it is first used"
            )
        self._opening = True
        try:
            connections = self._open_even_if_full(patience)
            self._connections, self._shift = connections, connections.shift
            self._entered, self.fence, self._dead_until = None, Fence(), 0.0
        finally:
            self._opening = False
        self._checked = True
        return connections

    def _open_even_if_full(self, patience: float) -> Connections:
        try:
            return _patiently(self._open_now, patience)
        except sqlite3.OperationalError:  # without room for its index, SQLite only says I/O error
            if not self._give_up_reserve():
                raise
            return _patiently(self._open_now, patience)

    def _open_now(self) -> Connections:
        return open_file(self._path, self._horizon, self.owner, check=not self._checked)

    def _drop(self) -> None:
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    # --- forks ---------------------------------------------------------------------------------

    @property
    def is_used_here(self) -> bool:
        """Whether this thread is in a call."""
        return self._token.is_here

    def hold(self) -> None:
        """Close the file, and let no one open it, before a fork, if no thread stays in a call."""
        if self._token.take(time.monotonic() + FORK_WAIT):
            self._drop()

    def let_go(self) -> None:
        """Go on after a fork, in the parent; nothing happens where `hold` did nothing."""
        self._token.give()

    def leave_the_parent(self) -> None:
        """After a fork, keep what is open from ever being touched, even by garbage collection."""
        if self._pid == os.getpid():
            return
        if self._opening or self._connections is not None:
            _inherited.append((self._path, self._connections))
        self.owner.leave()
        self._begin()


_inherited: list[tuple[str, Connections | None]] = []


class _Forks:
    """Keeps forks and calls apart: of all databases, whether they have been used or not.

    A child must not inherit SQLite's locks (its allocator's, its list of open files) while a thread
    that it does not have holds them: it would wait for them for ever.
    """

    def __init__(self) -> None:
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._begin()

    def _begin(self) -> None:
        self._token = Token()  # held by a fork, so that no database is added meanwhile
        self._held: dict[int, list[Callable[[], None]]] = {}

    def add(self, database: Database) -> None:
        """Let forks wait for this one; if one is under way, wait for that."""
        taken = self._token.take(time.monotonic() + FORK_WAIT)
        try:
            self._databases.add(database)
        finally:
            if taken:
                self._token.give()

    def before(self) -> None:
        # Who gives back is noted first: an interrupt in here does not keep the fork from going on.
        held = self._held[threading.get_ident()] = [self._token.give]
        self._token.take(time.monotonic() + FORK_WAIT)
        for database in list(self._databases):
            if not database.is_used_here:  # else a signal handler forks, and must not end that call
                held.append(database.let_go)
                database.hold()

    def in_parent(self) -> None:
        for give in self._held.pop(threading.get_ident(), []):
            give()

    def in_child(self) -> None:
        """Begin anew: those who wait for the parent's locks are not here to be let through."""
        self._begin()
        for database in self._databases:
            database.leave_the_parent()


_forks = _Forks()

forks.in_child(_forks.in_child)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forks.before, after_in_parent=_forks.in_parent)


# --- transactions -------------------------------------------------------------------------------


def _transact(connection: sqlite3.Connection, work: Work[T], patience: float) -> T:
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"), patience)
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _patiently(work: Callable[[], T], patience: float) -> T:
    """Begin again for as long as another writer is in the way."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if _fault(error) != LOCKED or time.monotonic() >= deadline:
                raise


def _checkpoint(connections: Connections) -> None:
    """Move the log to the file, as far as no one reads it."""
    connections.quick.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# --- failures -----------------------------------------------------------------------------------

LOCKED = "is locked"
FULL = "is full"
CORRUPT = ("malformed", "not a database")
READ_ONLY = ("readonly", "unable to open")


def _fault(error: sqlite3.Error) -> str:
    """Name a fault by SQLite's text; its code is known to Python 3.11 and later only."""
    text = str(error)
    kinds = (LOCKED, FULL, *CORRUPT, *READ_ONLY)
    return next((kind for kind in kinds if kind in text), "")


def _is_full(error: sqlite3.Error | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _fault(error) == FULL


def _text(fault: str, path: str, error: sqlite3.Error | OSError) -> str:
    if fault == LOCKED:
        return f"the store {path} is locked by another writer"
    if fault == FULL:
        return f"the store {path} is on a full disk: make room there"
    if fault in CORRUPT:
        return corrupt(path)
    if fault in READ_ONLY:
        return (
            f"the store {path} cannot be written: this user needs the right to write to the file "
            f"and its directory ({error})"
        )
    return f"the store {path} cannot be used: {error}"
