"""Create, check and open the file of the SQLite store.

A file that fails a check is left unchanged: everything is checked before anything may write. The
file is opened by SQLite alone: closing any other descriptor of it would drop SQLite's POSIX locks
(sqlite.org, *How To Corrupt An SQLite Database File*, 2.2).

Runs on: the retry thread.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from contextlib import ExitStack, closing
from pathlib import Path

from attrs import field, frozen

from mlproducer.errors import StoreError
from mlproducer.stores.sqlite import path_checks as place
from mlproducer.stores.sqlite.disk_reserve import PAGE, size_on
from mlproducer.stores.sqlite.owners import Owner, boot_id
from mlproducer.stores.sqlite.rows import MIGRATION, OWNERS, SCHEMA

APPLICATION_ID = 0x6D6C7072
VERSION = 2

OLDEST = (3, 33, 0)
"""The first SQLite that has ``UPDATE ... FROM``."""

BUSY_WAIT = 0.02
"""Seconds for which SQLite itself waits for another writer; `Database` then tries again."""

CHECKED_BYTES = 256 * 1024 * 1024
"""Files up to this size are read and checked as a whole when opened, within about a second."""

SMALLEST = 512
"""Bytes of SQLite's smallest page."""

BOOT_SECONDS = 1e9
"""By how much a file's clock is set forward after each boot, so that every row is due then."""

_LEVELS = ("FULL", "NORMAL")

_SETUP = (
    "PRAGMA synchronous = {synchronous}",
    "PRAGMA secure_delete = FAST",  # overwrite what was deleted where that costs no write
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA cache_size = -8192",
    "PRAGMA wal_autocheckpoint = {pages}",  # the reserve is large enough to move such a log
    "PRAGMA journal_size_limit = {size}",  # truncate a log that a reader made grow
)


@frozen
class Connections:
    """Two connections to one file.

    :ivar safe: each transaction is on disk when it ends
    :ivar quick: a power failure may undo the last transactions, each as a whole
    :ivar shift: seconds by which the file's clock is ahead of the machine's monotonic clock
    :ivar inode: device and inode of the file, for `is_there`
    """

    safe: sqlite3.Connection = field(repr=False)
    quick: sqlite3.Connection = field(repr=False)
    shift: float
    inode: tuple[int, int]

    def close(self) -> None:
        """Close both; the last connection of all processes moves the log to the file."""
        self.quick.close()
        self.safe.close()


def open_file(path: str, horizon: float, owner: Owner, *, check: bool) -> Connections:
    """Open a file, or create it.

    :param owner: the user of the file, whose lock is held from now on
    :param check: read and check the whole file
    :raises StoreError: the file, or where it is, fails a check
    :raises sqlite3.Error: SQLite cannot open it
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
            f"the store {path} cannot be opened or created: {error.strerror}; "
            "it needs a directory in which this user may write"
        ) from None
    if version != VERSION:
        _migrate(path)
    with ExitStack() as undo:
        safe, quick = (undo.enter_context(closing(_connect(path, each))) for each in _LEVELS)
        place.check_companions(path)  # the log and index in use, before a message is in them
        connections = Connections(safe, quick, _clock(safe, horizon, owner), inode)
        undo.pop_all()
    return connections


def _prepare(path: str, owner: Owner, *, check: bool) -> tuple[int, tuple[int, int]]:
    """Check a file, or create it, and only then create others beside it.

    :returns: the file's version, and its device and inode
    """
    place.check_directory(path)
    place.check_mounts(path)
    exists = _exists(path)
    place.check_companions(path)
    if not exists:
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
    """Return whether the path still names the file that was opened."""
    try:
        return _inode(path) == inode
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


# --- a file that exists -------------------------------------------------------------------------


def _exists(path: str) -> bool:
    """Return whether the file exists; raise where another user could have put it there."""
    status = _status(path)
    if status is None:
        if not _has_log(path):
            return False
        # Another process may have created the file, and its log, since the first look.
        status = _status(path)
    if status is None:
        raise StoreError(
            f"the store {path} does not exist, but its log {path}-wal does: put the file back, or "
            "remove the log to start afresh"
        )
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"the store {path} is a symbolic link: name the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"the store {path} is not a regular file")
    if status.st_mode & stat.S_IRWXO:
        raise StoreError(
            f"the store {path} is accessible to all users: chmod 600, and find out who set that"
        )
    if status.st_uid != os.geteuid() and os.geteuid() and _is_shared(path):
        raise StoreError(
            f"the store {path} belongs to another user, in a directory that all may write to"
        )
    if status.st_size == 0:
        raise StoreError(
            f"the store {path} is empty, so what was in it is gone: remove it to start afresh"
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
    """Return the schema's version, from the first page alone: without a lock, writing nothing.

    Read without its log, a file may look truncated: its last writer was killed while it moved the
    log to the file.
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
            f"the store {path} has schema {version}, and this version of mlproducer reads "
            f"{VERSION}: use the version that wrote it"
        )


def _migrate(path: str) -> None:
    """Migrate a file of an earlier version, in one transaction."""
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
    """Return what to do with a file that SQLite calls corrupt, or not a database."""
    return (
        f"the store {path} is corrupt, or not an SQLite database: move it away with its -wal "
        "and -shm; 'sqlite3 FILE .recover' may still read messages from it"
    )


# --- a new file ---------------------------------------------------------------------------------


def _create(path: str, owner: Owner) -> None:
    """Create a file that is complete as soon as it has its name, and readable by its owner only."""
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
            return  # another process was faster, and its file is complete too
    _sync_directory(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH120
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- connections --------------------------------------------------------------------------------


def _raw(path: str, query: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{Path(path).as_uri()}?{query}",
        uri=True,
        timeout=BUSY_WAIT,
        isolation_level=None,
        check_same_thread=False,  # the thread that forks closes it
        cached_statements=64,
    )
    # What SQLite would put into temporary files: in a container with a read-only root there may be
    # no directory for them, and parts of messages do not belong into /tmp.
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


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


def _clock(connection: sqlite3.Connection, horizon: float, owner: Owner) -> float:
    """Record this boot and this horizon in the file, and return its shift.

    Containers of one machine may have boot ids of their own (LXC, systemd-nspawn), but their clock
    is the machine's: while another owner lives, there was no boot.
    """
    boot = boot_id()
    known, most, shift = connection.execute("SELECT boot, horizon, shift FROM clock").fetchone()
    if known == boot and most >= horizon:
        return float(shift)
    connection.execute("BEGIN IMMEDIATE")
    (owners,) = connection.execute(OWNERS).fetchone()
    if any(owner.knows_alive(number, place) for number, place in json.loads(owners)):
        boot = connection.execute("SELECT boot FROM clock").fetchone()[0]
    connection.execute(
        "UPDATE clock SET boot = ?, shift = shift + ?, horizon = 0 WHERE boot <> ?",
        (boot, BOOT_SECONDS, boot),
    )
    connection.execute("UPDATE clock SET horizon = ? WHERE horizon < ?", (horizon, horizon))
    (shift,) = connection.execute("SELECT shift FROM clock").fetchone()
    connection.execute("COMMIT")
    return float(shift)
