"""Users' callbacks: what they may call, and that they harm nothing.

They run on a thread of their own; events are told there, and so are done-callbacks of futures.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import queue
import signal
import threading
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlproducer import ConnectionState, MLProducer, Settings
from mlproducer.errors import NackError, ProducerClosedError, StoreError, WouldDeadlockError
from mlproducer.observe import callbacks
from mlproducer.stores.memory import MemoryStore
from tests.helpers import LIMIT, make_message
from tests.stopwatch import Stopwatch, in_time
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import Moody, events_of, our_threads


@pytest.mark.parametrize("how", ["event", "done"])
def test_no_deadlock_in_callbacks(connect: Connect, serve: Serve, how: str) -> None:
    """Blocking calls on the producer's own threads are refused at once (74)."""
    producer = connect(serve())
    refusals: list[BaseException | None] = []
    called = threading.Event()

    def call_everything(_: object) -> None:
        for call in (
            lambda: producer.publish(make_message()),
            lambda: producer.submit(make_message()),
            lambda: producer.publish_many([make_message()]),
            lambda: producer.wait_connected(LIMIT),
            lambda: producer.flush(LIMIT),
        ):
            try:
                call()
            except WouldDeadlockError as error:
                refusals.append(error)
        producer.status()
        producer.reconnect()
        called.set()

    if how == "event":
        producer.on("confirmed", call_everything)
        producer.publish(make_message())
    else:
        producer.submit(make_message()).add_done_callback(call_everything)
    assert called.wait(1.0)
    assert len(refusals) == 5
    assert producer.publish(make_message()).confirmed


def test_close_in_a_callback(connect: Connect, serve: Serve) -> None:
    """It drains nothing, since that would wait for itself, and ends like any other."""
    producer = connect(serve())
    closed = threading.Event()
    took: list[float] = []
    callers: list[threading.Thread] = []

    def close() -> None:
        watch = Stopwatch()
        producer.close()
        took.append(watch.own())
        callers.append(threading.current_thread())
        closed.set()

    producer.on("connected", close)
    with suppress(ProducerClosedError):  # it may be closed before start() comes back
        producer.start()
    assert closed.wait(LIMIT)
    callers[0].join(LIMIT)  # the one thread that close() could not wait for
    assert took[0] < 0.5
    assert producer.status().connection_state is ConnectionState.CLOSED
    for thread in threading.enumerate():  # the callback's own, which nothing waits for
        if thread.name == "mlproducer-events":
            thread.join(LIMIT)


def test_callbacks_that_raise_or_block(connect: Connect, serve: Serve) -> None:
    """They are logged, or wait for themselves; publishing and the other callbacks go on (75)."""
    broker = serve()
    producer = connect(broker)
    entered, free, seen = threading.Event(), threading.Event(), []

    def block(event: Any) -> None:
        entered.set()
        assert free.wait(LIMIT)

    producer.on("confirmed", lambda _: 1 / 0)
    producer.on("confirmed", block)
    producer.on("confirmed", lambda event: seen.append(event.message_id))
    assert producer.publish(make_message("a")).confirmed
    assert entered.wait(LIMIT)
    assert producer.publish(make_message("b")).confirmed
    assert all(producer.publish(make_message()).confirmed for _ in range(100))
    assert seen == []
    free.set()
    producer.close()
    assert seen[:2] == ["a", "b"]
    assert len(seen) == 102


def test_close_with_a_callback_that_hangs(connect: Connect, serve: Serve) -> None:
    """A callback that never ends cannot hold up close()."""
    producer = connect(serve())
    entered, free = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        free.wait(LIMIT)

    producer.on("confirmed", hang)
    assert producer.publish(make_message()).confirmed
    assert entered.wait(LIMIT)
    with in_time(0.7):
        producer.close(0.2)
    free.set()
    for thread in threading.enumerate():
        if thread.name == "mlproducer-events":
            thread.join(LIMIT)


def test_events(connect: Connect, serve: Serve) -> None:
    """Events come in the order in which things happened, with what they are about."""
    broker = serve()
    producer = connect(broker)
    seen: list[tuple[str, str | None]] = []
    back = threading.Event()
    for name in ("connected", "disconnected", "confirmed", "blocked", "unblocked"):
        producer.on(name, lambda event: seen.append((event.name, event.message_id)))
    assert producer.publish(make_message("a")).confirmed
    broker.connections[0].block()
    broker.connections[0].unblock()
    assert producer.publish(make_message("b")).confirmed
    producer.on("connected", back.set)
    broker.connections[0].reset()
    assert back.wait(LIMIT)
    assert seen == [
        ("connected", None),
        ("confirmed", "a"),
        ("blocked", None),
        ("unblocked", None),
        ("confirmed", "b"),
        ("disconnected", None),
        ("connected", None),
    ]
    with pytest.raises(ValueError, match="event must be one of"):
        producer.on("exploded", print)


# --- send queue ----------------------------------------------------------------------------------


