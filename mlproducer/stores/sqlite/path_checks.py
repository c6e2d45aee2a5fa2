"""Where the file of an SQLite store lies, and what lies beside it: judged before it is opened.

SQLite writes to a log and an index beside the file, by the file's name. So a file that has two
names, or whose log others can read or lay, would lose or show messages.

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

from mlproducer._guard import write
from mlproducer.errors import StoreError
from mlproducer.stores.sqlite.owners import Owner

logger = logging.getLogger(__name__)

COMPANIONS = ("-wal", "-shm", "-journal", "-reserve", "-owners")

NETWORK = {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
NETWORK |= {"fuse.ceph", "fuse.glusterfs", "fuse.sshfs"}

_MOUNTS = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
_DRAFT = re.compile(r"\.([0-9a-f]{16})\.new(-wal|-shm|-journal)?")
_told: set[str] = set()


def check_directory(path: str) -> None:
    """Refuse a directory in which another user could replace the file."""
    directory = os.path.dirname(path)  # noqa: PTH120 - a path is text throughout
    try:
        status = os.stat(directory)  # noqa: PTH116
    except FileNotFoundError:
        raise StoreError(f"the store {path} is in a directory that is not there: make it") from None
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if open_to_all and status.st_uid != os.geteuid() and not _is_out_of_reach(directory):
        raise StoreError(
            f"the store {path} is in a directory in which anyone may replace it: make one in it "
            f"that is yours alone (mkdir -m 700 {directory}/mlproducer) and name a file there, or "
            "take away the others' right to write (chmod o-w)"
        )


def _is_out_of_reach(directory: str) -> bool:
    """Whether a directory above keeps all other users out."""
    for each in Path(directory).parents:
        status = each.stat()
        if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            return True
    return False


def check_mounts(path: str) -> None:
    """Refuse a file that is mounted by itself, and warn of a file system of the network."""
    kind = ""
    longest = -1
    for point, file_system in _mounts():
        if point == path:
            raise StoreError(
                f"the store {path} is mounted as a single file, so its log lies elsewhere and is "
                "lost with the container: mount its directory instead"
            )
        within = path.startswith(point if point.endswith("/") else f"{point}/")
        if within and len(point) >= longest:  # of several mounts in one place the last is seen
            kind, longest = file_system, len(point)
    if kind in NETWORK and path not in _told:
        _told.add(path)
        write(
            logger,
            logging.WARNING,
            "the store %s is on a file system of the network (%s), on which SQLite's locks and log "
            "are not reliable: messages may be lost or sent again. Use a local disk; to share a "
            "store between machines use Redis or PostgreSQL",
            path,
            kind,
        )


def _mounts() -> list[tuple[str, str]]:
    """Give where something is mounted, and which kind of file system it is."""
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        found.append((point, after.split(" ")[0]))
    return found


def check_companions(path: str) -> None:
    """Refuse a log, an index or a reserve that another user laid, or can read."""
    users = {os.geteuid()}
    with contextlib.suppress(FileNotFoundError):
        users.add(os.lstat(path).st_uid)
    for suffix in COMPANIONS:
        companion = path + suffix
        try:
            status = os.lstat(companion)
        except FileNotFoundError:
            continue
        wrong = _what_is_wrong(status, users)
        if wrong:
            raise StoreError(
                f"the store {path} has {companion} beside it, which {wrong}: end all processes "
                "that use the store, remove that file if it is not theirs, and use a directory in "
                "which no other user may write"
            )


def _what_is_wrong(status: os.stat_result, users: set[int]) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file (a symbolic link, perhaps)"
    if status.st_uid not in users:
        return "is another user's"
    if status.st_mode & stat.S_IRWXO:
        return "is open to all users"
    if status.st_nlink > 1:
        return "has a second name (a hard link)"
    return ""


def check_one_name(path: str, owner: Owner) -> None:
    """Refuse a file with a hard link: by its other name it would have another log."""
    if os.lstat(path).st_nlink > 1:
        remove_drafts(path, owner)  # who made it has not removed its draft, or was killed
    if os.lstat(path).st_nlink > 1:
        raise StoreError(
            f"the store {path} has a second name (a hard link), and processes that use different "
            "names lose each other's messages: remove the other name (find / -samefile shows it), "
            "and copy a store with 'sqlite3 FILE .backup' instead"
        )


@contextlib.contextmanager
def draft_of(path: str, owner: Owner) -> Iterator[str]:
    """Make a file beside the store's that is to become it; its name says whose it is."""
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
    """Remove what openings that were killed have left: drafts, and second names of the file."""
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
