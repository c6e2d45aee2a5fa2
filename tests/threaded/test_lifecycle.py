"""How a producer begins and ends, and what is left of it."""

from __future__ import annotations

import copy
import gc
import multiprocessing.util
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlproducer import ConnectionState, MLProducer, Settings
from mlproducer._core.delivery import Delivery
from mlproducer._engine import lifecycle
from mlproducer._engine.engine import Engine
from mlproducer._synchronization import Latch
from mlproducer.errors import (
    ConfigurationError,
    ConfirmTimeoutError,
    ProducerClosedError,
    PublishError,
)
from mlproducer.observe.callbacks import DeliveryFuture
from mlproducer.testing.proxy import Proxy
from tests.helpers import LIMIT, Background, descriptors, make_message
from tests.stopwatch import in_time
from tests.threaded.brokers import Silent, SlowOpen, ack
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import events_of, io_of, our_threads


def threads() -> set[str]:
    """Return the names of the library's threads that last."""
    return {thread.name for thread in our_threads()}


# --- the beginning -----------------------------------------------------------------------------


def test_the_constructor_does_nothing() -> None:
    """No thread, no descriptor, no I/O, no time: safe at import time and before fork (1)."""
    before = descriptors(), threading.active_count()
    with in_time(0.5):
        producer = MLProducer(Settings(url="amqp://u:p@192.0.2.1/"))
    status = producer.status()
    assert status.connection_state is ConnectionState.DISCONNECTED
    assert not producer.is_healthy()
    assert producer.flush(0) == 0
    assert (descriptors(), threading.active_count()) == before
    assert producer.close(0).abandoned == ()


def test_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer without a broker can be made anywhere; its first use says what is missing."""
    monkeypatch.delenv("RABBITMQ_URL", raising=False)
    producer = MLProducer()
    for use in (producer.start, lambda: producer.publish(make_message())):
        with pytest.raises(ConfigurationError, match="RABBITMQ_URL"):
            use()
    producer.close(0)


def test_the_first_publish_starts_it(connect: Connect, serve: Serve) -> None:
    """Threads are daemons with the documented names; a second producer's have a number."""
    broker = serve()
    first, second = connect(broker), connect(broker)
    assert threads() == set()
    assert first.publish(make_message()).confirmed
    assert "mlproducer-io" in threads()
    assert second.publish(make_message()).confirmed
    assert {"mlproducer-io", "mlproducer-io-2"} <= threads()
    assert all(thread.daemon for thread in our_threads())


def test_many_start_it_at_once(connect: Connect, serve: Serve) -> None:
    """However many threads come first, there is one engine and one connection."""
    broker = serve()
    producer = connect(broker)
    background = Background()
    barrier = threading.Barrier(20)

    def publish(name: str) -> bool:
        barrier.wait(LIMIT)
        return producer.publish(make_message(name)).confirmed

    for number in range(20):
        background.call(publish, f"{number}")
    assert background.gather() == [True] * 20
    assert broker.accepted == 1


# --- the end -----------------------------------------------------------------------------------


def test_nothing_is_left(serve: Serve) -> None:
    """After close() no thread, descriptor or connection is left (110)."""
    broker = serve()
    before = descriptors()
    for number in range(5):
        producer = MLProducer(Settings(url=broker.url, **QUICK))
        producer.on("confirmed", lambda: None)
        assert producer.publish(make_message()).confirmed
        for _ in range(number):
            broker.connections[0].reset()
            assert producer.publish(make_message()).result(LIMIT).confirmed
        producer.close()
        assert threads() == set()
        broker.wait_for_connections(0, LIMIT)
        assert descriptors() == before


