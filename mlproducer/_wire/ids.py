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
_DIGITS, _LENGTH = 32, 36
_DASHED = b"00000000-0000-0000-0000-000000000000"
_COLUMNS = [column for column in range(_LENGTH) if _DASHED[column : column + 1] != b"-"]
_VERSION = bytes(0x40 | (each & 0x0F) for each in range(256))
_VARIANT = bytes(0x80 | (each & 0x3F) for each in range(256))

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
    """Make ids together: what Python does for each digit's column, it would do for each id."""
    numbers = bytearray(os.urandom(16 * _BLOCK_SIZE))
    numbers[6::16] = numbers[6::16].translate(_VERSION)
    numbers[8::16] = numbers[8::16].translate(_VARIANT)
    digits = numbers.hex().encode()
    lines = bytearray(_DASHED * _BLOCK_SIZE)
    for place, column in enumerate(_COLUMNS):
        lines[column::_LENGTH] = digits[place::_DIGITS]
    text = lines.decode()
    return [text[at : at + _LENGTH] for at in range(0, len(text), _LENGTH)]


forks.in_child(_block.clear)
