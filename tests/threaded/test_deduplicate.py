"""A worker leaves out what has been completed, and runs whatever it cannot be sure of."""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject

from mlproducer.contrib.celery import completed_tasks, deduplicate, deduplication
from mlproducer.errors import ConfigurationError
from mlproducer.testing import PostgreSQLServer, Proxy, RedisServer
from tests.helpers import LIMIT, Background


class Worker:
    """Runs tasks as a worker's child does, in this process."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self.ran: list[Any] = []

    def run(self, name: str, task_id: str, *args: Any, **request: Any) -> str:
        """Have a task run, and return the state in which it ended."""
        task = self._app.tasks[name]
        task.__trace__ = build_tracer(name, task, app=self._app)
        full = {"id": task_id, "retries": 0, "is_eager": False, "delivery_info": {}, **request}
        result = task.__trace__(task_id, args, {}, full)
        return str(result.info.state if result.info else "SUCCESS")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker's tasks, noted in a SQLite file."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    worker = Worker(app)

    @app.task(name="shop.work", shared=False, bind=True, acks_late=True, max_retries=9)
    def work(self: Any, how: str) -> None:
        worker.ran.append((self.request.id, how))
        if how == "fail":
            raise ValueError("it fails")
        if how == "retry" and not self.request.retries:
            raise self.retry(countdown=0)
        if how == "reject":
            raise Reject("again", requeue=True)
        if how == "die":
            raise SystemExit(1)

    @app.task(name="shop.other", shared=False)
    def other(how: str) -> None:
        worker.ran.append(("other", how))

    deduplicate(app, f"sqlite:///{tmp_path}/notes.db")
    app.finalize()
    yield worker
    app.close()


def test_what_has_been_completed_does_not_run_again(worker: Worker) -> None:
    """Well or in failure; another id does, and another task with the same one."""
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    assert worker.run("shop.work", "1", "x") == "IGNORED"
    assert worker.run("shop.work", "2", "fail") == "FAILURE"
    assert worker.run("shop.work", "2", "fail") == "IGNORED"
    assert worker.run("shop.other", "1", "x") == "SUCCESS"  # it has replaced the first
    assert worker.ran == [("1", "x"), ("2", "fail"), ("other", "x")]


def test_a_retry_is_another_run(worker: Worker) -> None:
    """The attempt that asked for it is left out from then on; the retry runs, once."""
    assert worker.run("shop.work", "1", "retry") == "RETRY"
    assert worker.run("shop.work", "1", "retry") == "IGNORED"
    assert worker.run("shop.work", "1", "retry", retries=1) == "SUCCESS"
    assert worker.run("shop.work", "1", "retry", retries=1) == "IGNORED"
    assert len(worker.ran) == 2


def test_what_was_cut_off_runs_again(worker: Worker) -> None:
    """It was rejected to come again, or its worker died; or it fails and is to come back."""
    assert worker.run("shop.work", "1", "reject") == "REJECTED"
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    with pytest.raises(SystemExit):
        worker.run("shop.work", "2", "die")
    assert worker.run("shop.work", "2", "x") == "SUCCESS"
    worker._app.tasks["shop.work"].acks_on_failure_or_timeout = False
    assert worker.run("shop.work", "3", "fail") == "FAILURE"
    assert worker.run("shop.work", "3", "x") == "SUCCESS"


def test_what_runs_elsewhere_runs_here_too(worker: Worker) -> None:
    """There is no lock that a worker could die with."""
    task = worker._app.tasks["shop.work"]
    inside: list[str] = []
    run = task.run
    task.run = lambda how: (inside.append(worker.run("shop.other", "1", "x")), run(how))
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    assert inside == ["SUCCESS"]


def test_calls_that_are_no_deliveries(worker: Worker) -> None:
    """A task that is called like a function, or eagerly, runs each time."""
    work = worker._app.tasks["shop.other"]
    for _ in range(2):
        work("direct")
        work.apply(("eager",), task_id="1")
    assert [how for _, how in worker.ran] == ["direct", "eager"] * 2


def test_a_note_ends(worker: Worker, tmp_path: Path) -> None:
    """After ttl it runs again; the settings may be given again."""
    deduplicate(worker._app, f"sqlite:///{tmp_path}/notes.db", ttl=0.05)
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    threading.Event().wait(0.1)
    assert worker.run("shop.work", "1", "x") == "SUCCESS"


def test_a_place_that_is_away(
    worker: Worker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks run, with one warning; once it is back, notes count again."""
    monkeypatch.setattr(deduplication, "PAUSE", 0.0)
    deduplicate(worker._app, f"sqlite:///{tmp_path}/missing/notes.db")
    for _ in range(3):
        assert worker.run("shop.work", "1", "x") == "SUCCESS"
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert [each.name for each in warnings if "mlproducer" in each.name] == [
        "mlproducer.contrib.celery.deduplication"
    ]
    (tmp_path / "missing").mkdir()
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    assert worker.run("shop.work", "1", "x") == "IGNORED"


