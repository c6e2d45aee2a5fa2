"""The loop of an I/O thread by itself: what it watches, what is due, and how it ends.

Runs on: the test's thread, which runs the loop.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from mlproducer._engine.io_loop import EventLoop

Pipe = tuple[int, int]


@pytest.fixture(params=["poll", "select"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventLoop]:
    """Return a loop; one without ``poll()``, as under eventlet, too."""
    if request.param == "select":
        monkeypatch.delattr(select, "poll")
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    """Return two pipes, each as the end to read and the end to write."""
    with ExitStack() as ends:
        made = [os.pipe(), os.pipe()]
        for each in made:
            for end in each:
                ends.callback(close, end)
        yield made


def close(descriptor: int) -> None:
    """Close a descriptor, which the test may have closed."""
    with suppress(OSError):
        os.close(descriptor)


def test_a_hang_up_that_comes_alone(loop: EventLoop, pipes: list[Pipe]) -> None:
    """It is told as what was asked for: a call without any event would come again for ever."""
    [(read, write), _] = pipes
    calls: list[int] = []

    def on_events(_fd: int, events: int) -> None:
        calls.append(events)
        loop.stop()

    loop.add_handler(read, on_events, EventLoop.READ)
    os.close(write)
    loop.start()
    assert calls == [EventLoop.READ]


def test_a_handler_that_removes_another(loop: EventLoop, pipes: list[Pipe]) -> None:
    """What was ready in the same turn, and is not watched any more, is not called."""
    calls: list[int] = []
    ends = [read for read, _ in pipes]

    def on_events(fd: int, _events: int) -> None:
        calls.append(fd)
        for each in ends:
            loop.remove_handler(each)
        loop.stop()

    for read, write in pipes:
        loop.add_handler(read, on_events, EventLoop.READ)
        os.write(write, b"x")
    loop.start()
    assert len(calls) == 1


def test_what_was_asked_for_changes(loop: EventLoop, pipes: list[Pipe]) -> None:
    """A handler is called for what is watched now."""
    [(_, write), _] = pipes
    calls: list[int] = []

    def on_events(_fd: int, events: int) -> None:
        calls.append(events)
        loop.stop()

    loop.add_handler(write, on_events, EventLoop.READ)
    loop.update_handler(write, EventLoop.WRITE)
    loop.start()
    assert calls == [EventLoop.WRITE]


def test_callbacks_and_timers(loop: EventLoop) -> None:
    """Callbacks come first, timers when they are due, and those that are cancelled not at all."""
    calls: list[str] = []
    loop.call_later(0.01, lambda: calls.append("later"))
    loop.call_later(0.02, lambda: loop.add_callback(loop.stop))  # set last, so it is due last
    cancelled = loop.call_later(0.0, lambda: calls.append("cancelled"))
    loop.call_later(0.0, lambda: calls.append("at once"))
    loop.add_callback(lambda: loop.add_callback(lambda: calls.append("the turn after")))
    loop.add_callback(lambda: calls.append("first"))
    loop.remove_timeout(cancelled)
    loop.start()
    assert calls[0] == "first"
    assert sorted(calls) == ["at once", "first", "later", "the turn after"]
    assert calls.index("at once") < calls.index("later")


def test_a_descriptor_closed_without_a_word(pipes: list[Pipe]) -> None:
    """It is watched no longer; otherwise it would be ready for ever."""
    loop = EventLoop()
    [(read, write), (other, to_other)] = pipes
    calls: list[int] = []

    def on_events(fd: int, _events: int) -> None:
        calls.append(fd)
        loop.stop()

    loop.add_handler(read, on_events, EventLoop.READ)
    loop.add_handler(other, on_events, EventLoop.READ)
    os.close(read)
    os.close(write)
    os.write(to_other, b"x")
    loop.start()
    assert calls == [other]
    assert list(loop.descriptors()) == [other]


def test_a_loop_goes_on_after_what_a_callback_raised(loop: EventLoop) -> None:
    """It ends with what a callback raises, and can be started again."""
    calls: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    loop.add_callback(fail)
    loop.add_callback(lambda: calls.append("kept"))
    with pytest.raises(ZeroDivisionError):
        loop.start()
    loop.add_callback(loop.stop)
    loop.start()
    assert calls == ["kept"]
