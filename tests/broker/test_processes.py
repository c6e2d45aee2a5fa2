"""A producer that was made, and used, in one process works in its children and disturbs nothing."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import mlproducer
from mlproducer import CeleryTask, MLProducer, Settings
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.proxy import Proxy
from tests.broker.scripts import DIRECTORY, FORK_WARNING, Program, drain, run, script
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker

QUEUE = "ml.embed"
ENDINGS = {"return": 0, "sys.exit": 7, "os._exit": 7, "exec": 0, "kill": -signal.SIGKILL}


def _once(*names: str) -> Counter[str]:
    return Counter(names)


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def test_child_has_its_own_connection(rabbitmq_vhost: VirtualHost) -> None:
    """It has another local port than its parent, holds nothing of its parent's, and both go on."""
    node = rabbitmq_vhost.node
    with script("children", "own_connection", url=rabbitmq_vhost.url) as program:
        child = program.next()
        at_the_broker = {int(re.findall(r":(\d+) ->", name)[0]) for name in node.connections()}
        program.go()
        parent = program.next()
        ended = program.end()
    assert child["confirmed"]
    assert len(child["inherited"]) >= 3  # the connection, and both ends of the mailbox's bell
    assert set(child["inherited"].values()) == {"/dev/null"}
    assert parent["before"] == parent["after"]
    assert len(parent["before"]) == len(child["ports"]) == 1
    assert parent["before"] != child["ports"]
    assert at_the_broker >= {*parent["before"], *child["ports"]}
    assert (parent["code"], parent["confirmed"]) == (0, True)
    assert (ended.returncode, ended.stderr) == (0, "")
    expected = _once("child-1", "parent-1", "parent-2", "parent-3")
    assert drain(rabbitmq_vhost.url, QUEUE) == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_pending_messages_stay_the_parents(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, ending: str
) -> None:
    """What the parent has pending is sent once, by the parent, however its child ends."""
    with script("children", "pending", ending, url=proxy.url(rabbitmq_vhost.url)) as program:
        assert program.next() == {"connected": True}
        proxy.stall("c2s")
        program.go()
        assert program.next() == {"undecided": 20, "left": 0, "state": 1}
        if ending == "exec":
            assert program.next() == {"descriptors": ["0", "1", "2"]}
        assert program.next() == {"code": ENDINGS[ending]}
        proxy.resume()
        program.go()
        assert program.next() == {"attempts": [1] * 20, "left": 0}
        ended = program.end()
        assert (ended.returncode, ended.stderr) == (0, "")
    assert proxy.accepted == 1
    expected = _once("first", *_numbered("pending", 20))
    assert drain(rabbitmq_vhost.url, QUEUE) == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_child_delivers(rabbitmq_vhost: VirtualHost, ending: str) -> None:
    """A child that ends in order delivers first what it submitted; none loses what is confirmed."""
    ended = run("children", "delivering", ending, url=rabbitmq_vhost.url)
    assert ended.reports[-1] == {"code": ENDINGS[ending], "confirmed": True}
    assert (ended.returncode, ended.stderr) == (0, "")
    expected = _once("parent", "published", "parent-again", *_numbered("submitted", 20))
    assert drain(rabbitmq_vhost.url, QUEUE) == expected


def test_only_made_in_the_parent(rabbitmq_vhost: VirtualHost) -> None:
    """A producer that its parent never used works in the child, beside a second one."""
    ended = run("children", "unused", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.reports, ended.stderr) == (0, [{"code": 0}], "")
    assert drain(rabbitmq_vhost.url, QUEUE) == _once("first", "second")


def test_fork_in_a_callback(rabbitmq_vhost: VirtualHost) -> None:
    """A child that one of the producer's callbacks forks may publish in it."""
    ended = run("children", "in_callback", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.reports, ended.stderr) == (0, [{"code": 0}], "")
    assert drain(rabbitmq_vhost.url, QUEUE) == _once("parent", "child")


