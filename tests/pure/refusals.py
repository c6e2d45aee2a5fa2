"""How a refusal has to look, whoever refuses.

Runs on: the test's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

CANARY = "canary-8c1f"
"""Stands for a user's text, which no error may quote."""

_LIMIT = 0.010
"""Seconds of CPU that a refusal may take."""


def refused(
    call: Callable[[], object], error: type[Exception], *words: str, rounds: int = 3
) -> None:
    """Expect an error that names the words, quotes nothing of the user's, and comes fast.

    :param rounds: the fastest counts, because a garbage collection may hit one of them
    """
    elapsed = []
    for _ in range(rounds):
        start = time.thread_time()
        with pytest.raises(error) as caught:
            call()
        elapsed.append(time.thread_time() - start)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    link: BaseException | None = caught.value
    while link is not None:
        assert CANARY not in f"{link} {link!r}"
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    assert min(elapsed) < _LIMIT
