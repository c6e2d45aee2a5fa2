"""The gate: who may be inside, and in what order the others follow."""

from __future__ import annotations

import functools
import gc
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from mlproducer._core.delivery import Delivery
from mlproducer._engine import gate as gate_module
from mlproducer._engine.gate import Gate
from mlproducer._synchronization import Watch
from mlproducer.errors import PublishError, WouldDeadlockError
from tests.helpers import LIMIT, Background, make_delivery, make_message
from tests.stopwatch import in_time
from tests.threaded.conftest import Connect, Serve


def soon() -> float:
    """A deadline that ought not to come."""
    return time.monotonic() + LIMIT


def wait_until_queued(gate: Gate, count: int) -> None:
    """Wait until so many wait at the gate, which reports it nowhere; give up after a limit."""
    deadline = soon()
    while len(gate._queue) < count:
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_blocks_and_admits_in_order() -> None:
    """First come, first served, one for each that leaves."""
    gate = Gate(2)
    first = [make_delivery(), make_delivery()]
    assert all(gate.enter(delivery, soon()) for delivery in first)
    waiting = [make_delivery() for _ in range(5)]
    background = Background()
    entered: deque[Delivery] = deque()

    def enter(delivery: Delivery) -> None:
        assert gate.enter(delivery, soon())
        entered.append(delivery)
        gate.leave((delivery,))

    for number, delivery in enumerate(waiting, 1):
        background.call(enter, delivery)
        wait_until_queued(gate, number)
    assert not entered
    assert not gate.try_enter(make_delivery())
    gate.leave(first[:1])
    background.gather()
    assert list(entered) == waiting
    assert gate.inside() == first[1:]


def test_times_out() -> None:
    """Who does not get in in time leaves no trace, and lets the next one have its turn."""
    gate = Gate(1)
    inside = make_delivery()
    assert gate.enter(inside, soon())
    started = time.monotonic()
    with in_time(0.3, 0.1):
        assert not gate.enter(make_delivery(), time.monotonic() + 0.1)
    assert not gate.enter(make_delivery(), started)
    gate.leave((inside,))
    assert gate.enter(make_delivery(), time.monotonic())
    assert len(gate) == 1


def test_leaving_twice_or_without_having_entered() -> None:
    """A slot comes back once."""
    gate = Gate(1)
    inside, stranger = make_delivery(), make_delivery()
    assert gate.enter(inside, soon())
    gate.leave((stranger,))
    assert not gate.try_enter(stranger)
    gate.leave((inside, inside))
    gate.leave((inside,))
    assert gate.try_enter(stranger)
    assert not gate.try_enter(inside)


def test_bytes() -> None:
    """Large messages fill the window before the count does; one over the limit goes in alone."""
    gate = Gate(100, max_bytes=1000)
    small = make_delivery(body=b"." * 398)  # two bytes of properties
    assert gate.enter(small, soon())
    assert not gate.enter(make_delivery(body=b"." * 599), time.monotonic())
    assert gate.enter(make_delivery(body=b"." * 598), soon())
    gate.leave(gate.inside())
    huge = make_delivery(body=b"." * 5000)
    assert gate.enter(huge, soon())
    assert not gate.enter(make_delivery(), time.monotonic())


def test_a_large_one_is_not_starved() -> None:
    """Small ones that come after a large one wait behind it, although they would fit."""
    gate = Gate(100, max_bytes=1000)
    inside, large = make_delivery(body=b"." * 600), make_delivery(body=b"." * 900)
    assert gate.enter(inside, soon())
    background = Background()
    background.call(gate.enter, large, soon())
    wait_until_queued(gate, 1)
    small = make_delivery(body=b".")
    background.call(gate.enter, small, soon())
    wait_until_queued(gate, 2)
    assert not gate.try_enter(make_delivery(body=b"."))
    gate.leave((inside,))
    assert background.gather() == [True, True]
    assert gate.inside() == [large, small]


def test_the_one_behind_goes_when_a_large_one_gives_up() -> None:
    """A large message whose time is up does not leave those behind it waiting."""
    gate = Gate(100, max_bytes=1000)
    assert gate.enter(make_delivery(body=b"." * 600), soon())
    background = Background()
    background.call(gate.enter, make_delivery(body=b"." * 900), time.monotonic() + 0.2)
    wait_until_queued(gate, 1)
    background.call(gate.enter, make_delivery(), soon())
    with in_time(1.0):
        assert background.gather() == [False, True]


def test_quiet() -> None:
    """A thread that waits for an empty gate is woken by the last one that leaves, and only then."""
    gate = Gate(2)
    deliveries = [make_delivery(), make_delivery()]
    for delivery in deliveries:
        gate.enter(delivery, soon())
    assert not gate.emptied.wait_for(lambda: not gate, time.monotonic() + 0.05)
    background = Background()
    for _ in range(3):
        background.call(gate.emptied.wait_for, lambda: not gate, soon())
    gate.leave(deliveries[:1])
    gate.leave(deliveries[1:])
    assert background.gather() == [True, True, True]


def test_whoever_waits_looks_again() -> None:
    """A change that is none does not end the wait; what holds already is not waited for."""
    watch = Watch()
    assert watch.wait_for(lambda: True, 0.0)
    answers = iter([False, False, False, False, True])
    background = Background()
    waiting = background.call(watch.wait_for, lambda: next(answers), soon())
    while not waiting.done():
        watch.changed()
    assert background.gather() == [True]


