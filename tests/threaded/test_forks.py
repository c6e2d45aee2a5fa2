"""Forks, also those that Python does not notice, and those for which nothing is left."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlproducer.testing.fake_broker import (
    Behaviour,
    FakeBroker,
    FakeConnection,
    ReceivedMessage,
)
from tests.threaded.conftest import QUICK, Serve

HEAD = """
import ctypes, logging, os, resource, sys, threading, time
from mlproducer import Message, MLProducer, Settings
from mlproducer.errors import StoreError
from tests.stopwatch import in_time
logging.basicConfig(level=logging.ERROR)
settings = Settings(url={url!r}, **{settings!r})

def message(name):
    return Message(body=b"", routing_key="k", message_id=name)

def wait_for(child):
    assert os.waitpid(child, 0)[1] == 0
"""


def run_script(text: str, broker: FakeBroker, *, before: str = "", **settings: Any) -> str:
    """Run a program of its own that forks, and return its output."""
    head = before + HEAD.format(url=broker.url, settings={**QUICK, **settings})
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=120.0,
        check=False,
    )
    print(ended.stderr)  # whole, where the assertion cuts it
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def names(broker: FakeBroker) -> Counter[str]:
    """Count the messages that have come, by their ids."""
    return Counter(str(message.properties.message_id) for message in broker.messages)


without_hooks = pytest.mark.skipif(
    sys.version_info >= (3, 13),
    reason="such a child crashes in the interpreter, whose locks keep a list of those who wait",
)


@without_hooks
def test_a_fork_that_runs_no_hooks(serve: Serve) -> None:
    """A child of C code makes its own connection at its first call; its parent's is not touched."""
    broker = serve()
    run_script(
        """
        producer, other = MLProducer(settings), MLProducer(settings)
        producer.publish(message("parent"))
        assert other.wait_connected(30.0)
        time.sleep(0.3)  # until its threads sleep: a thread that waits for the interpreter's lock
        child = ctypes.PyDLL(None).fork()
        if child == 0:
            with in_time(2.5):
                ids = {producer.publish(Message(body=b"", routing_key="k")).message_id}
                assert producer.publish(message("child")).confirmed
                assert other.submit(message("other")).result(30.0).confirmed
            producer.close(1)
            other.close(1)
            os._exit(0)
        wait_for(child)
        assert producer.publish(message("parent again")).confirmed
        producer.close()
        """,
        broker,
        retry_sweep_interval=60.0,  # would leave that lock unusable in the child of such a fork
    )
    seen = names(broker)
    assert set(seen.values()) == {1}
    assert seen.keys() >= {"parent", "child", "other", "parent again"}
    assert broker.accepted == 4


@without_hooks
def test_a_fork_that_runs_no_hooks_where_the_kernel_wipes_nothing(serve: Serve) -> None:
    """Then the process id tells it."""
    broker = serve()
    run_script(
        """
        from mlproducer import _forks as forks
        producer = MLProducer(settings)
        producer.publish(message("parent"))
        assert isinstance(forks._process.begun, forks._Pid)
        time.sleep(0.3)
        child = ctypes.PyDLL(None).fork()
        if child == 0:
            assert producer.publish(message("child")).confirmed
            producer.close(1)
            os._exit(0)
        wait_for(child)
        assert producer.publish(message("parent again")).confirmed
        producer.close()
        """,
        broker,
        before="import mmap; del mmap.MAP_ANONYMOUS",
        retry_sweep_interval=60.0,
    )
    assert names(broker) == {"parent": 1, "child": 1, "parent again": 1}


@without_hooks
def test_a_fork_that_runs_no_hooks_and_a_file_that_is_open(serve: Serve, tmp_path: Path) -> None:
    """SQLite may not be used on from its parent's file; that is said at once, and what to do."""
    said = run_script(
        """
        logging.disable()
        producer = MLProducer(settings)
        producer.publish(message("parent"))
        assert producer.flush(30.0) == 0
        time.sleep(0.3)
        child = ctypes.PyDLL(None).fork()
        if child == 0:
            with in_time(1.0):
                try:
                    producer.publish(message("child"))
                except StoreError as error:
                    print(error, flush=True)
            producer.close(1)
            os._exit(0)
        wait_for(child)
        assert producer.publish(message("parent again")).confirmed
        """,
        serve(),
        retry_sweep_interval=60.0,
        store_url=f"sqlite:///{tmp_path}/s.db?write_ahead=1",
    )
    assert "fork before it is first used" in said


