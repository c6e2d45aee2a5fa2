"""The command ``mlproducer relay``, in processes of their own, on a broker that counts.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import psycopg
import pytest

from mlproducer import CeleryTask, MLProducer, Settings, outbox
from mlproducer.cli.relay import DRAIN
from mlproducer.stores.protocol import Depth, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.testing import FakeBroker, PostgreSQLServer
from tests.broker.commands import COMMAND, environ_of, run
from tests.helpers import make_envelope
from tests.stopwatch import in_time

LIMIT = 120.0

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def store_url(postgresql_server: PostgreSQLServer) -> str:
    """Name a table that is not there yet."""
    return f"{postgresql_server.url}?table=test_{secrets.token_hex(4)}"


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    """Yield a broker that confirms everything."""
    with FakeBroker() as made:
        yield made


@pytest.fixture
def start(broker: FakeBroker, store_url: str) -> Iterator[Start]:
    """Start relays, which have said that they relay; they end with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*argv: str) -> subprocess.Popen[str]:
        environ = environ_of(broker.url, {"ML_STORE_URL": store_url})
        relay = subprocess.Popen(
            [*COMMAND, "relay", *argv], env=environ, stdout=subprocess.PIPE, text=True
        )
        started.append(relay)
        return relay

    yield begin
    for relay in started:
        relay.kill()
        relay.communicate(timeout=LIMIT)


def read_until(stream: IO[str] | None, said: str) -> str:
    """Read lines until one says that."""
    assert stream is not None
    for line in stream:
        if said in line:
            return line
    raise AssertionError(f"the relay ended without {said!r}")


def test_the_table_is_made_or_shown(
    store_url: str, broker: FakeBroker, postgresql_server: PostgreSQLServer
) -> None:
    """``--print-sql`` is what ``--create-table`` does; both may be repeated."""
    shown = run("relay", "--print-sql", url=broker.url, ML_STORE_URL=store_url)
    assert shown.returncode == 0
    postgresql_server.call(shown.stdout, user="app")
    for _ in range(2):
        made = run("relay", "--create-table", url=broker.url, ML_STORE_URL=store_url)
        assert made.returncode == 0, made.stderr
    assert postgresql_server.password not in made.stdout + made.stderr
    for url in ("memory://", "sqlite:///store.db"):
        refused = run("relay", "--create-table", url=broker.url, ML_STORE_URL=url)
        assert refused.returncode == 2
    assert run("relay", url=broker.url).returncode == 2


def test_relays_share_the_work_and_drain(
    start: Start, store_url: str, broker: FakeBroker, postgresql_server: PostgreSQLServer
) -> None:
    """Each row is sent once; health and metrics are served; SIGTERM ends them with 0."""
    assert run("relay", "--create-table", url=broker.url, ML_STORE_URL=store_url).returncode == 0
    first, second = start("--port", "0"), start()
    address = read_until(first.stdout, "health and metrics").split()[-1]
    for relay in (first, second):
        read_until(relay.stdout, "relaying")
    producer = MLProducer(Settings(url=broker.url, store_url=store_url))
    with psycopg.connect(postgresql_server.url) as connection:
        for batch in range(20):
            for n in range(50):
                task = CeleryTask("t", routing_key="k", task_id=f"{batch}-{n}")
                outbox.add(connection, task, producer=producer)
            connection.commit()
    found = broker.wait_for_messages(1000, LIMIT)
    assert len({each.properties.message_id for each in found}) == 1000
    with urllib.request.urlopen(f"{address}health", timeout=LIMIT) as answer:
        assert json.load(answer)["healthy"] is True
    with urllib.request.urlopen(f"{address}metrics", timeout=LIMIT) as answer:
        shown = answer.read()
    for name in (b"tasks_sent_total", b"outbox_rows", b"outbox_oldest_seconds"):
        assert b"ml_producer_" + name in shown
    for relay in (first, second):
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(LIMIT) == 0
    assert len(broker.messages) == 1000
    producer.close(0)


def test_a_store_that_was_never_there(broker: FakeBroker) -> None:
    """At the end it does not say that 0 wait: that is not known."""
    environ = environ_of(broker.url, {"ML_STORE_URL": "postgresql://app:private@127.0.0.1:1/app"})
    with subprocess.Popen(
        [*COMMAND, "relay"], env=environ, stdout=subprocess.PIPE, text=True
    ) as relay:
        read_until(relay.stdout, "relaying")
        relay.send_signal(signal.SIGTERM)
        said = read_until(relay.stdout, "ended")
        assert relay.wait(LIMIT) == 1
    assert "not known" in said
    assert "private" not in said


def test_rows_that_wait_do_not_delay_the_end(broker: FakeBroker, tmp_path: Path) -> None:
    """At SIGTERM nothing is claimed any more, and what is not in flight is left to others."""
    path = tmp_path / "store.db"
    with closing(SQLiteStore(path, horizon=60.0)) as store:
        store.put([Entry(Record(make_envelope("later")), 20.0)], LIMIT)
        environ = environ_of(broker.url, {"ML_STORE_URL": f"sqlite:///{path}"})
        environ["ML_MESSAGE_RETRY_MAX_DELAY"] = "60000"
        with subprocess.Popen(
            [*COMMAND, "relay"], env=environ, stdout=subprocess.PIPE, text=True
        ) as relay:
            read_until(relay.stdout, "relaying")
            relay.send_signal(signal.SIGTERM)
            with in_time(DRAIN / 2):
                assert relay.wait(LIMIT) == 0
        assert store.depth() == Depth(waiting=1)