def test_closed(connect: Connect, serve: Serve) -> None:
    """Nothing is taken any more; the state says so; nothing starts again."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message()).confirmed
    assert producer.close().abandoned == ()
    calls: list[Callable[[], Any]] = [
        lambda: producer.publish(make_message()),
        lambda: producer.submit(make_message()),
        lambda: producer.publish_many([make_message()]),
        producer.start,
        producer.reconnect,
        lambda: producer.wait_connected(0),
    ]
    for call in calls:
        with pytest.raises(ProducerClosedError) as caught:
            call()
        assert not caught.value.possibly_sent
    assert producer.status().connection_state is ConnectionState.CLOSED
    assert not producer.is_healthy()
    assert threads() == set()
    assert len(broker.messages) == 1


def test_close_drains(connect: Connect, serve: Serve) -> None:
    """What is in flight has until the timeout to be confirmed, and is counted."""
    broker = serve(Silent())
    producer = connect(broker)
    futures = [producer.submit(make_message()) for _ in range(10)]
    messages = broker.wait_for_messages(10, LIMIT)
    background = Background()
    background.call(producer.close, LIMIT)
    ack(messages[-1], multiple=True)
    with in_time(1.0):
        [report] = background.gather()
    assert (report.confirmed, report.abandoned) == (10, ())
    assert all(future.result(0).confirmed for future in futures)


def test_close_gives_up_in_time(connect: Connect, serve: Serve) -> None:
    """What lived only in memory is listed, and everyone who waits is told."""
    broker = serve(Silent())
    producer = connect(broker)
    background = Background()
    waiting = background.call(producer.publish, make_message("waiting"), timeout=30)
    future = producer.submit(make_message("in flight"))
    receipt = producer.publish(make_message("deferred"), timeout=0.1)
    broker.wait_for_messages(3, LIMIT)
    with in_time(0.8, 0.3):
        report = producer.close(0.3)
    assert set(report.abandoned) == {"waiting", "in flight", "deferred"}
    for error in (waiting.exception(LIMIT), future.exception(0)):
        assert isinstance(error, ProducerClosedError)
        assert error.possibly_sent
    with pytest.raises(ProducerClosedError):
        receipt.result(0)


def test_what_was_given_back_is_not_abandoned(connect: Connect, serve: Serve) -> None:
    """A message whose error was raised is its publisher's, and not among those that were lost."""
    producer = connect(serve(Silent()))
    assert producer.wait_connected(LIMIT)
    with pytest.raises(ConfirmTimeoutError):
        producer.publish(make_message("given back"), timeout=0.1, retry=False)
    producer.submit(make_message("ours"))
    assert producer.close(0.1).abandoned == ("ours",)


