"""Check where the file of an SQLite store is, and what is beside it, before it is opened.

SQLite writes to a log and an index beside the file, by the file's name. With a second name of the
file messages would be lost; with a log that others can read or plant they would be shown.

Runs on: the retry thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mlproducer._foreign_calls import write
from mlproducer.errors import StoreError
from mlproducer.stores.sqlite.owners import Owner

logger = logging.getLogger(__name__)

COMPANIONS = ("-wal", "-shm", "-journal", "-reserve", "-owners")

NETWORK = {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
NETWORK |= {"fuse.ceph", "fuse.glusterfs", "fuse.sshfs"}

_MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
_DRAFT = re.compile(r"\.([0-9a-f]{16})\.new(-wal|-shm|-journal)?")
_warned: set[str] = set()


def check_directory(path: str) -> None:
    """Refuse a directory in which another user could replace the file."""
    directory = os.path.dirname(path)  # noqa: PTH120 - a path is text throughout
    try:
        status = os.stat(directory)  # noqa: PTH116
    except FileNotFoundError:
        raise StoreError(
            f"the store {path} is in a directory that does not exist: create it"
        ) from None
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if open_to_all and status.st_uid != os.geteuid() and not _is_out_of_reach(directory):
        raise StoreError(
            f"the store {path} is in a directory in which anyone may replace it: use a directory "
            f"of your own (mkdir -m 700 {directory}/mlproducer), or take away the others' right "
            "to write (chmod o-w)"
        )


def _is_out_of_reach(directory: str) -> bool:
    """Return whether a parent directory keeps all other users out."""
    for each in Path(directory).parents:
        status = each.stat()
        if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            return True
    return False


def check_mounts(path: str) -> None:
    """Refuse a file that is a mount of its own, and warn of network file systems."""
    kind = ""
    longest = -1
    for point, file_system in _mounts():
        if point == path:
            raise StoreError(
                f"the store {path} is mounted as a single file, so its log is elsewhere, and lost "
                "with the container: mount its directory instead"
            )
        within = path.startswith(point if point.endswith("/") else f"{point}/")
        if within and len(point) >= longest:  # of several mounts in one place, the last
            kind, longest = file_system, len(point)
    if kind in NETWORK and path not in _warned:
        _warned.add(path)
        write(
            logger,
            logging.WARNING,
            "the store %s is on a network file system (%s), where SQLite's locks and log are not "
            "reliable: messages may be lost or sent again. Use a local disk; to share a store "
            "between machines use Redis or PostgreSQL",
            path,
            kind,
        )


def _mounts() -> list[tuple[str, str]]:
    """Return all mount points, each with the type of its file system."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        found.append((point, after.split(" ")[0]))
    return found


def check_companions(path: str) -> None:
    """Refuse a log, index, reserve or lock file that another user planted, or can read."""
    users = {os.geteuid()}
    with contextlib.suppress(FileNotFoundError):
        users.add(os.lstat(path).st_uid)
    for suffix in COMPANIONS:
        companion = path + suffix
        try:
            status = os.lstat(companion)
        except FileNotFoundError:
            continue
        wrong = _fault(status, users)
        if wrong:
            raise StoreError(
                f"the store {path} has {companion} beside it, which {wrong}: stop all processes "
                "that use the store, remove that file if it is not theirs, and use a directory in "
                "which no other user may write"
            )


def _fault(status: os.stat_result, users: set[int]) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file (perhaps a symbolic link)"
    if status.st_uid not in users:
        return "belongs to another user"
    if status.st_mode & stat.S_IRWXO:
        return "is accessible to all users"
    if status.st_nlink > 1:
        return "has a second name (a hard link)"
    return ""


def check_one_name(path: str, owner: Owner) -> None:
    """Refuse a file with a second hard link: under its other name it would have another log."""
    if os.lstat(path).st_nlink > 1:
        remove_drafts(path, owner)  # of a process that was killed, or is about to do so
    if os.lstat(path).st_nlink > 1:
        raise StoreError(
            f"the store {path} has a second name (a hard link), and processes that use different "
            "names lose each other's messages: remove the other name (find / -samefile shows it), "
            "and copy a store with 'sqlite3 FILE .backup' instead"
        )


@contextlib.contextmanager
def draft_of(path: str, owner: Owner) -> Iterator[str]:
    """Create a file that is to become the store's; its name contains the owner's number."""
    draft = f"{path}.{owner.number:016x}.new"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        yield draft
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)  # noqa: PTH108


def remove_drafts(path: str, owner: Owner) -> None:
    """Remove the drafts of killed processes, which may be second names of the file."""
    directory, name = os.path.split(path)
    with os.scandir(directory) as entries:
        names = [each.name[len(name) :] for each in entries if each.name.startswith(name)]
    for match in filter(None, map(_DRAFT.fullmatch, names)):
        draft = f"{path}.{match[1]}.new"
        if owner.knows_dead(int(match[1], 16), owner.place) or _is_one(draft, path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + match[0])  # noqa: PTH108


def _is_one(draft: str, path: str) -> bool:
    try:
        return os.path.samestat(os.lstat(draft), os.lstat(path))
    except FileNotFoundError:
        return False
