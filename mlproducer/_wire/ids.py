"""Message ids: random UUIDs (RFC 9562, version 4), drawn in blocks.

Asking the system for random bytes costs more than anything else about an id, and lets go of the
interpreter's lock each time. A forked child draws its own, or it would repeat its parent's.

Runs on: any thread.
"""

from __future__ import annotations

import os
from collections import deque

from mlproducer import _forks as forks

_BLOCK = 256
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_drawn: deque[str] = deque()


def new_id() -> str:
    """Give an id that nobody else has."""
    while True:
        try:
            return _drawn.pop()
        except IndexError:
            _drawn.extend(_draw())


def _draw() -> list[str]:
    digits = os.urandom(16 * _BLOCK).hex()
    return [
        f"{digits[at : at + 8]}-{digits[at + 8 : at + 12]}-4{digits[at + 13 : at + 16]}"
        f"-{_VARIANT[digits[at + 16]]}{digits[at + 17 : at + 20]}-{digits[at + 20 : at + 32]}"
        for at in range(0, len(digits), 32)
    ]


forks.in_child(_drawn.clear)
