"""How a program ends that never called ``close()``, and what signals do to one that publishes."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import mlproducer
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.broker.scripts import drain, run, script
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker

PACKAGE = Path(mlproducer.__file__).parent
QUEUE = "ml.embed"
EXIT_LIMIT = 5.0
SLACK = 10.0
"""Seconds for the interpreter's own end, on a machine that is busy."""


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


@pytest.mark.parametrize(("how", "count"), [("publish", 20), ("submit", 900)])
@pytest.mark.parametrize(("ending", "code"), [("return", 0), ("sys.exit", 3), ("raise", 1)])
def test_end_delivers(
    rabbitmq_vhost: VirtualHost, how: str, count: int, ending: str, code: int
) -> None:
    """A script that ends delivers first; its exit code and its standard error are its own."""
    ended = run("ending", how, str(count), ending, url=rabbitmq_vhost.url)
    assert ended.returncode == code
    if ending == "raise":
        assert ended.stderr.startswith("Traceback (most recent call last):\n")
        assert ended.stderr.endswith("RuntimeError: unhandled\n")
        assert ended.stderr.count("Traceback") == 1
        assert f"{PACKAGE}/" not in ended.stderr
    else:
        assert ended.stderr == ""
    assert drain(rabbitmq_vhost.url, QUEUE) == Counter(_numbered(how, count))


def test_thread_that_outlives_the_main_thread(rabbitmq_vhost: VirtualHost) -> None:
    """A thread that is still publishing when the main thread ends delivers all it publishes."""
    ended = run("ending", "publish", "200", "thread", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert drain(rabbitmq_vhost.url, QUEUE) == Counter(["first", *_numbered("publish", 200)])


def test_publishing_at_exit(rabbitmq_vhost: VirtualHost) -> None:
    """A function called at exit may publish; one called after the producer's end is refused."""
    ended = run("at_exit", "used", url=rabbitmq_vhost.url)
    assert ended.reports == [{"confirmed": True}, {"refused": "ProducerClosedError"}]
    assert (ended.returncode, ended.stderr) == (0, "")
    assert drain(rabbitmq_vhost.url, QUEUE) == Counter(["before", "in time"])


def test_first_use_at_exit(rabbitmq_vhost: VirtualHost) -> None:
    """The first use may be at exit; where Python starts no thread then, that is a clear error."""
    ended = run("at_exit", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    if sys.version_info[:2] == (3, 12):
        assert ended.reports[0] == {"refused": "NotConnectedError"}
    else:
        assert ended.reports == [{"confirmed": True}, {"refused": "ProducerClosedError"}]
        assert drain(rabbitmq_vhost.url, QUEUE) == Counter(["in time"])


@pytest.mark.parametrize("how", ["publish", "submit"])
def test_end_without_a_broker(how: str) -> None:
    """It ends within its limit, with its own exit code, and says once how many were lost."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"amqp://u:p@127.0.0.1:{reserved.getsockname()[1]}/"
        with script("ending", how, "7", "tell sys.exit", url=url) as program:
            assert program.next() == {"ends": True}
            started = time.monotonic()
            ended = program.end()
    assert time.monotonic() - started < EXIT_LIMIT + SLACK
    assert ended.returncode == 3
    assert re.findall(r"messages lost.*: (\d+)", ended.stderr) == ["7"]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("fault", ["blocked", "frozen"])
def test_end_while_the_broker_does_not_answer(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, fault: str
) -> None:
    """A broker that blocks or hangs holds the end up for no longer than the limit."""
    node = rabbitmq_vhost.node
    with script("ending", "submit", "7", "wait sys.exit", url=proxy.url(rabbitmq_vhost.url)) as run:
        assert run.next() == {"connected": True}
        if fault == "blocked":
            node.set_memory_alarm()
        else:
            proxy.stall()
        try:
            with in_time(EXIT_LIMIT + SLACK):
                run.go()
                ended = run.end()
        finally:
            if fault == "blocked":
                node.clear_memory_alarm()
    assert ended.returncode == 3
    assert re.findall(r"messages lost.*: (\d+)", ended.stderr) == ["7"]
    assert "Traceback" not in ended.stderr


def test_sigterm_by_default(rabbitmq_vhost: VirtualHost) -> None:
    """SIGTERM kills a program that does not handle it, and loses nothing that was confirmed."""
    with script("signals", "sigterm_by_default", url=rabbitmq_vhost.url) as program:
        published = [program.next()["published"] for _ in range(20)]
        program.signal(signal.SIGTERM)
        ended = program.end()
    assert ended.returncode == -signal.SIGTERM
    published += [report["published"] for report in ended.reports]
    seen = drain(rabbitmq_vhost.url, QUEUE)
    assert seen.keys() >= set(published)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("fault", [None, "frozen"])
def test_sigterm_handler_that_closes(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, fault: str | None
) -> None:
    """A handler may call close(), in the middle of a publish(), and that keeps its timeout."""
    with script("signals", "sigterm_closes", url=proxy.url(rabbitmq_vhost.url)) as program:
        assert program.next() == {"connected": True}
        if fault:
            proxy.stall()
        program.signal(signal.SIGTERM)
        report = program.next()
        ended = program.end()
    assert ended.returncode == 0
    assert report["seconds"] < 2.0 + SLACK
    if fault is None:
        assert ended.stderr == ""
        seen = drain(rabbitmq_vhost.url, QUEUE)
        assert set(seen.values()) == {1}
        assert seen.keys() >= {*report["submitted"]} - {*report["abandoned"]}
        assert len(report["abandoned"]) <= 2  # what the interrupted loop had in its hands


def test_ctrl_c_in_publish(rabbitmq_vhost: VirtualHost, proxy: Proxy) -> None:
    """Ctrl-C leaves publish() at once; the message arrives at most once, the producer works."""
    with script("signals", "ctrl_c", url=proxy.url(rabbitmq_vhost.url)) as program:
        assert program.next() == {"connected": True}
        proxy.stall("c2s")
        program.go()
        assert program.next() == {"publishing": True}
        program.signal(signal.SIGINT)
        assert program.next(10.0) == {"interrupted": True}
        proxy.resume()
        program.go()
        assert program.next() == {"confirmed": True, "left": 0}
        ended = program.end()
    assert (ended.returncode, ended.stderr) == (0, "")
    seen = drain(rabbitmq_vhost.url, QUEUE)
    assert seen.pop("interrupted", 0) <= 1
    assert seen == Counter(["first", "next"])


def test_many_interrupts(rabbitmq_vhost: VirtualHost) -> None:
    """500 interrupts at random points lose no slot and no confirmed message; none is sent twice."""
    ended = run("signals", "interrupts", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    (report,) = ended.reports
    assert (report["left"], report["pending"], report["last"]) == (0, 0, True)
    seen = drain(rabbitmq_vhost.url, QUEUE)
    assert set(seen.values()) == {1}
    assert seen.keys() >= set(report["returned"])


def test_close_in_a_signal_handler(rabbitmq_vhost: VirtualHost) -> None:
    """close(0.3) in a handler that interrupts a call at any point, even the first, is in time."""
    ended = run("signals", "closings", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    (report,) = ended.reports
    assert report["refused"] == 60
    assert report["longest"] < 0.3 + SLACK