def test_sqlite_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too old is deleted now and then."""
    monkeypatch.setattr(completed_tasks, "SWEEP", 10)
    made = completed_tasks.SQLiteCompletedTasks(str(tmp_path / "notes.db"))
    for number in range(20):
        made.add(f"k{number}", 1e-9)
    left = made._connection().execute("SELECT COUNT(*) FROM completed").fetchone()
    assert left[0] <= 1


def test_redis(redis_server: RedisServer) -> None:
    """Notes end by themselves; a connection that was closed meanwhile is made again."""
    with Proxy((redis_server.host, redis_server.port)) as proxy:
        url = redis_server.url.replace(str(redis_server.port), str(proxy.port))
        made = completed_tasks.completed_tasks_at(f"{url}?prefix=dedup")
        made.add("a", 60.0)
        assert made.has("a")
        assert not made.has("b")
        proxy.reset()
        assert made.has("a")
        made.add("b", 0.01)
        threading.Event().wait(0.05)
        assert not made.has("b")
        proxy.close()
        with pytest.raises(made.errors):
            made.has("a")


def test_postgresql(
    worker: Worker, postgresql_server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers make the table together; old notes are deleted; an ended connection is made again."""
    monkeypatch.setattr(completed_tasks, "SWEEP", 3)
    url = f"{postgresql_server.url}?table=t{secrets.token_hex(4)}"
    background = Background()
    for name in "abcdefgh":
        background.call(completed_tasks.completed_tasks_at(url).add, name, 60.0)
    background.gather()
    made = completed_tasks.completed_tasks_at(url)
    assert all(map(made.has, "abcdefgh"))
    assert not made.has("x")
    made.add("x", 0.01)
    threading.Event().wait(0.05)
    assert not made.has("x")
    made.add("x", 60.0)
    assert made.has("x")
    postgresql_server.call(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
    )
    made.add("y", 60.0)
    assert made.has("y")
    table = f"{url.rpartition('=')[2]}_completed"
    assert postgresql_server.call(f"SELECT count(*) FROM {table}") == [(10,)]
    deduplicate(worker._app, url)
    assert worker.run("shop.work", "1", "x") == "SUCCESS"
    assert worker.run("shop.work", "1", "x") == "IGNORED"


def test_a_postgresql_that_is_silent(worker: Worker, postgresql_server: PostgreSQLServer) -> None:
    """The task runs, after a moment; those that follow do not wait."""
    with Proxy((postgresql_server.host, postgresql_server.port)) as proxy:
        url = postgresql_server.url.replace(str(postgresql_server.port), str(proxy.port))
        deduplicate(worker._app, f"{url}?table=t{secrets.token_hex(4)}")
        assert worker.run("shop.work", "1", "x") == "SUCCESS"
        proxy.hole("both")
        started = time.monotonic()
        for _ in range(3):
            assert worker.run("shop.work", "1", "x") == "SUCCESS"
        assert time.monotonic() - started < LIMIT


def test_notes_that_are_garbage_close_their_connection(
    postgresql_server: PostgreSQLServer,
) -> None:
    """In a cycle too, where the connection itself, which would warn, may be finalised first."""
    made = completed_tasks.completed_tasks_at(
        f"{postgresql_server.url}?table=t{secrets.token_hex(4)}"
    )
    assert isinstance(made, completed_tasks.PostgreSQLCompletedTasks)
    assert not made.has("1")
    closing = made._own.connection
    closing.it.cycle = closing
    del made, closing
    gc.collect()


@pytest.mark.parametrize(
    "url", ["memory://", "postgresql://u:secret@h/a/b", "amqp://h", "redis://u:secret@/x y", 1]
)
def test_urls(url: Any) -> None:
    """What cannot hold notes is refused, and nothing of it shown."""
    with pytest.raises(ConfigurationError, match="deduplicate") as caught:
        deduplicate(Celery("shop", set_as_current=False), url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="ttl"):
        deduplicate(Celery("shop", set_as_current=False), "sqlite:///x.db", ttl=0)