def test_abandoned_is_what_its_future_says(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where confirms, and further messages, come while the producer closes."""
    monkeypatch.setattr(lifecycle, "CLOSE_MARGIN", LIMIT)  # all threads end
    for _ in range(5):
        producer, publishers = connect(serve()), Background()
        assert producer.wait_connected(LIMIT)
        futures: list[DeliveryFuture] = []

        def submit_on(producer: MLProducer = producer, futures: Any = futures) -> None:
            with suppress(ProducerClosedError):
                while True:
                    futures.append(producer.submit(make_message()))

        for _ in range(20):
            publishers.call(submit_on)
        assert producer.publish(make_message()).confirmed
        report = producer.close(0.0)
        publishers.gather()
        errors = [(future.message_id, future.exception(LIMIT)) for future in futures]
        assert set(report.abandoned) == {name for name, error in errors if error is not None}


def test_what_is_handed_in_too_late_is_not_abandoned(
    connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher that is about to hand it in is told by its own call, and by nothing else."""
    producer, background = connect(serve()), Background()
    assert producer.wait_connected(LIMIT)
    entered, go_on, post = threading.Event(), threading.Event(), Engine.post_stored

    def hesitate(engine: Engine, delivery: Delivery) -> None:
        entered.set()
        assert go_on.wait(LIMIT)
        post(engine, delivery)

    monkeypatch.setattr(Engine, "post_stored", hesitate)
    call = background.call(producer.submit, make_message())
    assert entered.wait(LIMIT)
    report = producer.close(0.0)
    go_on.set()
    assert isinstance(call.exception(LIMIT), ProducerClosedError)
    assert report.abandoned == ()


def test_flush_while_another_thread_closes(connect: Connect, serve: Serve) -> None:
    """It waits, and does not say that nothing is left while something is."""
    broker, background = serve(Silent()), Background()
    producer = connect(broker)
    future = producer.submit(make_message())
    [message] = broker.wait_for_messages(1, LIMIT)
    closing = background.call(producer.close, LIMIT)
    wait_until(lambda: producer.closed)
    assert producer.flush(0.1) == 1
    flushing = background.call(producer.flush)
    ack(message)
    assert (closing.result(LIMIT).confirmed, flushing.result(LIMIT)) == (1, 0)
    assert future.result(0).confirmed
    background.gather()


def test_close_twice(connect: Connect, serve: Serve) -> None:
    """The second close gives the first one's report, at once."""
    producer = connect(serve(Silent()))
    producer.submit(make_message("m"))
    report = producer.close(0.1)
    assert report.abandoned == ("m",)
    with in_time(0.5):
        assert producer.close() is report


def test_close_from_five_threads(connect: Connect, serve: Serve) -> None:
    """All of them return in time, with publishers on other threads all the while (81)."""
    broker = serve()
    producer = connect(broker)
    publishers, closers = Background(), Background()

    def publish() -> None:
        while True:
            producer.publish(make_message())

    for _ in range(5):
        publishers.call(publish)
    broker.wait_for_messages(50, LIMIT)
    with in_time(2.5):
        reports = [closers.call(producer.close, 2.0) for _ in range(5)]
        closers.gather()
    assert len({id(report.result(0)) for report in reports}) == 1
    with pytest.raises(ProducerClosedError):
        publishers.gather()


def test_a_close_that_is_not_answered(
    connect: Connect, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that is slow to answer it is cut off, and that is no lost connection to warn of."""
    broker = serve()
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url))
        assert producer.publish(make_message("m")).confirmed
        proxy.hole("both")
        with caplog.at_level("INFO", logger="mlproducer"):
            producer.close(LIMIT)
    told = [(each.levelname, each.getMessage()) for each in caplog.records]
    (line,) = [(level, text) for level, text in told if text.startswith("disconnected")]
    assert line[0] == "INFO"
    assert line[1].startswith("disconnected kind=closed")


@pytest.mark.parametrize("timeout", [0.0, 0.2])
@pytest.mark.parametrize("where", ["deaf", "refused", "blocked", "hole"])
def test_close_against_all_odds(connect: Connect, serve: Serve, where: str, timeout: float) -> None:
    """While connecting, or waiting to, or blocked, or cut off: within timeout + 0.5 s (35)."""
    broker = serve(Silent())
    with Proxy(("127.0.0.1", broker.port)) as proxy:
        producer = connect(proxy.url(broker.url), connection_timeout=30.0)
        if where == "deaf":
            proxy.deaf()
        elif where == "refused":
            proxy.refuse()
        producer.start()
        if where in ("blocked", "hole"):
            assert producer.wait_connected(LIMIT)
            blocked = threading.Event()
            producer.on("blocked", blocked.set)
            broker.connections[0].block()
            assert blocked.wait(LIMIT)
        if where == "hole":
            proxy.hole("both")
        future = producer.submit(make_message("m"), retry=False)
        with in_time(timeout + 0.5):
            producer.close(timeout)
        assert isinstance(future.exception(0), PublishError)
        wait_until(lambda: threads() <= {"mlproducer-proxy"})


def test_context_manager(serve: Serve) -> None:
    """A with block ends with close(), also when it raises."""
    broker = serve()
    settings = Settings(url=broker.url, **QUICK)
    with MLProducer(settings) as producer:
        future = producer.submit(make_message())
    assert future.result(0).confirmed
    assert threads() == set()
    with suppress(LookupError), MLProducer(settings) as producer:
        producer.start()
        raise LookupError
    assert producer.status().connection_state is ConnectionState.CLOSED


def test_dropped(serve: Serve) -> None:
    """A producer that the program has dropped delivers what it has, and is closed then."""
    broker = serve()
    gc.collect()  # what earlier tests have left to it
    before = descriptors(), threading.active_count()

    def use() -> Any:
        return MLProducer(Settings(url=broker.url, **QUICK)).submit(make_message())

    futures = [use() for _ in range(5)]
    gc.collect()
    assert all(future.result(LIMIT).confirmed for future in futures)
    broker.wait_for_connections(0, LIMIT)
    wait_until(lambda: (descriptors(), threading.active_count()) == before)


def test_dropped_with_a_message_that_waits(serve: Serve) -> None:
    """It is not closed while it owes something: what was deferred is delivered."""
    broker = serve()
    broker.stop_listening()
    receipt = MLProducer(Settings(url=broker.url, **QUICK)).publish(make_message())
    gc.collect()
    assert not receipt.confirmed
    broker.listen_again()
    assert receipt.result(LIMIT).confirmed


@pytest.mark.parametrize("held", [True, False])
def test_the_process_ends(serve: Serve, held: bool) -> None:
    """What was submitted is delivered at exit, whether or not the program holds the producer."""
    broker = serve(SlowOpen())
    run_script(
        f"""
        producers = []
        def work():
            producer = MLProducer(settings)
            {"producers.append(producer)" if held else ""}
            for number in range(100):
                producer.submit(Message(body=b"", routing_key="k", message_id=str(number)))
        work(); gc.collect()
        """,
        broker.url,
    )
    assert len({each.properties.message_id for each in broker.messages}) == 100


def test_the_process_ends_while_a_daemon_closes(serve: Serve) -> None:
    """The exit finishes the close() of a thread that ends with the process."""
    broker = serve(SlowOpen())
    run_script(
        """
        producer = MLProducer(settings)
        for number in range(50):
            producer.submit(Message(body=b"", routing_key="k"))
        threading.Thread(target=producer.close, daemon=True).start()
        while producer.status().connection_state.name != "CONNECTING": time.sleep(0.001)
        time.sleep(0.1)
        """,
        broker.url,
    )
    assert len(broker.messages) == 50


def test_ctrl_c_in_close(serve: Serve) -> None:
    """The next close() drains, reports and tells; so does the end of the process."""
    broker = serve(Silent())
    said, errors = run_script(
        """
        producer, other = MLProducer(settings), MLProducer(settings)
        futures = [producer.submit(Message(body=b"", routing_key="k")) for _ in range(5)]
        other.submit(Message(body=b"", routing_key="k"))
        for each in (producer, other):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                each.close(5)
            except KeyboardInterrupt:
                print("interrupted")
        print(len(producer.close(0.2).abandoned), all(future.done() for future in futures))
        """,
        broker.url,
        exit_timeout=0.5,
    )
    assert said == "interrupted\ninterrupted\n5 True\n"
    assert "messages lost that lived in memory: 1" in errors


def test_an_exit_hook_is_the_first_to_use_it(serve: Serve) -> None:
    """Registered before the import it is called after ours, and is refused with an error."""
    broker = serve()
    said, _ = run_script(
        """
        def late():
            for each in (used, fresh):
                try:
                    each.submit(Message(body=b"", routing_key="k"))
                except ProducerClosedError as error:
                    print(error)
        used, fresh = MLProducer(settings), MLProducer(settings)
        used.publish(Message(body=b"", routing_key="k"))
        """,
        broker.url,
        before="import atexit; atexit.register(lambda: late())",
    )
    assert said.splitlines() == [
        "the producer is closed",
        "the process ends: producers have been closed",
    ]
    assert len(broker.messages) == 1


def test_twenty_producers_end_within_one_limit(serve: Serve) -> None:
    """They are drained, ended and joined together, although no broker answers."""
    broker = serve(Silent())
    said, errors = run_script(
        """
        producers = [MLProducer(settings) for _ in range(20)]
        for each in producers:
            each.submit(Message(body=b"", routing_key="k"))
        assert all(each.wait_connected(30) for each in producers)
        print(time.monotonic())
        """,
        broker.url,
        exit_timeout=2.0,
    )
    assert time.monotonic() - float(said) < 30.0  # one after the other they would take 40 s
    assert "messages lost that lived in memory: 20" in errors


def test_ctrl_c_at_exit(serve: Serve) -> None:
    """It is not waited any longer, everything is ended, and what is lost is told."""
    broker = serve(Silent())
    with in_time(10.0):
        _, errors = run_script(
            """
            producers = [MLProducer(settings) for _ in range(3)]
            for each in producers:
                each.submit(Message(body=b"", routing_key="k"))
            life, exits = producers[0]._life, threading.Event()
            drain = life.drain
            life.drain = lambda *deadlines: exits.set() or drain(*deadlines)
            def interrupt():
                exits.wait()
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=interrupt, daemon=True).start()
            """,
            broker.url,
            exit_timeout=15.0,
        )
    assert "messages lost that lived in memory: 3" in errors


def test_one_that_cannot_be_closed_at_exit(serve: Serve) -> None:
    """An error in the end of one producer keeps the others from nothing."""
    broker = serve(SlowOpen())
    _, errors = run_script(
        """
        producers = [MLProducer(settings) for _ in range(3)]
        for each in producers:
            each.submit(Message(body=b"", routing_key="k"))
        def fail(deadline):
            raise OSError("canary")
        producers[0]._life.drain = fail
        """,
        broker.url,
    )
    assert "a producer could not be" in errors
    assert len(broker.messages) >= 2


def run_script(text: str, url: str, *, before: str = "", **settings: Any) -> tuple[str, str]:
    """Run a program of its own that has ``settings``; return its output and its errors."""
    head = f"""
import gc, logging, os, signal, sys, threading, time
{before}
from mlproducer import Message, MLProducer, Settings
from mlproducer.errors import ProducerClosedError
logging.basicConfig(level=logging.ERROR)
logging.getLogger("pika").setLevel(logging.CRITICAL)
settings = Settings(url={url!r}, **{ {**QUICK, **settings}!r})
"""
    ended = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    return ended.stdout, ended.stderr


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that is reported nowhere; give up after a limit."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{}/s.db"])
def test_waits_end_with_close(connect: Connect, store: str, tmp_path: Path) -> None:
    """flush() and wait_connected() without a limit come back when another thread closes."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"amqp://u:p@127.0.0.1:{reserved.getsockname()[1]}/"
        producer = connect(url, store_url=store.format(tmp_path))
        assert not producer.publish(make_message()).confirmed
        background = Background()
        background.call(producer.flush)
        background.call(producer.wait_connected)
        threading.Event().wait(0.1)  # until they wait, which is reported nowhere
        producer.close(0.1)
        left, connected = background.gather()
    assert not connected
    assert left in ((0, 1) if store == "memory://" else (1,))  # memory forgets it at any moment


@pytest.mark.parametrize("timeout", [1e10, float(sys.maxsize), 10**400])
def test_timeouts_beyond_what_can_be_waited_for(
    connect: Connect, serve: Serve, timeout: float
) -> None:
    """They count as for ever, everywhere a timeout is taken."""
    producer = connect(serve())
    assert producer.wait_connected(timeout)
    assert producer.publish(make_message(), timeout=timeout).confirmed
    assert producer.publish_many([make_message()], timeout=timeout)[0].confirmed  # type: ignore[union-attr]
    future = producer.submit(make_message(), timeout=timeout)
    assert future.result(timeout).result(timeout).confirmed
    assert future.exception(timeout) is None
    assert producer.flush(timeout) == 0
    assert producer.close(timeout).abandoned == ()


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf")])
def test_timeouts_that_are_none(connect: Connect, serve: Serve, timeout: float) -> None:
    """What is no number of seconds is refused, and nothing is sent."""
    broker = serve()
    producer = connect(broker)
    calls: list[Callable[[], Any]] = [
        lambda: producer.publish(make_message(), timeout=timeout),
        lambda: producer.submit(make_message(), timeout=timeout),
        lambda: producer.publish_many([make_message()], timeout=timeout),
        lambda: producer.flush(timeout),
        lambda: producer.wait_connected(timeout),
        lambda: producer.close(timeout),
    ]
    assert producer.publish(make_message()).confirmed
    for call in calls:
        with pytest.raises(ConfigurationError, match="timeout"):
            call()
    assert len(broker.messages) == 1


# --- what it shows and refuses -----------------------------------------------------------------


def test_one_finalizer_for_all(connect: Connect, serve: Serve) -> None:
    """However many producers come and go; another once those of a process were forgotten."""
    broker, registry = serve(), multiprocessing.util._finalizer_registry  # type: ignore[attr-defined]

    def finalizers() -> int:
        assert connect(broker).publish(make_message()).confirmed
        return len(registry)

    before = finalizers()
    assert [finalizers(), finalizers()] == [before, before]
    for finalizer in lifecycle._finalizers.values():
        assert registry.pop(finalizer._key, None)
    assert finalizers() == before


@pytest.mark.parametrize("carry", [pickle.dumps, copy.copy, copy.deepcopy])
def test_not_picklable(carry: Callable[[object], object]) -> None:
    """A producer does not travel; the error says what does."""
    with pytest.raises(TypeError, match="pickle its settings"):
        carry(MLProducer(Settings(url="amqp://u:p@h/")))


def test_repr_and_status(connect: Connect, serve: Serve) -> None:
    """They name the broker and the state, and no credentials."""
    broker = serve()
    producer = connect(broker.url.replace("guest:guest", "user:canary-8c1f"))
    assert f"127.0.0.1:{broker.port}" in repr(producer)
    assert "DISCONNECTED" in repr(producer)
    assert producer.publish(make_message()).confirmed
    status = producer.status()
    assert status.broker == f"127.0.0.1:{broker.port}"
    assert status.healthy
    assert status.to_json()["rabbitmq"]["connectionState"] == "CONNECTED"
    assert "CONNECTED" in repr(producer)
    for shown in (repr(producer), repr(status), str(status.to_json()), repr(producer.settings)):
        assert "canary-8c1f" not in shown
        assert "user" not in shown


def test_no_process_of_ours(connect: Connect, serve: Serve) -> None:
    """Nothing is forked or spawned by publishing."""
    before = children()
    producer = connect(serve())
    assert producer.publish(make_message()).confirmed
    assert children() <= before  # those of other tests are there too, a node say


def children() -> set[str]:
    """Return the processes that any thread of this one has started."""
    found = Path("/proc/self/task").glob("*/children")
    return {child for each in found for child in each.read_text(encoding="ascii").split()}


# --- a broker that is away ---------------------------------------------------------------------


@pytest.mark.parametrize(("timeout", "least", "most"), [(None, 0.2, 0.8), (1.0, 1.0, 1.5)])
def test_close_without_a_broker(
    connect: Connect, serve: Serve, timeout: float | None, least: float, most: float
) -> None:
    """It is not waited for longer than at the end of the process, unless one is told to."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, exit_timeout=0.2)
    receipt = producer.publish(make_message("m"))
    with in_time(most, least):
        report = producer.close() if timeout is None else producer.close(timeout)
    assert report.abandoned == (receipt.message_id,)


def test_close_with_a_slow_broker(connect: Connect, serve: Serve) -> None:
    """One that is there is given its time."""
    broker = serve(Silent())
    producer = connect(broker, exit_timeout=0.1)
    future = producer.submit(make_message())
    [message] = broker.wait_for_messages(1, LIMIT)
    message.connection.later(0.5, lambda: ack(message))
    assert producer.close().confirmed == 1
    assert future.result(0).confirmed


def test_flush_after_it_gave_up(connect: Connect, serve: Serve) -> None:
    """It is a call like another, and starts the attempts over."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, max_reconnect_attempts=1, gave_up_interval=0.0)
    gave_up = events_of(producer, "gave_up")
    receipt = producer.publish(make_message())
    gave_up.wait_for("gave_up")
    broker.listen_again()
    assert producer.flush(LIMIT) == 0
    assert receipt.confirmed


def test_flush_while_it_gives_up(connect: Connect, serve: Serve) -> None:
    """Attempts that are used up while it waits start over, too: it waited in vain ever after."""
    broker = serve()
    broker.stop_listening()
    producer = connect(broker, max_reconnect_attempts=1, gave_up_interval=0.0)
    gave_up = events_of(producer, "gave_up")
    receipt = producer.publish(make_message())
    gave_up.wait_for("gave_up")
    flush = Background().call(producer.flush, LIMIT)
    gave_up.wait_for("gave_up", "gave_up", "gave_up")
    broker.listen_again()
    assert flush.result(LIMIT) == 0
    assert receipt.result(LIMIT).confirmed


def test_publishers_come_through_after_the_end(connect: Connect, serve: Serve) -> None:
    """No timer lets them through any more where the one before them does not pass on."""
    producer = connect(serve())
    assert producer.wait_connected(LIMIT)
    io = io_of(producer)
    latches = [Latch() for _ in range(4)]
    finished = io.connector._finished

    def finish() -> None:
        io.relay.open(latches[0])
        io.relay.open(latches[1])
        finished()

    io.connector._finished = finish
    producer.close(LIMIT)
    io.relay.open(latches[2])
    io.relay.open(latches[3])
    assert all(latch.wait(LIMIT) for latch in latches)