@pytest.mark.parametrize("how", ["close", "kill"])
def test_parent_ends_while_its_child_sleeps(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, how: str
) -> None:
    """The broker sees the parent's connection end within a second: no child holds it open."""
    with script("children", "sleeping", how, url=proxy.url(rabbitmq_vhost.url)) as program:
        program.next()
        assert proxy.connections == 1
        program.go()
        proxy.wait_for_connections(0, timeout=60.0)


def test_forks_while_threads_publish(rabbitmq_vhost: VirtualHost) -> None:
    """50 forks under load: every child and every thread publishes, each message once, and soon."""
    ended = run("storm", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    *children, parent = ended.reports
    slowest = max(child["seconds"] for child in children)
    print({name: parent[name] for name in ("published", "median", "p99", "longest")}, slowest)
    assert parent["codes"] == [0] * 30
    assert parent["confirmed"] == parent["published"]
    assert parent["longest"] < 4.0
    assert slowest < 5.0
    seen = drain(rabbitmq_vhost.url, QUEUE)
    assert set(seen.values()) == {1}
    assert len(seen) == 1 + 30 + parent["published"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_child_makes_no_call_on_what_it_inherited(
    rabbitmq_vhost: VirtualHost, tmp_path: Path
) -> None:
    """Until a number leads to /dev/null, a child does nothing with it: no write, no epoll_ctl."""
    trace = tmp_path / "trace"
    calls = "network,dup2,dup3,close,read,write,epoll_ctl,epoll_wait,epoll_pwait,poll,ioctl,fcntl"
    argv = ["strace", "-f", "-qq", "-e", f"trace={calls}", "-e", "signal=none", "-o", str(trace)]
    argv += [sys.executable, "-W", FORK_WARNING, str(DIRECTORY / "children.py"), "own_connection"]
    done = subprocess.run(
        argv,
        input=b"\n",
        capture_output=True,
        env={**os.environ, "RABBITMQ_URL": rabbitmq_vhost.url},
        timeout=60.0,
        check=True,
    )
    child = json.loads(done.stdout.splitlines()[0])
    pid = child["pid"]
    inherited = set(child["inherited"])
    done_with: set[str] = set()
    for line in trace.read_text().splitlines():
        match = re.match(rf"{pid} +(\w+)\((\d+)(?:, (\d+))?", line)
        if match is None:
            continue
        call, first, second = match.groups()
        if call.startswith("dup"):
            done_with.add(second)
        else:
            assert first not in inherited - done_with, line
    assert inherited <= done_with


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(rabbitmq_vhost: VirtualHost, method: str) -> None:
    """Children of multiprocessing publish, and deliver what they submitted before they end."""
    ended = run("multi", method, url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.reports[-1] == {"codes": [0, 0], "confirmed": True}
    names = ["parent", "parent-again", "child-0-published", "child-1-published"]
    expected = _once(*names, *_numbered("child-0", 50), *_numbered("child-1", 50))
    assert drain(rabbitmq_vhost.url, QUEUE) == expected


def _get(port: int) -> dict[str, Any]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60.0)) as connection:
        connection.request("GET", "/")
        answer: dict[str, Any] = json.load(connection.getresponse())
        return answer


def _ask_until_two_have_answered(port: int) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60.0
    with ThreadPoolExecutor(4) as pool:
        while len({answer["pid"] for answer in answers}) < 2:
            assert time.monotonic() < deadline
            answers += pool.map(_get, [port] * 8)
    return answers


@pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="needs gunicorn")
def test_gunicorn_with_preload(rabbitmq_vhost: VirtualHost) -> None:
    """Both workers publish with the producer that was made before the fork; none warns of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [sys.executable, "-W", "error::DeprecationWarning", "-m", "gunicorn"]
        argv += ["--preload", "--workers", "2", "--bind", f"fd://{listener.fileno()}"]
        argv += ["wsgi_app:app"]
        with Program(argv, rabbitmq_vhost.url, descriptors=[listener.fileno()]) as program:
            answers = _ask_until_two_have_answered(listener.getsockname()[1])
            program.signal(signal.SIGTERM)
            ended = program.end()
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert "Warning" not in ended.stderr
    assert all(answer["confirmed"] for answer in answers)
    expected = _once(*(each for answer in answers for each in answer["ids"]))
    assert drain(rabbitmq_vhost.url, QUEUE) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("gunicorn") is None or importlib.util.find_spec("gevent") is None,
    reason="needs gunicorn and gevent",
)
@pytest.mark.parametrize("used", [False, True])
def test_gunicorn_with_gevent_and_preload(rabbitmq_vhost: VirtualHost, used: bool) -> None:
    """What is made, or used, before gevent patches in the workers works in them, and at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [sys.executable, "-m", "gunicorn", "--worker-class", "gevent", "--preload"]
        argv += ["--workers", "2", "--bind", f"fd://{listener.fileno()}", "wsgi_app:app"]
        _serve(rabbitmq_vhost, argv, listener, used=used)