class SlowToConfirm(Behaviour):
    """Confirms after half a second."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Basic.Ack, later."""
        connection.later(0.5, connection.ack, channel, tag)


def test_a_fork_amid_publish_many(serve: Serve) -> None:
    """Tasks that fork: a child says what its parent has, and publishes what follows itself."""
    broker = serve(SlowToConfirm())
    run_script(
        """
        from mlproducer.errors import ConnectionLostError
        producer = MLProducer(settings)
        assert producer.wait_connected(30.0)

        def tasks():
            global child
            yield message("first")
            yield message("second")
            child = os.fork()
            yield message("parent" if child else "child")

        results = producer.publish_many(tasks(), timeout=30.0)
        if child == 0:
            assert results.pop().confirmed
            for each in results:
                assert isinstance(each, ConnectionLostError) and each.possibly_sent, repr(each)
            producer.close(1)
            os._exit(0)
        wait_for(child)
        assert all(each.confirmed for each in results)
        """,
        broker,
    )
    assert names(broker) == {"first": 1, "second": 1, "parent": 1, "child": 1}


def test_a_fork_with_no_descriptor_left(serve: Serve) -> None:
    """Each producer of the child begins afresh, and lets go of what is its parent's."""
    broker = serve()
    run_script(
        """
        producers = [MLProducer(settings) for _ in range(3)]
        for each in producers:
            assert each.wait_connected(30.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        files = []
        try:
            while True:
                files.append(open(os.devnull))
        except OSError:
            pass
        child = os.fork()
        if child == 0:
            for file in files:
                file.close()
            for number, each in enumerate(producers):
                assert each.publish(message(f"child {number}")).confirmed
                each.close(1)
            os._exit(0)
        for file in files:
            file.close()
        wait_for(child)
        for number, each in enumerate(producers):
            assert each.publish(message(f"parent {number}")).confirmed
        """,
        broker,
    )
    assert len(names(broker)) == 6
    assert broker.accepted == 6


def test_threads_of_a_child_have_no_number(serve: Serve) -> None:
    """The only producer of a child is its first one."""
    said = run_script(
        """
        producer = MLProducer(settings)
        producer.publish(message("parent"))
        child = os.fork()
        if child == 0:
            producer.publish(message("child"))
            print(sorted(t.name for t in threading.enumerate() if t.name.startswith("mlproducer")))
            sys.stdout.flush()
            producer.close(1)
            os._exit(0)
        wait_for(child)
        """,
        serve(),
    )
    assert "mlproducer-io" in said
    assert "-2" not in said


def test_a_fork_lets_go_of_dropped_producers(serve: Serve) -> None:
    """A child holds no descriptor of a producer that its parent has dropped and that still runs."""
    broker = serve()
    run_script(
        """
        MLProducer(settings).submit(message("dropped")).result(30.0)
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{name}")]
            assert not any("socket" in each or "eventpoll" in each for each in held), held
            os._exit(0)
        wait_for(child)
        """,
        broker,
        retry_sweep_interval=60.0,  # until which it is not closed
    )
    assert names(broker) == {"dropped": 1}


def test_a_fork_without_poll(serve: Serve) -> None:
    """Where eventlet has taken poll away, a child lets go of its parent's connection just so."""
    broker = serve()
    run_script(
        """
        import select
        del select.epoll, select.poll
        producer = MLProducer(settings)
        assert producer.publish(message("parent")).confirmed
        child = os.fork()
        if child == 0:
            held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{name}")]
            assert not any("socket" in each for each in held), held
            assert producer.publish(message("child")).confirmed
            producer.close(1)
            os._exit(0)
        wait_for(child)
        assert producer.publish(message("parent again")).confirmed
        """,
        broker,
    )
    assert names(broker) == {"parent": 1, "child": 1, "parent again": 1}
    assert broker.accepted == 2


