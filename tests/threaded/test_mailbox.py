"""The mailbox: rung once per burst, and nothing overlooked."""

from __future__ import annotations

import functools
import select
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest

from mlproducer._engine.io_loop import Mailbox
from tests.helpers import LIMIT, Background, make_delivery
from tests.threaded.conftest import Connect, Serve


@pytest.fixture
def box() -> Iterator[Mailbox]:
    """A mailbox."""
    box = Mailbox()
    yield box
    box.close()


def rings(box: Mailbox, timeout: float = 0.0) -> bool:
    """Whether its descriptor is readable."""
    return bool(select.select([box.fileno()], [], [], timeout)[0])


def test_rings_once_per_burst(box: Mailbox) -> None:
    """A thousand puts are one byte; what is drained is what was put, in order."""
    assert not rings(box)
    deliveries = [make_delivery() for _ in range(1000)]
    assert all(box.put(delivery) for delivery in deliveries)
    assert len(box) == 1000
    assert box._ear.recv(4096) == b"\0"
    assert list(box.drain()) == deliveries
    assert not rings(box)
    assert len(box) == 0


def test_what_comes_while_draining_rings_again(box: Mailbox) -> None:
    """A drain takes what was there when it began; nothing put in meanwhile is overlooked."""
    first, second = make_delivery(), make_delivery()
    box.put(first)
    drained = []
    for delivery in box.drain():
        drained.append(delivery)
        if delivery is first:
            box.put(second)
    assert drained == [first]
    assert rings(box)
    assert list(box.drain()) == [second]


def test_an_interrupted_drain_keeps_the_rest(box: Mailbox) -> None:
    """A reader that dies in the middle leaves what it had not taken; a ring brings it back."""
    deliveries = [make_delivery(), make_delivery(), make_delivery()]
    for delivery in deliveries:
        box.put(delivery)
    assert next(box.drain()) is deliveries[0]
    box.ring()
    assert rings(box)
    assert list(box.drain()) == deliveries[1:]


def test_ringing_is_never_too_much(box: Mailbox) -> None:
    """A bell that is full of rings is rung already."""
    with suppress(BlockingIOError):
        while True:
            box._bell.send(b"\0" * 4096)
    box.put(make_delivery())
    assert rings(box)


def test_closed(box: Mailbox) -> None:
    """A closed box gives what was left, and says no to everything else."""
    delivery = make_delivery()
    box.put(delivery)
    assert box.close() == [delivery]
    assert not box.put(make_delivery())
    box.ring()


def test_many_threads_one_reader(box: Mailbox) -> None:
    """Whatever the order of puts, rings and drains: everything arrives, each thread's in order."""
    count, threads = 4000, 4
    seen: list[list[int]] = [[] for _ in range(threads)]

    def write(thread: int) -> None:
        for number in range(count):
            box.put(functools.partial(seen[thread].append, number))

    def read() -> int:
        wakes = 0
        while sum(map(len, seen)) < count * threads:
            assert rings(box, LIMIT), "lost wakeup"
            wakes += 1
            for item in box.drain():
                item()  # type: ignore[operator]
        return wakes

    background = Background()
    wakes = background.call(read)
    for thread in range(threads):
        background.call(write, thread)
    background.gather()
    assert seen == [list(range(count))] * threads
    assert 1 <= wakes.result(0) <= count * threads


def test_an_idle_loop_is_woken_once(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst that comes while the I/O thread is busy costs one wake."""
    producer = connect(serve())
    assert producer.wait_connected(LIMIT)
    io_thread = producer._life.runtime.engines[0]._io  # type: ignore[union-attr]
    busy, free = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        assert free.wait(LIMIT)

    io_thread.order(functools.partial(occupy))
    assert busy.wait(LIMIT)
    rung: list[bytes] = []
    bell = io_thread.io_loop.mailbox._bell
    counted = SimpleNamespace(send=lambda octet: (rung.append(octet), bell.send(octet)))
    ran = threading.Event()
    orders: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(io_thread.io_loop.mailbox, "_bell", counted)
        for number in range(1000):
            io_thread.order(functools.partial(orders.append, number))
        io_thread.order(functools.partial(ran.set))
        free.set()
        assert ran.wait(LIMIT)
    assert orders == list(range(1000))
    assert len(rung) == 1