UWSGI = importlib.util.find_spec("uwsgidecorators")  # it comes with the program


@pytest.mark.skipif(UWSGI is None, reason="needs uWSGI")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("threads", [[], ["--enable-threads"], ["--threads", "4"]])
def test_uwsgi(rabbitmq_vhost: VirtualHost, threads: list[str], used: bool) -> None:
    """Its workers are forked without Python's hooks, and make connections of their own."""
    assert UWSGI is not None
    assert UWSGI.origin is not None
    prefix = Path(UWSGI.origin).parents[3]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [str(prefix / "bin" / "uwsgi"), "--virtualenv", str(prefix)]
        argv += ["--pythonpath", str(Path(mlproducer.__file__).parents[1])]
        argv += ["--http-socket", f"fd://{listener.fileno()}", "--module", "wsgi_app:app"]
        argv += ["--master", "--processes", "2", "--need-app", "--die-on-term", *threads]
        _serve(rabbitmq_vhost, argv, listener, used=used)


def _serve(host: VirtualHost, argv: list[str], listener: socket.socket, *, used: bool) -> None:
    """Have two workers publish, and see that each message came once."""
    environ = {"PUBLISH_AT_IMPORT": "1"} if used else {}
    with Program(argv, host.url, environ, descriptors=[listener.fileno()]) as program:
        with in_time(15.0):
            answers = _ask_until_two_have_answered(listener.getsockname()[1])
        program.signal(signal.SIGTERM)
        program.end()
    assert all(answer["confirmed"] for answer in answers)
    names = [each for answer in answers for each in answer["ids"]]
    seen = drain(host.url, QUEUE)
    assert set(seen.values()) == {1}
    assert seen.keys() >= {*names[::2], *(["master"] if used else [])}  # what was published


@pytest.mark.skipif(importlib.util.find_spec("celery") is None, reason="needs celery")
def test_celery_prefork(rabbitmq_vhost: VirtualHost) -> None:
    """Tasks publish in every child of a prefork worker, also in those that replace others."""
    argv = [sys.executable, "-m", "celery", "--app", "celery_app", "worker"]
    argv += ["--pool", "prefork", "--without-gossip", "--without-mingle"]
    with Program([*argv, "--heartbeat-interval", "1"], rabbitmq_vhost.url) as program:
        assert program.next() == {"ready": True}
        with MLProducer(Settings(url=rabbitmq_vhost.url)) as producer:
            for number in range(20):
                producer.publish(CeleryTask("relay", [number], routing_key="relay"))
        runs = [program.next() for _ in range(20)]
        program.signal(signal.SIGTERM)
        ended = program.end()
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert all(each["confirmed"] for each in runs)
    assert {each["number"] for each in runs} == set(range(20))
    assert len({each["pid"] for each in runs}) >= 4
    names = [f"{number}-{how}" for number in range(20) for how in ("published", "submitted")]
    assert drain(rabbitmq_vhost.url, QUEUE) == _once("main", *names)