@pytest.mark.parametrize(
    "module", ["pika", "prometheus_client", "orjson", "opentelemetry.propagate"]
)
def test_a_fork_in_the_middle_of_an_import(module: str, serve: Serve) -> None:
    """A child is forked once other threads have imported what a first use needs.

    A module that was half imported is locked in it for ever: its first publish() did not return.
    """
    if "opentelemetry" in module:
        pytest.importorskip("opentelemetry.trace")
    broker = serve()
    run_script(
        f"""
        import signal
        from mlproducer import CeleryTask

        def message(name):
            return CeleryTask("t", [], routing_key="k", task_id=name)

        begun, forked = threading.Event(), threading.Event()

        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    begun.set()
                    forked.wait(0.2)  # not for ever: the fork waits for this import

        sys.meta_path.insert(0, Slow())
        producer = MLProducer(settings)
        thread = threading.Thread(target=producer.publish, args=(message("parent"),))
        thread.start()
        assert begun.wait(60)
        child = os.fork()
        forked.set()
        if child == 0:
            signal.alarm(60)  # ends it
            assert producer.publish(message("child")).confirmed
            producer.close(1)
            os._exit(0)
        wait_for(child)
        thread.join()
        producer.close()
        """,
        broker,
        before="import opentelemetry.trace\n" if "opentelemetry" in module else "",
    )
    assert names(broker) == {"parent": 1, "child": 1}


SLOW_HOOK = """
import os, threading
os.register_at_fork(before=lambda: threading.Event().wait(0.3))  # it runs after the library's
"""


def test_a_fork_in_the_middle_of_the_import_of_a_store(serve: Serve, tmp_path: Path) -> None:
    """The store is not opened before the fork is over, though its module came amid the fork.

    A child that was forked beside an open file could not use the store at all.
    """
    broker = serve()
    run_script(
        """
        begun = threading.Event()

        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name == "mlproducer.stores.sqlite":
                    begun.set()
                    threading.Event().wait(0.2)  # until the fork has begun

        sys.meta_path.insert(0, Slow())
        producer = MLProducer(settings)
        thread = threading.Thread(target=producer.publish, args=(message("parent"),))
        thread.start()
        assert begun.wait(60)
        child = os.fork()
        if child == 0:
            assert producer.publish(message("child")).confirmed
            producer.close(1)
            os._exit(0)
        wait_for(child)
        thread.join()
        producer.close()
        """,
        broker,
        before=SLOW_HOOK,
        store_url=f"sqlite:///{tmp_path}/s.db?write_ahead=1",
    )
    assert names(broker) == {"parent": 1, "child": 1}


def test_a_fork_while_another_producer_is_made(serve: Serve, tmp_path: Path) -> None:
    """A fork and a thread that makes a store do not wait for each other until one gives up."""
    broker = serve()
    run_script(
        """
        from mlproducer.stores.sqlite import database

        begun = threading.Event()
        add = database._forks.add

        def slow(each):
            begun.set()
            threading.Event().wait(0.2)  # until the fork has begun
            add(each)

        database._forks.add = slow
        producer = MLProducer(settings)
        thread = threading.Thread(target=producer.start)
        thread.start()
        assert begun.wait(60)
        with in_time(2.5):
            child = os.fork()
            if child == 0:
                os._exit(0)
        wait_for(child)
        thread.join()
        producer.close()
        """,
        broker,
        store_url=f"sqlite:///{tmp_path}/s.db",
    )


def test_a_child_with_its_parents_process_id(serve: Serve) -> None:
    """In a pid namespace of its own a child begins afresh too: each is process 1 of its own."""
    broker = serve()
    run_script(
        """
        producer = MLProducer(settings)
        producer.publish(message("parent"))
        child = os.fork()
        if child == 0:
            assert producer.publish(message("child")).confirmed
            producer.close(1)
            os._exit(0)
        wait_for(child)
        assert producer.publish(message("parent again")).confirmed
        producer.close()
        """,
        broker,
        before="import os; os.getpid = lambda: 1",
    )
    assert names(broker) == {"parent": 1, "child": 1, "parent again": 1}
    assert broker.accepted == 2


def test_a_fork_in_the_middle_of_the_start(serve: Serve) -> None:
    """A child that is forked while another thread starts the producer makes its own."""
    broker = serve()
    run_script(
        """
        MLProducer(settings).start()  # imports
        for number in range(20):
            producer = MLProducer(settings)
            thread = threading.Thread(target=producer.start)
            thread.start()
            child = os.fork()
            if child == 0:
                assert producer.publish(message(f"child {number}")).confirmed
                producer.close(1)
                os._exit(0)
            thread.join()
            wait_for(child)
            assert producer.publish(message(f"parent {number}")).confirmed
            producer.close()
        """,
        broker,
    )
    assert len(names(broker)) == 40
