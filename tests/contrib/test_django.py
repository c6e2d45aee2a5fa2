"""A real Django project: its own test suite, its commands, and the servers that run it.

Runs on: pytest's main thread; the project in processes of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

from mlproducer.testing import Behaviour, FakeBroker, PostgreSQLServer
from mlproducer.testing.erlang import free_port
from mlproducer.testing.fake_broker import FakeConnection, ReceivedMessage
from tests.stopwatch import in_time

pytest.importorskip("django")

ROOT = Path(__file__).parents[2]
PROJECT = Path(__file__).parent / "project"
LIMIT = 60.0
"""Seconds; generous, since the processes import Django on a busy machine."""


class Project:
    """A copy of the project, with a database of its own."""

    def __init__(self, directory: Path, broker_url: str) -> None:
        self.directory = directory
        shutil.copytree(
            PROJECT, directory, ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3")
        )
        self.environ = {
            **{name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}",
            "PYTHONWARNINGS": "error::DeprecationWarning:mlproducer",
            "DJANGO_SETTINGS_MODULE": "mysite.settings",
            "SQLITE": str(directory / "db.sqlite3"),
            "RABBITMQ_URL": broker_url,
        }

    def manage(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command of manage.py."""
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=self.directory,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    @contextmanager
    def serving(self, *argv: str, **environ: str) -> Iterator[str]:
        """Run a server, whose arguments name ``{port}``; return its address."""
        assert self.manage("migrate", "-v", "0").returncode == 0
        port = free_port()
        command = [sys.executable, *(each.format(port=port) for each in argv)]
        log = self.directory / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**self.environ, **environ},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for_port(port, process, log)
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(LIMIT)
        assert "Traceback" not in log.read_text()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            client.settimeout(1)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)  # nothing tells of another process that begins to listen
    pytest.fail(log.read_text())


def post(address: str, *texts: str) -> dict[str, object]:
    """Make shares of these texts, and return what the view answers."""
    body = urlencode([("text", text) for text in texts]).encode()
    with urllib.request.urlopen(address, body, timeout=LIMIT) as response:
        assert response.status == 201
        answer: dict[str, object] = json.load(response)
    return answer


def texts_of(messages: list[ReceivedMessage]) -> list[str]:
    """Return the texts that workers would get."""
    return sorted(json.loads(each.body)[1]["content"]["text"] for each in messages)


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    """A broker that takes everything, and notes who connects."""
    with FakeBroker() as fake:
        yield fake


@pytest.fixture
def project(tmp_path: Path, broker: FakeBroker) -> Project:
    """A fresh copy, whose environment names the broker."""
    return Project(tmp_path / "project", broker.url)


def test_its_own_suite(project: Project, broker: FakeBroker) -> None:
    """It passes on SQLite; the broker that the environment names is not even connected to."""
    ran = project.manage("test", "shares")
    assert ran.returncode == 0, ran.stderr
    assert broker.accepted == 0


def test_check(project: Project, broker: FakeBroker) -> None:
    """``manage.py check`` fails without a URL and not with one; ``--deploy`` asks for a store."""
    without = project.manage("check", RABBITMQ_URL="")
    assert without.returncode == 1
    assert "mlproducer.E002" in without.stderr
    assert project.manage("check").returncode == 0
    assert "mlproducer.W003" in project.manage("check", "--deploy").stderr
    recording = json.dumps({"PRODUCER": "mlproducer.testing.RecordingProducer"})
    assert project.manage("check", RABBITMQ_URL="", MLPRODUCER=recording).returncode == 0
    assert broker.accepted == 0


def test_command(project: Project, broker: FakeBroker) -> None:
    """The library's commands run with Django's settings, and return their exit codes."""
    given = json.dumps({"URL": broker.url})
    listed = project.manage("mlproducer", "dead-letters", "list", RABBITMQ_URL="", MLPRODUCER=given)
    assert broker.accepted > 0, listed.stderr
    assert project.manage("mlproducer", "nonsense").returncode == 2
    assert "dead-letters" in project.manage("mlproducer", "--help").stdout