def test_changes_from_many_threads() -> None:
    """Several threads may tell of changes at the same time, and several wait for them."""
    watch, done = Watch(), threading.Event()
    background, waiters = Background(), Background()

    def change() -> None:
        while not done.is_set():
            watch.changed()

    for _ in range(3):
        background.call(change)
    for _ in range(20):
        answers = iter([False] * 20 + [True])
        waiters.call(watch.wait_for, functools.partial(next, answers), soon())
    assert waiters.gather() == [True] * 20
    done.set()
    background.gather()


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_lost_wakeups(connect: Connect, serve: Serve, limit: int) -> None:
    """4 threads and a window of any size: none is left waiting (72, 73)."""
    broker = serve()
    producer = connect(broker, max_in_flight=limit)
    count = 1000 if limit == 1000 else 100
    background = Background()
    for thread in range(4):
        tasks = [make_message(f"{thread}-{number}") for number in range(count)]
        background.call(producer.publish_many, tasks, timeout=LIMIT)
    with in_time(20):
        results = background.gather()
    assert all(receipt.confirmed for receipts in results for receipt in receipts)
    assert len(broker.messages) == 4 * count
    assert producer.flush(LIMIT) == 0


def test_retries_have_a_share() -> None:
    """While there is a backlog a quarter of the window is its own, however many wait outside."""
    gate = Gate(8)
    gate.share(backlog=True)
    for _ in range(6):
        assert gate.enter(make_delivery(), soon())
    background = Background()
    outside = background.call(gate.enter, make_delivery(), soon())
    wait_until_queued(gate, 1)
    assert gate.welcomes()
    retries = [make_delivery(), make_delivery()]
    assert all(map(gate.try_enter, retries))
    assert not gate.welcomes()
    assert not gate.try_enter(make_delivery())
    gate.leave(retries)
    assert not outside.done(), "a publisher has taken a slot that is left to retries"
    gate.share(backlog=False)
    gate.leave([])
    assert outside.result(LIMIT)
    background.gather()


def test_a_share_given_back_lets_others_in() -> None:
    """Those who wait outside come in when the part that was left to retries is not needed."""
    gate = Gate(4)
    gate.share(backlog=True)
    for _ in range(3):
        assert gate.enter(make_delivery(), soon())
    background = Background()
    background.call(gate.enter, make_delivery(), soon())
    wait_until_queued(gate, 1)
    with in_time(1.0):
        gate.share(backlog=False)
        assert background.gather() == [True]


class LaterLock:
    """As RLock where what Condition asks it has another name."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.acquire, self.release = self.lock.acquire, self.lock.release

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class LaterCondition(threading.Condition):
    """Asks a `LaterLock`."""

    def __init__(self, lock: Any) -> None:
        super().__init__(lock)
        self._is_owned = lock.lock._is_owned


@pytest.mark.parametrize("lock", [threading.RLock, LaterLock])
def test_a_call_amid_another(monkeypatch: pytest.MonkeyPatch, lock: Callable[[], Any]) -> None:
    """Who comes in while its own thread is at the gate is refused at once, and breaks nothing."""
    if lock is LaterLock:
        names = SimpleNamespace(RLock=LaterLock, Condition=LaterCondition)
        monkeypatch.setattr(gate_module, "threading", names)
    gate, refused = Gate(10), []

    class Publisher:
        """What a finaliser or a signal handler does."""

        def __init__(self) -> None:
            self.me = self

        @property
        def size(self) -> int:
            """Stands for any moment at which the gate's lock is held."""
            try:
                gate.enter(make_delivery("inner"), soon())
            except WouldDeadlockError as error:
                refused.append(error)
                gate.leave((make_delivery("inner"),))
            return 1

    assert gate.enter(Publisher(), soon())  # type: ignore[arg-type]
    assert len(refused) == 1
    assert len(gate) == 1
    assert gate.enter(make_delivery(), soon())


class Session:
    """A user's object that publishes when the collector finds it."""

    def __init__(self, publish: Callable[[], object]) -> None:
        self._me = self
        self._publish = publish

    def __del__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # not the fake broker's
            with suppress(PublishError):
                self._publish()


def test_a_finaliser_that_publishes(connect: Connect, serve: Serve) -> None:
    """The collector may run it anywhere in a publish(), and nothing hangs or is lost."""
    broker = serve()
    producer = connect(broker, max_in_flight=8)
    assert producer.wait_connected(LIMIT)
    ours: list[Any] = []
    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        with in_time(30.0):
            for _ in range(2000):
                Session(lambda: ours.append(producer.submit(make_message())))
                ours.append(producer.submit(make_message()))
    finally:
        gc.set_threshold(*before)
    assert producer.flush(LIMIT) == 0
    assert all(future.result(0).confirmed for future in ours)
    assert len(ours) > 2100


def test_a_signal_handler_that_publishes(connect: Connect, serve: Serve) -> None:
    """It interrupts a submit() at any point: it has its answer, or WouldDeadlockError, in time."""
    producer = connect(serve(), max_in_flight=50)
    assert producer.wait_connected(LIMIT)
    longest, answers, futures = [0.0], Counter[str](), []

    def handler(_signal: int, _frame: FrameType | None) -> None:
        started = time.monotonic()
        try:
            answers[producer.publish(make_message(), timeout=LIMIT).outcome.name] += 1
        except WouldDeadlockError:
            answers["refused"] += 1
        longest[0] = max(longest[0], time.monotonic() - started)
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.002))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        until = time.monotonic() + 4 * LIMIT
        while answers["CONFIRMED"] <= 100:
            assert time.monotonic() < until
            futures.append(producer.submit(make_message()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert producer.flush(LIMIT) == 0
    assert all(future.result(0).confirmed for future in futures)
    assert answers["DEFERRED"] == 0
    assert longest[0] < LIMIT / 2
