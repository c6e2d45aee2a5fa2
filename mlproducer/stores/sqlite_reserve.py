"""Room on the disk that is set aside, so that a store on a full disk still delivers and deletes.

Even to delete, SQLite writes to its log. When the disk is full, the reserve is given up for that;
and before it is whole again nothing new is stored.

Runs on: the retry thread.
"""

from __future__ import annotations

import os

SIZE = 8 * 1024 * 1024
"""Bytes: twice what SQLite's log grows to before it is moved to the file."""

SHARE = 16
"""On a small disk, the reserve is this part of it."""


class Reserve:
    """A file beside the store's, which all processes share.

    :param path: the store's own
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}-reserve"

    def fill(self) -> None:
        """See that it is whole.

        :raises OSError: there is no room for it
        """
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            self._allocate()
            return
        if status.st_size == 0:
            self._allocate()

    def give_up(self) -> bool:
        """Free its room; false where there is none."""
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
            disk = os.fstatvfs(descriptor)
            os.posix_fallocate(descriptor, 0, min(SIZE, disk.f_blocks * disk.f_frsize // SHARE))
        except OSError:
            os.ftruncate(descriptor, 0)  # what was allocated so far
            raise
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        return os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