SERVERS = {
    "gunicorn-sync": ["-m", "gunicorn", "-w", "2", "mysite.wsgi", "-b", "127.0.0.1:{port}"],
    "gunicorn-gthread": [
        *("-m", "gunicorn", "-w", "2", "--threads", "4", "--preload"),
        *("mysite.wsgi", "-b", "127.0.0.1:{port}"),
    ],
    "gunicorn-gevent": [
        *("-m", "gunicorn", "-w", "2", "-k", "gevent", "mysite.wsgi", "-b", "127.0.0.1:{port}"),
    ],
    "uvicorn": ["-m", "uvicorn", "mysite.asgi:application", "--port", "{port}"],
}


@pytest.mark.parametrize("server", SERVERS)
def test_servers(project: Project, broker: FakeBroker, server: str) -> None:
    """Each process that publishes has one connection; what was answered was published."""
    if importlib.util.find_spec(SERVERS[server][1]) is None:
        pytest.skip(f"needs {SERVERS[server][1]}")
    numbers = [str(number) for number in range(24)]
    with project.serving(*SERVERS[server]) as address:
        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda text: post(f"{address}/shares", text), numbers))
        assert texts_of(broker.messages) == sorted(numbers)
        assert broker.accepted == len({answer["pid"] for answer in answers})
        if server == "uvicorn":
            assert post(f"{address}/shares/async")["confirmed"]
            assert broker.accepted == 1
        assert urllib.request.urlopen(f"{address}/ml/metrics", timeout=LIMIT).status == 200
    broker.wait_for_connections(0, LIMIT)


def test_autoreload(project: Project, broker: FakeBroker) -> None:
    """Of runserver's processes only the one that publishes connects, and each reload ends one."""
    argv = ["manage.py", "runserver", "127.0.0.1:{port}"]
    with project.serving(*argv, DEBUG="1") as address:
        first = post(f"{address}/shares", "a")["pid"]
        assert len(broker.connections) == 1
        views = project.directory / "shares" / "views.py"
        views.write_text(views.read_text() + "\n# changed\n")
        os.utime(views, (time.time() + 5, time.time() + 5))
        broker.wait_for_connections(0, LIMIT)
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                second = post(f"{address}/shares", "b")["pid"]
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline
                time.sleep(0.1)  # nothing tells that the next process listens
        assert first != second
        assert (len(broker.connections), broker.accepted) == (1, 2)
        assert texts_of(broker.messages) == ["a", "b"]


@pytest.fixture
def on_postgresql(project: Project, postgresql_server: PostgreSQLServer) -> Project:
    """The same project, with its database in PostgreSQL."""
    pytest.importorskip("psycopg")
    server = postgresql_server
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": server.host,
        "PORT": server.port,
        "NAME": server.database,
        "USER": server.user,
        "PASSWORD": server.password,
    }
    server.call("ALTER ROLE app CREATEDB")
    project.environ["DATABASE"] = json.dumps(database)
    return project


def test_its_own_suite_on_postgresql(on_postgresql: Project, broker: FakeBroker) -> None:
    """It passes there too."""
    ran = on_postgresql.manage("test", "shares")
    assert ran.returncode == 0, ran.stderr
    assert broker.accepted == 0


def test_admin(on_postgresql: Project) -> None:
    """The pages of the outbox list and filter rows, and send some again; the model is migrated."""
    on_postgresql.environ["DJANGO_SETTINGS_MODULE"] = "mysite.admin_settings"
    ran = on_postgresql.manage("test", "shares.admin_tests")
    assert ran.returncode == 0, ran.stderr
    checked = on_postgresql.manage("makemigrations", "--check", "--dry-run", "mlproducer")
    assert checked.returncode == 0, checked.stdout


