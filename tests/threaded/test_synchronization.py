"""A token has one holder at a time and starves none; a relay lets one through after another."""

from __future__ import annotations

import functools
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from mlproducer._answers import Answer
from mlproducer._engine.io_thread import SLOW
from mlproducer._synchronization import Latch, Relay, Token
from mlproducer.errors import StoreError
from mlproducer.message import Fate, Receipt
from mlproducer.stores.sqlite.database import Database, _forks
from tests.helpers import LIMIT, Background
from tests.stopwatch import in_time


def soon(seconds: float = LIMIT) -> float:
    """Return a deadline."""
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
    background.gather()
    assert count == [12_000]
    assert token.take(soon())


def test_a_deadline() -> None:
    """Who does not get it in time has not got it, and is not handed it later."""
    token = Token()
    background, over = Background(), threading.Event()
    background.call(hold, token, over)
    while token.take(time.monotonic()):
        token.give()
    assert not token.take(soon(0.05))
    over.set()
    background.gather()
    assert token.take(soon())


def test_an_interrupted_waiter() -> None:
    """Who was interrupted while waiting is not handed it, and so it is not lost."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    token, over = Token(), threading.Event()
    background = Background()
    background.call(hold, token, over)
    while token.take(time.monotonic()):
        token.give()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    with pytest.raises(KeyboardInterrupt):
        token.take(soon())
    signal.signal(signal.SIGALRM, before)
    over.set()
    background.gather()
    assert token.take(soon())


def hold(token: Token, over: threading.Event) -> None:
    """Hold a token until ``over``."""
    assert token.take(soon())
    over.wait(LIMIT)
    token.give()


def test_the_holder_asks_again() -> None:
    """A handler or finaliser on the thread that holds it is refused at once, and gives nothing."""
    token = Token()
    assert token.take(soon())
    with in_time(1.0):
        assert not token.take(soon())
    assert token.is_here
    token.give()
    token.give()
    assert not token.is_here
    background = Background()
    background.call(token.take, soon())
    assert background.gather() == [True]
    token.give()  # it is not this thread's
    assert not token.take(soon(0.01))


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
        assert token.take(soon())
        token.give()
    stop.set()
    background.gather()


def test_a_future_whose_lock_is_lost() -> None:
    """It is settled all the same, and those who wait for it are let through."""
    fate, background = Fate(), Background()
    waiting = background.call(fate.result, LIMIT)
    background.call(fate._condition.acquire)  # by a thread that ends, and never gives it back
    receipt = Receipt("m", 1, 0.0)
    with in_time(1.0):
        assert fate.set_running_or_notify_cancel()
        fate.set_result(receipt)
        assert waiting.result(LIMIT) is receipt
        assert fate.done()
    background.gather()


@pytest.fixture
def reminders() -> list[None]:
    """What a relay asked for."""
    return []


@pytest.fixture
def relay(reminders: list[None]) -> Relay:
    """A relay that notes when it wants to be hurried."""
    return Relay(lambda: reminders.append(None))


def opened(latches: list[Latch]) -> list[bool]:
    """Say which latches are open, and close them."""
    return [latch.wait(0.0) for latch in latches]


def test_one_after_another(relay: Relay, reminders: list[None]) -> None:
    """The first comes through at once, each next one when the one before passes on."""
    latches = [Latch(), Latch(), Latch(), Latch()]
    for latch in latches[:3]:
        relay.open(latch)
    assert opened(latches) == [True, False, False, False]
    relay.pass_on()
    assert opened(latches) == [False, True, False, False]
    relay.pass_on()
    assert opened(latches) == [False, False, True, False]
    relay.pass_on()
    relay.open(latches[3])
    assert opened(latches) == [False, False, False, True]
    assert reminders == [None]


def test_nobody_passes_on(relay: Relay, reminders: list[None]) -> None:
    """Threads behind a slow one are let through by a reminder, and later ones at once."""
    latches = [Latch(), Latch(), Latch()]
    for latch in latches:
        relay.open(latch)
    assert reminders == [None]
    relay.hurry()
    assert opened(latches) == [True, True, True]
    relay.open(latches[0])
    relay.open(latches[1])
    assert opened(latches) == [True, False, False]
    assert reminders == [None, None]


def test_a_relay_of_threads() -> None:
    """A thread that shows a latch, at any moment, gets through; none waits long for a reminder."""
    rounds, workers = 500, 8
    asked: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    reminded, over = threading.Event(), threading.Event()
    relay = Relay(reminded.set)
    receipt = Receipt("m", 1, 0.0)

    def answer_all() -> None:
        while not over.is_set():
            with suppress(queue.Empty):
                asked.get(timeout=SLOW).set_result(receipt)
            if reminded.is_set():
                reminded.clear()
                relay.hurry()

    def ask() -> None:
        for _ in range(rounds):
            answer = Answer(relay)
            asked.put(answer)
            assert answer.wait(LIMIT)

    answering, asking = Background(), Background()
    answering.call(answer_all)
    for _ in range(workers):
        asking.call(ask)
    asking.gather()
    over.set()
    answering.gather()


def test_an_interrupt_before_a_fork(tmp_path: Path) -> None:
    """Whatever of the stores was held by then is let go in the parent, or none would work again."""
    databases = [
        Database(str(tmp_path / f"{number}.db"), 60.0, time.monotonic) for number in range(3)
    ]

    def interrupted(database: Database, hold: Callable[[], None]) -> None:
        hold()
        if database is databases[1]:
            raise KeyboardInterrupt

    for database in databases:
        database.hold = functools.partial(interrupted, database, database.hold)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        _forks.before()
    _forks.in_parent()
    for database in databases:
        assert database.run(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
        database.close()


def test_a_store_amid_its_own_call(tmp_path: Path) -> None:
    """A handler or finaliser that comes back to it on the same thread is refused at once."""
    database = Database(str(tmp_path / "s.db"), 60.0, time.monotonic)
    with in_time(1.0), pytest.raises(StoreError, match="in use by the call that was interrupted"):
        database.run(
            lambda _: database.run(lambda connection: connection.execute("SELECT 1").fetchone())
        )
    assert database.run(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
    database.close()