def test_a_connection_that_is_lost_while_it_is_blocked(connect: Connect, serve: Serve) -> None:
    """The next one is not blocked, and each ``blocked`` has its ``unblocked``."""
    broker = serve()
    producer = connect(broker)
    seen = events_of(producer, "connected", "disconnected", "blocked", "unblocked")
    producer.start()
    seen.wait_for("connected")
    broker.connections[0].block()
    seen.wait_for("connected", "blocked")
    broker.connections[0].reset()
    seen.wait_for("connected", "blocked", "disconnected", "unblocked", "connected")
    assert not producer.status().blocked


def test_threads_are_there_from_the_start(connect: Connect, serve: Serve) -> None:
    """Callbacks have their threads before any is added: late in a program's life none starts."""
    producer = connect(serve())
    assert producer.wait_connected(LIMIT)
    assert {"mlproducer-events", "mlproducer-futures"} <= {each.name for each in our_threads()}


def test_done_callbacks_are_never_left_out(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than events may wait are all called, beside an event's callback that hangs."""
    monkeypatch.setattr(callbacks, "MAX_QUEUED", 100)
    producer = connect(serve(), max_in_flight=5000)
    free, last, called = threading.Event(), threading.Event(), itertools.count(1)
    total = 1000
    producer.on("confirmed", lambda _: free.wait(LIMIT))

    def done(_future: Any) -> None:
        if next(called) == total:
            last.set()

    for _ in range(total):
        producer.submit(make_message()).add_done_callback(done)
    assert last.wait(2 * LIMIT)
    assert not free.is_set()
    free.set()


def test_a_coroutine_wakes_beside_a_slow_event(connect: Connect, serve: Serve) -> None:
    """A future that a coroutine awaits wakes it, whatever an event's callback does."""
    producer = connect(serve())
    free = threading.Event()
    producer.on("confirmed", lambda _: free.wait(LIMIT))
    producer.publish(make_message())

    async def wait() -> bool:
        return (await asyncio.wrap_future(producer.submit(make_message()))).confirmed

    assert asyncio.run(asyncio.wait_for(wait(), LIMIT))
    free.set()


def test_events_left_out_are_counted_and_told(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines, however many are left out: that it begins, and how many it were; and a counter."""
    caplog.set_level(logging.DEBUG, "mlproducer")
    most = 100
    monkeypatch.setattr(callbacks, "MAX_QUEUED", most)
    monkeypatch.setattr(callbacks, "CAUGHT_UP", most // 2)
    registry = CollectorRegistry()
    settings = Settings(url=serve().url)
    entered, free, called = threading.Event(), threading.Event(), itertools.count()

    def hang(_event: object) -> None:
        next(called)
        entered.set()
        assert free.wait(LIMIT)

    with MLProducer(settings, registry=registry) as producer:
        producer.on("confirmed", hang)
        producer.publish(make_message())
        assert entered.wait(LIMIT)
        producer.publish_many(make_message() for _ in range(most + 321))
        free.set()
    dropped = 321
    assert next(called) == 1 + most
    assert registry.get_sample_value("ml_producer_events_dropped_total") == dropped
    lines = [each.getMessage() for each in caplog.records if "callbacks" in each.name]
    assert lines == [
        "callbacks are too slow: dropping events",
        f"callbacks have caught up dropped={dropped}",
    ]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), RuntimeError()], ids=repr)
def test_no_callback_ends_a_thread(connect: Connect, serve: Serve, error: BaseException) -> None:
    """Whatever a callback raises, those after it are called, and on the same threads as before."""
    producer = connect(serve())
    ran_on: queue.SimpleQueue[str] = queue.SimpleQueue()

    def raise_it(_: object) -> None:
        raise error

    def note(_: object) -> None:
        ran_on.put(threading.current_thread().name)

    for callback in (raise_it, note):
        producer.on("confirmed", callback)
    for expected in ("mlproducer-events",) * 2:
        producer.publish(make_message())
        assert ran_on.get(timeout=LIMIT) == expected
    producer.on("confirmed", lambda _: None)
    for _ in range(2):
        future = producer.submit(make_message())
        future.add_done_callback(raise_it)
        future.add_done_callback(note)
        names = {ran_on.get(timeout=LIMIT), ran_on.get(timeout=LIMIT)}
        assert names == {"mlproducer-events", "mlproducer-futures"}


def test_first_callbacks_of_several_threads(connect: Connect, serve: Serve) -> None:
    """Threads that add the first callbacks at once have none of theirs run on the I/O thread."""
    ran_on: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(20):
        producer = connect(serve())
        assert producer.wait_connected(LIMIT)
        together = threading.Barrier(4)

        def submit(producer: MLProducer = producer, together: Any = together) -> None:
            together.wait(LIMIT)
            future = producer.submit(make_message())
            future.add_done_callback(lambda _: ran_on.put(threading.current_thread().name))

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        names = {ran_on.get(timeout=LIMIT) for _ in threads}
        assert names == {"mlproducer-futures"}
        producer.close(1.0)


def test_a_callback_that_comes_after_the_end(connect: Connect, serve: Serve) -> None:
    """A callback that is added to a future when its producer is closed is called all the same."""
    producer = connect(serve())
    future = producer.submit(make_message())
    producer.close()
    called = threading.Event()
    future.add_done_callback(lambda _: called.set())
    assert called.wait(LIMIT)
    for thread in threading.enumerate():
        if thread.name == "mlproducer-futures":
            thread.join(LIMIT)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about fork
def test_a_callback_in_a_forked_child(connect: Connect, serve: Serve) -> None:
    """A callback that a child adds to a done future of its parent's is called there."""
    producer = connect(serve())
    future = producer.submit(make_message())
    assert future.result(LIMIT).confirmed
    child = os.fork()
    if child == 0:
        signal.alarm(int(LIMIT))
        called: list[bool] = []
        future.add_done_callback(lambda done: called.append(done.done()))
        os._exit(called != [True])
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("callback", [None, 5, "f"])
def test_what_cannot_be_called_is_refused(callback: Any) -> None:
    """It is refused when it is handed in, and not found out at the first event."""
    with pytest.raises(TypeError, match="callback must be callable, got"):
        MLProducer(Settings(url="amqp://u:p@h/")).on("connected", callback)


@pytest.mark.parametrize("name", ["confirmd", "", None, ["connected"], 3])
def test_events_that_there_are_not(name: Any) -> None:
    """An event that there is not is refused with the list of those that there are."""
    with pytest.raises(ValueError, match=r"^event must be one of connected, .*, refused$"):
        MLProducer(Settings(url="amqp://u:p@h/")).on(name, print)


# --- logging handlers --------------------------------------------------------------------------


class ToBroker(logging.Handler):
    """Publishes each line, as handlers do that send logs to a broker; or raises."""

    def __init__(self, producer: MLProducer, error: BaseException | None) -> None:
        super().__init__()
        self._producer = producer
        self._error = error
        self.refused: list[str] = []
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Publish, or raise."""
        self.lines += 1
        if self._error is not None:
            raise self._error
        try:
            self._producer.submit(make_message())
        except WouldDeadlockError:
            self.refused.append(threading.current_thread().name)
            raise


@pytest.mark.parametrize("error", [None, RuntimeError(), SystemExit(3)], ids=repr)
def test_logging_handlers(connect: Connect, serve: Serve, error: BaseException | None) -> None:
    """A handler of all loggers that publishes, or raises, ends and holds up no thread of ours."""
    broker = serve()
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    handler = ToBroker(producer, error)
    roots = [logging.getLogger(name) for name in ("mlproducer", "pika")]
    levels = [logger.level for logger in roots]
    for logger in roots:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        assert producer.publish(make_message()).confirmed
        threads = our_threads()
        seen = events_of(producer, "disconnected", "connected")
        broker.connections[0].reset()
        seen.wait_for("disconnected", "connected")
        assert producer.publish(make_message()).confirmed
        assert our_threads() == threads
    finally:
        for logger, level in zip(roots, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert handler.lines > 2
    assert set(handler.refused) <= {"mlproducer-io", "mlproducer-resolver"}
    assert bool(handler.refused) == (error is None)


# --- a store of the user's own -----------------------------------------------------------------


class Failing(MemoryStore):
    """Fails as a store should not, at one of its methods, while it is told to."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()
        self._method = method
        self._error = error
        self.failing = True
        self.failed = threading.Semaphore(0)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name != self._method or not self.failing:
            return super().__getattribute__(name)
        return self._fail

    def _fail(self, *_: object) -> None:
        self.failed.release()
        raise self._error


@pytest.mark.parametrize("method", ["put", "claim", "release", "done", "renew", "depth"])
@pytest.mark.parametrize("error", [ValueError(), SystemExit(3)], ids=repr)
def test_no_store_ends_a_thread(serve: Serve, method: str, error: BaseException) -> None:
    """Whatever a store raises, the retry thread goes on, and the next message is stored."""
    store, mood = Failing(method, error), Moody("nack")
    quick: dict[str, Any] = {**QUICK, "publish_timeout": 0.5}
    with MLProducer(Settings(url=serve(mood).url, **quick), store=store) as producer:
        with suppress(StoreError):
            producer.publish(make_message())
        threads = our_threads()
        if method not in ("renew", "done"):
            assert store.failed.acquire(timeout=LIMIT)
        store.failing = False
        receipt = producer.publish(make_message())
        assert isinstance(receipt.reason, NackError)
        mood.mood = "ack"
        assert receipt.result(LIMIT).confirmed
        assert our_threads() == threads


def test_a_thread_that_fails_between_two_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes those that wait, and ends when it is told: they were lost, or it stayed."""
    made: list[int] = []
    failures: list[BaseException] = [SystemExit(), MemoryError()]
    thread = callbacks.CallbackThread("futures", _spawn)
    make = thread._make

    def fail(*args: Any) -> None:
        if failures:
            raise failures.pop()
        make(*args)

    monkeypatch.setattr(thread, "_make", fail)
    for number in range(3):
        thread.call(lambda number=number: made.append(number))  # type: ignore[misc]
    thread.stop()
    thread.start()
    assert thread.thread is not None
    thread.thread.join(LIMIT)
    assert not thread.thread.is_alive()
    assert made == [0, 1, 2]


def _spawn(_role: str, target: Any) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread
