"""The SQLite store's use of its file: transactions, their failures, and forks.

A fork waits until no call to SQLite is in progress, and closes the file before: SQLite keeps its
record of the locks on a file once for a process, and a child that inherited this record would
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
from mlproducer._synchronization import Token
from mlproducer.errors import StoreError
from mlproducer.stores.sqlite import rows as rows_of
from mlproducer.stores.sqlite.disk_reserve import PAGE, Reserve, need, size_on
from mlproducer.stores.sqlite.file import Connections, corrupt, is_there, open_file
from mlproducer.stores.sqlite.owners import Owner
from mlproducer.stores.sqlite.rows import Fence

T = TypeVar("T")

Connection = sqlite3.Connection
Work = Callable[[Connection], T]

WAIT = 0.25
"""Seconds to wait for another writer."""

LOOK = 0.5
"""Seconds between two checks for owners that have ended."""

MANY = 1_000_000

TRUST = 1.0
"""Seconds between two checks of the disk; each call to the system releases the GIL, and getting
it back from a busy thread can take 5 ms."""

SHRINK_STEPS = 64
"""How often, at most, 64 pages are returned to a full disk."""

FORK_WAIT = 10.0
"""Seconds for which a fork waits for a call in progress, and a call for another."""


class _LockedError(StoreError):
    """Another writer holds SQLite's lock."""


