"""The file of the SQLite store: how it comes to be, and what it must be to be used.

A file that is not right is left as it is: everything is checked before anything may write. It is
never opened but by SQLite, since closing a descriptor of one's own would give up SQLite's locks
(sqlite.org, *How To Corrupt An SQLite Database File*, 2.2).

Runs on: the retry thread.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from contextlib import ExitStack, closing
from pathlib import Path

from attrs import field, frozen

from mlproducer.errors import StoreError
from mlproducer.stores.sqlite import path_checks as place
from mlproducer.stores.sqlite.owners import Owner, boot_id
from mlproducer.stores.sqlite.reserve import PAGE, size_on
from mlproducer.stores.sqlite.rows import MIGRATION, SCHEMA

APPLICATION_ID = 0x6D6C7072
VERSION = 2

OLDEST = (3, 33, 0)
"""The SQLite that has ``UPDATE ... FROM``."""

BUSY_WAIT = 0.02
"""Seconds for which SQLite waits for another writer before it asks whether to go on waiting."""

CHECKED_BYTES = 256 * 1024 * 1024
"""Files up to this size are read and checked as a whole when opened, in about a second."""

SMALLEST = 512
"""Bytes of SQLite's smallest page."""

BOOT_SECONDS = 1e9
"""What the clock of a file is put on by at each boot of the machine, so that all is due then."""

_LEVELS = ("FULL", "NORMAL")

_SETUP = (
    "PRAGMA synchronous = {synchronous}",
    "PRAGMA secure_delete = FAST",  # what was deleted is overwritten where that costs no write
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA cache_size = -8192",
    "PRAGMA wal_autocheckpoint = {pages}",  # with the reserve's room it can always be moved
    "PRAGMA journal_size_limit = {size}",  # what a reader made it grow to is given back
)


@frozen
class Connections:
    """Two connections to one file.

    :ivar safe: each of its transactions is on the disk when it ends
    :ivar quick: its last ones may be undone by a power failure, as a whole and in order
    :ivar shift: what this machine's monotonic clock lags behind the file's, in seconds
    :ivar inode: which file it is, for `is_there`
    """

    safe: sqlite3.Connection = field(repr=False)
    quick: sqlite3.Connection = field(repr=False)
    shift: float
    inode: tuple[int, int]

    def close(self) -> None:
        """Close both; the last connection of all moves what is in the log to the file."""
        self.quick.close()
        self.safe.close()


def open_file(path: str, horizon: float, owner: Owner, *, check: bool) -> Connections:
    """Open a file, or make it.

    :param owner: who uses it; its lock is held from now on
    :param check: read it as a whole
    :raises StoreError: it is not what it should be, or not where it should be
    :raises sqlite3.Error: SQLite says so
    """
    if sqlite3.sqlite_version_info < OLDEST:
        raise StoreError(
            f"the store {path} needs SQLite 3.33 or later, and this Python has "
            f"{sqlite3.sqlite_version}: use a later Python"
        )
    try:
        version, inode = _prepare(path, owner, check=check)
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be opened or made: {error.strerror}; "
            "it needs a directory in which this user may write"
        ) from None
    if version != VERSION:
        _migrate(path)
    with ExitStack() as undo:
        safe, quick = (undo.enter_context(closing(_connect(path, each))) for each in _LEVELS)
        place.check_companions(path)  # those that are in use now, before a message is in them
        connections = Connections(safe, quick, _clock(safe, horizon), inode)
        undo.pop_all()
    return connections


def _prepare(path: str, owner: Owner, *, check: bool) -> tuple[int, tuple[int, int]]:
    """See that a file is there and right, and only then leave something beside it.

    :returns: its version, and which file it is
    """
    place.check_directory(path)
    place.check_mounts(path)
    made = _is_ours(path)
    place.check_companions(path)
    if not made:
        owner.enter()
        _create(path, owner)
    place.check_one_name(path, owner)
    inode = _inode(path)
    version = _check_header(path)
    if check:
        _check_content(path)
    owner.enter()
    if check:
        place.remove_drafts(path, owner)
    return version, inode


def is_there(path: str, inode: tuple[int, int]) -> bool:
    """Whether the path still names the file that was opened."""
    try:
        return _inode(path) == inode
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


# --- what is there already ----------------------------------------------------------------------


