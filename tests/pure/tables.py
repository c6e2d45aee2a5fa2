"""How a test goes through a table: every row is checked, and one that fails names itself.

A row costs what its check costs; as a test of its own it would cost pytest two milliseconds more.

Runs on: the test's thread.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def each_row(rows: Iterable[Any], check: Callable[..., object]) -> None:
    """Call the check with the columns of each row; say of the first that fails which it is."""
    count = 0
    for row in rows:
        count += 1
        columns = row if isinstance(row, tuple) else (row,)
        try:
            check(*columns)
        except (Exception, pytest.fail.Exception) as error:
            kind = type(error).__name__
            raise AssertionError(f"row {count}, {_look(columns)}: {kind}: {error}") from error
    assert count, "the table is empty"


def _look(columns: tuple[object, ...]) -> str:
    try:
        return reprlib.repr(columns)
    except ValueError:
        return "which holds an int of more digits than CPython prints"
