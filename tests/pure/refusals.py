"""How a refusal has to look.

Runs on: the test's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import pytest

CANARY = "canary-8c1f"
"""Stands for a user's text, which no error may quote."""

_LIMIT = 0.010
"""Seconds of CPU that a refusal may take."""


def refused(
    call: Callable[[], object],
    error: type[Exception],
    *words: str,
    rounds: int = 3,
    inside: bool = False,
) -> None:
    """Expect an error that names the words, quotes nothing of the user's, and comes fast.

    :param inside: the call is not the users' own, who get the error without its frames
    :param rounds: the fastest counts, because a garbage collection may hit one of them
    """
    elapsed = []
    for _ in range(rounds):
        start = time.thread_time()
        with pytest.raises(error) as caught:
            call()
        elapsed.append(time.thread_time() - start)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    tells_nothing(caught.value, frames=not inside)
    assert min(elapsed) < _LIMIT


def tells_nothing(error: BaseException, canary: str = CANARY, *, frames: bool = True) -> None:
    """Look for a text in all that an error reporter would send: words, chains, local variables."""
    links: list[BaseException | None] = [error]
    while links:
        connection = links.pop()
        if connection is not None:
            assert canary not in f"{connection} {connection!r} {vars(connection)}"
            if frames:
                in_frames(connection.__traceback__, canary)
            hidden = connection.__suppress_context__ and not frames
            links += (connection.__cause__, None if hidden else connection.__context__)


def in_frames(traceback: TracebackType | None, canary: str) -> None:
    """Look at the local variables of each frame but those of the tests themselves."""
    while traceback is not None:
        frame = traceback.tb_frame
        if "tests" not in frame.f_code.co_filename.split("/"):
            for name, value in frame.f_locals.items():
                assert canary not in f"{value!r} {value}", f"{frame.f_code}: {name}"
        traceback = traceback.tb_next
