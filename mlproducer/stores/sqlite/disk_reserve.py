"""Space on the disk that is reserved, so that a store on a full disk still delivers and deletes.

SQLite writes to its log even to delete. When the disk is full, the reserve is released for that;
until it is allocated again, nothing new is stored.

Runs on: the retry thread.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable

SIZE = 8 * 1024 * 1024
"""Bytes: twice what SQLite's log grows to before it is moved to the file."""

PAGE = 4096
"""Bytes of SQLite's page."""

OVERHEAD = 64 * 1024
"""Bytes that a transaction takes beside its messages."""

SHARE = 16
"""On a small disk, the reserve is at most this fraction (1 in 16) of it."""


def size_on(path: str) -> int:
    """Return the size of a reserve on the disk that this file is on."""
    disk = os.statvfs(path)
    if not disk.f_blocks:  # a file system that does not say
        return SIZE
    return min(SIZE, disk.f_blocks * disk.f_frsize // SHARE)


def need(sizes: Iterable[int]) -> int:
    """Return the bytes that messages of these sizes take, first in the log and then in the file."""
    return 2 * sum(size + (PAGE if size > PAGE // 2 else PAGE // 8) for size in sizes)


class Reserve:
    """A file beside the store's, which all processes share.

    :param path: the store's file
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}-reserve"

    def fill(self) -> None:
        """Allocate the reserve, unless it is allocated.

        :raises OSError: there is no space for it
        """
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            self._allocate()
            return
        if status.st_size == 0:
            self._allocate()

    def free_space(self) -> int:
        """Return the bytes that are free beside the reserve."""
        disk = os.statvfs(self._path)
        if not disk.f_blocks:
            return sys.maxsize
        return disk.f_bavail * disk.f_frsize - OVERHEAD

    def release(self) -> bool:
        """Free the reserve's space; return false where it was free already."""
        try:
            if os.lstat(self._path).st_size == 0:
                return False
        except FileNotFoundError:
            return False
        os.close(self._open(os.O_TRUNC))
        return True

    def _allocate(self) -> None:
        descriptor = self._open(os.O_CREAT)
        try:
            os.fchmod(descriptor, 0o600)
            _allocate(descriptor, size_on(self._path))
        except OSError:
            os.ftruncate(descriptor, 0)  # free what was allocated so far
            raise
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        return os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        for offset in range(0, size, PAGE):  # this file system cannot allocate
            os.pwrite(descriptor, bytes(PAGE), offset)
