"""The owners of rows of an SQLite store, and whether they are still alive.

Each user of a store has a number, and holds a lock on the byte at that offset of a file beside the
store. The kernel releases the lock when the holder ends, however it ends, and this shows across
process id namespaces, where a process id means nothing. The lock belongs to the open file
description (``F_OFD_SETLK``), so two stores in one process have a lock each. Where there are no
such locks, and for rows of another machine, nothing is known, and the lease alone decides.

Runs on: the retry thread; a command's thread for what only reads.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from attrs import define

UNKNOWN_OWNER = 1
"""The owner of rows that were claimed before owners had numbers."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_OWN_BITS = 40
_FLOCK = "hhqqi0q"
"""``struct flock``: type, whence, start, length, process."""


def boot_id() -> str:
    """Return the identifier of this boot of this machine, or an empty text."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _machine() -> int:
    """Return 22 bits that stand for this machine since its boot."""
    return zlib.crc32(boot_id().encode()) >> 10


@define
class Owner:
    """One user of a store, and the lock that shows that it is alive.

    :param path: the file that has the locks
    :ivar number: identifies it in rows; no other owner has it
    :ivar place: the inode of the file that its lock is in; 0 if it has none
    """

    path: str
    number: int = 0
    place: int = 0
    _descriptor: int = -1

    def __attrs_post_init__(self) -> None:
        self.number = _machine() << _OWN_BITS | secrets.randbits(_OWN_BITS - 1) + 2

    def enter(self) -> None:
        """Take the lock, unless it is held already, in the file that now has the path.

        :raises OSError: the file cannot be opened or created
        """
        if self._descriptor >= 0:
            if self._is_there():
                return
            self.leave()
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        os.fchmod(self._descriptor, 0o600)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, self.number))
        except OSError:  # this file system has no locks
            self.leave()
        else:
            self.place = os.fstat(self._descriptor).st_ino

    def leave(self, close: Callable[[int], None] = os.close) -> None:
        """Release the lock; in a forked child only close the file: the parent keeps the lock.

        :param close: bound here, since `__del__` may run when the modules are gone
        """
        descriptor, self._descriptor, self.place = self._descriptor, -1, 0
        if descriptor >= 0:
            close(descriptor)

    def __del__(self) -> None:
        self.leave()

    def knows_dead(self, number: int, place: int) -> bool:
        """Return whether another user is known to have ended; false where nothing is known."""
        if number >> _OWN_BITS != _machine() or not self._can_ask(number, place):
            return False
        return not self._is_locked(number)

    def knows_alive(self, number: int, place: int) -> bool:
        """Return whether another user is known to be alive, and so is of this machine."""
        return self._can_ask(number, place) and self._is_locked(number)

    def _can_ask(self, number: int, place: int) -> bool:
        return bool(self.place) and place == self.place and number != self.number

    def _is_locked(self, number: int) -> bool:
        asked = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, number))
        return bool(struct.unpack(_FLOCK, asked)[0] != fcntl.F_UNLCK)

    def _is_there(self) -> bool:
        try:
            return os.lstat(self.path).st_ino == self.place
        except FileNotFoundError:
            return False


def _lock(kind: int, number: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, number, 1, 0)
