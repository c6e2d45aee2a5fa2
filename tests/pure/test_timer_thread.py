"""Orders and the job of a timer thread: each has its turn. It runs on the test's own thread."""

from __future__ import annotations

import time

import pytest

from mlproducer._engine.threads import TimerThread

MANY = 100


def test_the_job_has_its_turn_among_orders_without_end() -> None:
    """A store whose every transaction brings another order would keep its rows from being sent."""
    done: list[str] = []

    def again() -> None:
        done.append("order")
        if len(done) < MANY:
            thread.order(again)
        else:
            thread.stop()

    def job() -> None:
        done.append("job")
        thread.due = time.monotonic()

    thread = TimerThread(job)
    thread.due = time.monotonic()
    thread.order(again)
    thread.run()
    assert done == ["order", "job"] * (MANY // 2 + 1)


def test_orders_have_their_turn_beside_an_job_that_is_always_due() -> None:
    """A sweep that takes longer than its interval would keep messages from being stored."""
    done: list[str] = []

    def job() -> None:
        done.append("job")

    thread = TimerThread(job)
    thread.due = time.monotonic()
    for _ in range(3):
        thread.order(lambda: done.append("order"))
    thread.stop()
    thread.run()
    assert done == ["order", "job"] * 3


def test_a_thread_that_fails_between_two_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on: without it nothing would be retried, or stored, any more."""
    done: list[str] = []
    thread = TimerThread(lambda: done.append("job"))
    step, failures = thread._next, [MemoryError(), SystemExit()]

    def failing(*, after_order: bool) -> object:
        if failures:
            raise failures.pop()
        return step(after_order=after_order)

    monkeypatch.setattr(thread, "_next", failing)
    thread.order(lambda: done.append("order"))
    thread.stop()
    thread.run()
    assert done == ["order"]
