"""The PostgreSQL store and an outbox on a primary and a standby, which takes over.

Replication is synchronous, as it has to be where what was committed must outlive the primary.

Runs on: pytest's main thread, and a thread that commits.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest

from mlproducer import Message, MLProducer, Settings, outbox
from mlproducer.errors import StoreError
from mlproducer.stores.postgres import PostgreSQLStore
from mlproducer.testing import FakeBroker, PostgreSQLServer
from tests.faults.traffic import FIGURES

LIMIT = 60.0


class Pair:
    """A primary with the store's table, and its standby."""

    def __init__(self, primary: PostgreSQLServer, standby: PostgreSQLServer) -> None:
        self.primary, self.standby = primary, standby
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        self.url = f"postgresql://app:{primary.password}@{hosts}/app"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Start both; each COMMIT waits for the standby."""
    with PostgreSQLServer() as primary:
        with closing(PostgreSQLStore(primary.url)) as store:
            store.create()
        with primary.standby() as standby:
            primary.call("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.call("SELECT pg_reload_conf()")
            yield Pair(primary, standby)


def test_a_standby_takes_over(pair: Pair) -> None:
    """It is refused while it is one; then what was committed is delivered from it (143, I35).

    Before that the primary is frozen for a while, and goes on.
    """
    with (
        closing(PostgreSQLStore(pair.standby.url)) as follower,
        pytest.raises(StoreError, match="is read-only: a standby"),
    ):
        follower.depth()
    committed: list[str] = []
    over = threading.Event()
    with FakeBroker() as broker, closing(PostgreSQLStore(pair.url)) as store:
        settings = Settings(url=broker.url, store_url=pair.url, retry_sweep_interval=0.2)
        with MLProducer(settings) as producer:
            producer.start()
            writer = threading.Thread(target=_commit, args=(pair.url, producer, committed, over))
            writer.start()
            _more(committed)
            with pair.primary.frozen():
                _until(lambda: not _answers(store))
            _more(committed)
            pair.primary.kill()
            begun, known = time.monotonic(), len(committed)
            assert not _answers(store)  # the standby is there, and takes no writes
            pair.standby.promote()
            _until(lambda: len(committed) > known)
            away = time.monotonic() - begun
            _more(committed)
            over.set()
            writer.join(LIMIT)
            _until(lambda: store.depth().total == 0)
        found = [each.properties.message_id for each in broker.messages]
    assert set(committed) - set(found) == set()
    FIGURES["outbox: a standby takes over"] = (
        f"{len(committed)} committed, 0 lost, {len(found) - len(set(found))} second copies, "
        f"no COMMIT for {away:.1f} s"
    )


def _more(committed: list[str]) -> None:
    known = len(committed)
    _until(lambda: len(committed) > known + 20)


def _commit(url: str, producer: MLProducer, committed: list[str], over: threading.Event) -> None:
    """Commit one task after another, on whichever server takes writes."""
    names = itertools.count()
    options = "connect_timeout=2&target_session_attrs=read-write&tcp_user_timeout=2000"
    while not over.is_set():
        try:
            with psycopg.connect(f"{url}?{options}") as connection:
                while not over.is_set():
                    name = f"m{next(names)}"
                    message = Message(body=b"", routing_key="k", message_id=name)
                    outbox.add(connection, message, producer=producer)
                    connection.commit()
                    committed.append(name)
        except psycopg.Error:
            over.wait(0.05)


def _answers(store: PostgreSQLStore) -> bool:
    try:
        store.depth()
    except StoreError:
        return False
    return True


def _until(come_about: Callable[[], object]) -> None:
    deadline, never = time.monotonic() + LIMIT, threading.Event()
    while not come_about():
        assert time.monotonic() < deadline
        never.wait(0.02)
