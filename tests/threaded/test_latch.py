"""A token: one holder at a time, nobody starves."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import NoReturn

import pytest

from mlproducer.latch import Token
from tests.helpers import LIMIT, Background


def soon(seconds: float = LIMIT) -> float:
    """Give a deadline."""
    return time.monotonic() + seconds


def test_one_holder_at_a_time() -> None:
    """What is read and written under it is never torn, and it is not lost."""
    token, count = Token(), [0]

    def add() -> None:
        for _ in range(2000):
            assert token.take(soon())
            before = count[0]
            count[0] = before + 1
            token.give()

    background = Background()
    for _ in range(6):
        background.call(add)
    background.gather(30.0)
    assert count == [12_000]
    assert token.take(soon())


def test_a_deadline() -> None:
    """Who does not get it in time has not got it, and is not handed it later."""
    token = Token()
    assert token.take(soon())
    assert not token.take(soon(0.05))
    token.give()
    assert token.take(soon())


def test_an_interrupted_waiter() -> None:
    """Who was interrupted while waiting is not handed it, and so it is not lost."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    token = Token()
    assert token.take(soon())
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    with pytest.raises(KeyboardInterrupt):
        token.take(soon())
    signal.signal(signal.SIGALRM, before)
    token.give()
    assert token.take(soon())


def test_nobody_starves() -> None:
    """A thread that gives and takes without a pause lets others in."""
    token, stop = Token(), threading.Event()

    def hog() -> None:
        while not stop.is_set():
            assert token.take(soon())
            token.give()

    background = Background()
    background.call(hog)
    for _ in range(200):
        assert token.take(soon(1.0))
        token.give()
    stop.set()
    background.gather()