def test_outbox(
    on_postgresql: Project, broker: FakeBroker, postgresql_server: PostgreSQLServer
) -> None:
    """What was committed is delivered, what was rolled back is not; ``migrate`` makes the table."""
    argv = ["-m", "gunicorn", "mysite.wsgi", "-b", "127.0.0.1:{port}"]
    with on_postgresql.serving(*argv, ML_STORE_URL=postgresql_server.url) as address:
        for texts in ([("text", "gone"), ("broken", "1")], [("text", "kept")]):
            body = urlencode(texts).encode()
            assert urllib.request.urlopen(f"{address}/shares/outbox", body).status == 201
        assert texts_of(broker.wait_for_messages(1, LIMIT)) == ["kept"]


FIRST_IN_A_PROCESS = """
from django.db import transaction
from mlproducer import SummarizationTask
from mlproducer.contrib.django import publish_in_transaction
with transaction.atomic():
    receipt = publish_in_transaction(SummarizationTask(1, {"text": "a"}))
print(receipt.result(30).outcome.value if WAIT else "")
"""


def test_the_first_receipt(on_postgresql: Project, postgresql_server: PostgreSQLServer) -> None:
    """It learns its message's fate like all later ones."""
    assert on_postgresql.manage("migrate", "-v", "0").returncode == 0
    program = FIRST_IN_A_PROCESS.replace("WAIT", "True")
    ran = on_postgresql.manage("shell", "-c", program, ML_STORE_URL=postgresql_server.url)
    assert ran.stdout.split()[-1:] == ["confirmed"], ran.stderr
    assert "STORE_URL" not in ran.stderr


def test_a_row_where_no_producer_looks(
    on_postgresql: Project, postgresql_server: PostgreSQLServer
) -> None:
    """It is told that the store is in another database than the transaction."""
    assert on_postgresql.manage("migrate", "-v", "0").returncode == 0
    program = FIRST_IN_A_PROCESS.replace("WAIT", "False")
    url = postgresql_server.url.rpartition("/")[0] + "/postgres"
    ran = on_postgresql.manage("shell", "-c", program, ML_STORE_URL=url, RABBITMQ_URL="")
    assert ran.returncode == 0, ran.stderr
    postgresql_server.call("TRUNCATE mlproducer_messages")  # the server is that of other tests too
    assert "wrote a row to the database 'app', but STORE_URL names 'postgres'" in ran.stderr


def test_relay(
    on_postgresql: Project, broker: FakeBroker, postgresql_server: PostgreSQLServer
) -> None:
    """A process of its own sends what others have committed, who know no broker."""
    argv = ["-m", "gunicorn", "mysite.wsgi", "-b", "127.0.0.1:{port}"]
    url = postgresql_server.url
    with on_postgresql.serving(*argv, ML_STORE_URL=url, RABBITMQ_URL="") as address:
        body = urlencode([("text", "relayed")]).encode()
        assert urllib.request.urlopen(f"{address}/shares/outbox", body).status == 201
        assert broker.accepted == 0
    given = json.dumps({"URL": broker.url, "STORE_URL": url})
    relay = subprocess.Popen(
        [sys.executable, "manage.py", "mlproducer", "relay"],
        cwd=on_postgresql.directory,
        env={**on_postgresql.environ, "RABBITMQ_URL": "", "MLPRODUCER": given},
    )
    try:
        assert texts_of(broker.wait_for_messages(1, LIMIT)) == ["relayed"]
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(LIMIT) == 0
    finally:
        relay.kill()
        relay.wait(LIMIT)


class Silent(Behaviour):
    """Takes messages, and never confirms one."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Do nothing."""


def test_silent_broker(tmp_path: Path) -> None:
    """However many tasks a transaction has, its request waits for one timeout, and is answered."""
    with FakeBroker(Silent()) as broker:
        project = Project(tmp_path / "project", broker.url)
        argv = ["-m", "gunicorn", "mysite.wsgi", "-b", "127.0.0.1:{port}"]
        with project.serving(*argv, ML_PUBLISH_TIMEOUT="1000") as address:
            post(f"{address}/shares", "first")  # which imports what is needed
            with in_time(3.0, 1.0):
                post(f"{address}/shares", *map(str, range(6)))
            broker.wait_for_messages(7, LIMIT)