def _is_ours(path: str) -> bool:
    """Whether there is a file, which then is one that only we can have put there."""
    status = _status(path)
    if status is None:
        if not _has_log(path):
            return False
        status = _status(path)  # another process may have made it between these two looks
    if status is None:
        raise StoreError(
            f"the store {path} is not there, but its log {path}-wal is: put the file back, or "
            "remove the log to begin anew"
        )
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"the store {path} is a symbolic link: name the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"the store {path} is not a regular file")
    if status.st_mode & stat.S_IRWXO:
        raise StoreError(f"the store {path} is open to all users: chmod 600, and see who it was")
    if status.st_uid != os.geteuid() and os.geteuid() and _is_shared(path):
        raise StoreError(f"the store {path} is another user's, in a directory for everyone")
    if status.st_size == 0:
        raise StoreError(
            f"the store {path} is empty, so what was in it is gone: remove it to begin anew"
        )
    if status.st_size < SMALLEST:
        raise StoreError(corrupt(path))  # SQLite would take it for an empty database
    return True


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _has_log(path: str) -> bool:
    status = _status(f"{path}-wal")
    return status is not None and status.st_size > 0


def _is_shared(path: str) -> bool:
    return bool(os.stat(os.path.dirname(path)).st_mode & stat.S_IWOTH)  # noqa: PTH116, PTH120


def _check_header(path: str) -> int:
    """Give the schema's version by the first page alone, which takes no lock and leaves no trace.

    Without its log a file may look cut off: its last writer was killed while it moved the log.
    """
    with closing(_raw(path, "mode=ro&immutable=1")) as connection:
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            if "malformed" in str(error):
                return VERSION
            raise
    if application != APPLICATION_ID:
        raise StoreError(f"the store {path} is another program's database: choose another path")
    _check_version(path, version)
    return int(version)


def _check_version(path: str, version: int) -> None:
    if not 1 <= version <= VERSION:
        raise StoreError(
            f"the store {path} has schema {version}, and this version of mlproducer knows "
            f"{VERSION}: use the version that wrote it"
        )


def _migrate(path: str) -> None:
    """Bring a file of an earlier version to this one's tables, as a whole or not at all."""
    with closing(_raw(path, "mode=rw")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        _check_version(path, version)
        if version == VERSION:
            return  # another process was faster
        for statement in re.sub("--.*", "", MIGRATION).split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _check_content(path: str) -> None:
    if os.lstat(path).st_size > CHECKED_BYTES:
        return
    with closing(_raw(path, "mode=ro")) as connection:
        (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise StoreError(corrupt(path))


def corrupt(path: str) -> str:
    """Say what to do with a file that SQLite calls corrupt or no database."""
    return (
        f"the store {path} is corrupt, or no SQLite database: move it away together with its -wal "
        "and -shm; 'sqlite3 FILE .recover' may still read messages from it"
    )


# --- what is not --------------------------------------------------------------------------------


def _create(path: str, owner: Owner) -> None:
    """Make a file that is complete from its first moment, and whose owner alone may read it."""
    with place.draft_of(path, owner) as draft:
        with closing(_raw(draft, "mode=rw")) as connection:
            connection.executescript(
                f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {VERSION};"
                f"BEGIN; {SCHEMA} COMMIT; PRAGMA journal_mode = WAL;"
            )
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # another process was faster, and its file is as good
    _sync_directory(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH120
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- connections --------------------------------------------------------------------------------


def _raw(path: str, query: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{Path(path).as_uri()}?{query}",
        uri=True,
        timeout=BUSY_WAIT,
        isolation_level=None,
        check_same_thread=False,  # the thread that forks closes it
        cached_statements=64,
    )


def _connect(path: str, synchronous: str) -> sqlite3.Connection:
    connection = _raw(path, "mode=rw")
    try:
        size = size_on(path)
        pages = size // 2 // PAGE
        for statement in _SETUP:
            text = statement.format(synchronous=synchronous, pages=pages, size=size)
            connection.execute(text).fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _clock(connection: sqlite3.Connection, horizon: float) -> float:
    """Enter this boot and this horizon, and give the file's shift."""
    boot = boot_id()
    known, most, shift = connection.execute("SELECT boot, horizon, shift FROM clock").fetchone()
    if known == boot and most >= horizon:
        return float(shift)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        "UPDATE clock SET boot = ?, shift = shift + ?, horizon = 0 WHERE boot <> ?",
        (boot, BOOT_SECONDS, boot),
    )
    connection.execute("UPDATE clock SET horizon = ? WHERE horizon < ?", (horizon, horizon))
    (shift,) = connection.execute("SELECT shift FROM clock").fetchone()
    connection.execute("COMMIT")
    return float(shift)
