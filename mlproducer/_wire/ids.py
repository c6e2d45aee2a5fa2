"""Message ids: random UUIDs (RFC 9562, version 4), made in blocks.

Most of an id's cost is the call for random bytes, which also releases the GIL; so one call serves
256 ids. A forked child discards its parent's block, or both would use the same ids.

Runs on: any thread.
"""

from __future__ import annotations

import os
from collections import deque

from mlproducer import _forks as forks

_BLOCK_SIZE = 256
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_block: deque[str] = deque()


def new_id() -> str:
    """Return a new id."""
    # deque.pop() is one step under the GIL: no id is returned twice, whatever threads do.
    while True:
        try:
            return _block.pop()
        except IndexError:
            _block.extend(_new_block())


def _new_block() -> list[str]:
    digits = os.urandom(16 * _BLOCK_SIZE).hex()
    return [
        f"{digits[at : at + 8]}-{digits[at + 8 : at + 12]}-4{digits[at + 13 : at + 16]}"
        f"-{_VARIANT[digits[at + 16]]}{digits[at + 17 : at + 20]}-{digits[at + 20 : at + 32]}"
        for at in range(0, len(digits), 32)
    ]


forks.in_child(_block.clear)