class Database:
    """The file as one process uses it: opened at its first use, and again after it was replaced.

    :param horizon: seconds; a row that is due later was written by another clock, and is due now
    :param clock: returns monotonic seconds
    :ivar most_rows: how many rows a call may change; few where only the reserve's space is left
    :ivar owner: this process as a user of the file
    :ivar fence: from which tokens are made, since the file was opened
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
        self._exists_until = 0.0
        self._space = 0
        self._space_until = 0.0
        self._entered: int | None = None  # the lock's file when this owner was recorded
        self._may_own = False
        self._dead: list[int] = []
        self._dead_until = 0.0
        self.most_rows = MANY

    def now(self) -> float:
        """Return the time by the file's clock; within a call."""
        return self._shift + self._clock()

    # --- calls ---------------------------------------------------------------------------------

    def store(self, work: Work[T], patience: float) -> T:
        """Do work in a transaction that needs space on the disk, and is on disk afterwards."""
        self._exists_until = 0.0
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
        if time.monotonic() >= self._space_until:
            self._reserve.fill()
            self._space, self._space_until = self._reserve.free_space(), time.monotonic() + TRUST
        return _transact(connections.safe, work, patience)

    def take_space(self, sizes: Iterable[int]) -> None:
        """Check, within a call, that messages fit into log and file without using the reserve.

        :raises OSError: there is not enough space
        """
        size = need(sizes)
        if size > self._space:
            self._space = self._reserve.free_space()
        if size > self._space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._space -= size

    def change(self, work: Work[T], *, safe: bool = False) -> T:
        """Do work in a transaction, even where the disk is full.

        :param safe: it is on disk afterwards
        """
        return self._even_if_full(lambda each: _transact(each, work, WAIT), safe=safe)

    def own(self, work: Work[T]) -> T:
        """Do work that claims rows in a transaction, even where the disk is full."""
        return self._even_if_full(
            lambda each: _transact(each, work, WAIT), safe=False, entering=True
        )

    def run(self, work: Work[T]) -> T:
        """Run one statement, even where the disk is full."""
        return self._even_if_full(lambda each: _patiently(lambda: work(each), WAIT), safe=False)

    def close(self) -> None:
        """Make this process's claims due, if the file is open, and close it.

        The last process that does so moves the log to the file. Where another process is writing,
        the claims are left as they are: the others see that this owner has ended.
        """
        self.leave_parent()
        if self._connections is None:
            return
        try:
            if self._may_own:
                self.change(self._give_back)
        except _LockedError:
            if not self.owner.place:
                raise
        finally:
            with self._alone():
                self._drop()
                self.owner.leave()
                self._may_own = False

    def _give_back(self, connection: Connection) -> None:
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
            self._release_reserve()
            _checkpoint(connections)
            self.most_rows = max(1, size_on(self._path) // 4 // PAGE)
            try:
                if entering:
                    self._enter(connections, WAIT)
                return work(connection)
            finally:
                self.most_rows = MANY

    def _enter(self, connections: Connections, patience: float) -> None:
        """Record this owner, and skip keys, before it stores or claims its first row."""
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
        """Return the owners that are known to have ended, as of half a second ago."""
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
        """Return unused pages of log and file to the disk, in steps, since that needs space too."""
        self._space_until = 0.0
        _checkpoint(connections)
        for _ in range(SHRINK_STEPS):
            (unused,) = connections.quick.execute("PRAGMA freelist_count").fetchone()
            if unused == 0:
                break
            self._release_reserve()
            connections.quick.execute("PRAGMA incremental_vacuum(64)").fetchall()
            _checkpoint(connections)

    def _release_reserve(self) -> bool:
        self._space_until = 0.0
        return self._reserve.release()

    @contextmanager
    def _use(self, patience: float = WAIT) -> Iterator[Connections]:
        """Open the file for one call, and turn errors into `StoreError`."""
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
        """Hold the token: wait for calls of other threads, and for forks, and keep them out."""
        self.leave_parent()
        if self._token.is_here:  # a signal handler or finalizer, in the middle of a call
            raise StoreError(f"the store {self._path} is in use by the call that was interrupted")
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
        if time.monotonic() < self._exists_until:
            return connections
        if is_there(self._path, connections.inode):
            self._exists_until = time.monotonic() + TRUST
            return connections
        self._drop()
        raise StoreError(
            f"the store {self._path} was removed or replaced while it was in use; what was in it "
            "is lost, and the next call starts afresh"
        )

    def _open(self, patience: float) -> Connections:
        if any(path == self._path for path, _ in _inherited):
            raise StoreError(
                f"the store {self._path} was in use when this process was forked, and cannot be "
                "used here: fork before it is first used"
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
        except sqlite3.OperationalError:  # SQLite says "I/O error" where its index has no space
            if not self._release_reserve():
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
        """Whether this thread is in the middle of a call."""
        return self._token.is_here

    def hold(self) -> None:
        """Close the file, and keep it closed, before a fork, unless a call takes too long."""
        if self._token.take(time.monotonic() + FORK_WAIT):
            self._drop()

    def let_go(self) -> None:
        """Allow calls again after a fork, in the parent; does nothing where `hold` did nothing."""
        self._token.give()

    def leave_parent(self) -> None:
        """In a forked child, keep the parent's connections from being closed by garbage collection.

        Closing them would drop the parent's locks on the file.
        """
        if self._pid == os.getpid():
            return
        if self._opening or self._connections is not None:
            _inherited.append((self._path, self._connections))
        self.owner.leave()
        self._begin()


_inherited: list[tuple[str, Connections | None]] = []


class _Forks:
    """Keeps forks and calls apart, for all databases, whether they have been used or not.

    SQLite has mutexes (its allocator's, that of the list of open files). A child that inherited one
    while another thread of the parent held it would wait for it for ever.
    """

    def __init__(self) -> None:
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._begin()

    def _begin(self) -> None:
        self._token = Token()  # held by a fork, so that no database is added meanwhile
        self._held: dict[int, list[Callable[[], None]]] = {}

    def add(self, database: Database) -> None:
        """Have forks wait for this database; if a fork is in progress, wait for it."""
        taken = self._token.take(time.monotonic() + FORK_WAIT)
        try:
            self._databases.add(database)
        finally:
            if taken:
                self._token.give()

    def before(self) -> None:
        # What is to be released is noted before it is taken: after an interrupt in here the
        # parent still releases it, in in_parent().
        held = self._held[threading.get_ident()] = [self._token.give]
        self._token.take(time.monotonic() + FORK_WAIT)
        for database in list(self._databases):
            if not database.is_used_here:  # else a signal handler forks, amid a call that goes on
                held.append(database.let_go)
                database.hold()

    def in_parent(self) -> None:
        for give in self._held.pop(threading.get_ident(), []):
            give()

    def in_child(self) -> None:
        """Start with a new token: the threads that wait for the parent's do not exist here."""
        self._begin()
        for database in self._databases:
            database.leave_parent()


_forks = _Forks()

forks.in_child(_forks.in_child)
forks.around(_forks.before, _forks.in_parent)


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
    """Try again for as long as another writer holds SQLite's lock."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if _fault(error) != LOCKED or time.monotonic() >= deadline:
                raise


def _checkpoint(connections: Connections) -> None:
    """Move the log to the file, as far as no other connection is reading it."""
    connections.quick.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# --- failures -----------------------------------------------------------------------------------

LOCKED = "is locked"
FULL = "is full"
CORRUPT = ("malformed", "not a database")
READ_ONLY = ("readonly", "unable to open")


def _fault(error: sqlite3.Error) -> str:
    """Classify an error by SQLite's text: ``sqlite_errorcode`` came with Python 3.11."""
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
        return f"the store {path} is on a full disk: free some space"
    if fault in CORRUPT:
        return corrupt(path)
    if fault in READ_ONLY:
        return (
            f"the store {path} cannot be written: this user needs the right to write to the file "
            f"and its directory ({error})"
        )
    return f"the store {path} cannot be used: {error}"
