"""Orders and the job of a timer thread: each has its turn. It runs on the test's own thread."""

from __future__ import annotations

import time

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


def test_an_order_that_fails() -> None:
    """It is carried out once more, as are those behind it: what was ordered may be cut anywhere."""
    done: list[str] = []
    failures: list[BaseException] = [SystemExit(), MemoryError()]

    def fail_once() -> None:
        done.append("begun")
        if failures:
            raise failures.pop()
        done.append("done")

    def fail() -> None:
        done.append("in vain")
        raise ValueError("bug")

    thread = TimerThread(lambda: done.append("job"))
    for order in (fail_once, fail_once, fail, lambda: done.append("last")):
        thread.order(order)
    thread.stop()
    thread.run()
    assert done == [*["begun"] * 2, "begun", "done", "in vain", "in vain", "last"]
