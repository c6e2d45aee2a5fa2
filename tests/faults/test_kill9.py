"""Publishers with a durable store, killed with -9 at any instant: what they took over arrives.

The check is that of a total queue, over all processes: what a call had taken over is found, what it
had refused is not, and copies are no more than what was in the store when its process was killed.

Runs on: pytest's main thread; the publishers are processes of their own.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from attrs import define, field

from mlproducer import Settings
from mlproducer.stores import open_store
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.postgresql_server import PostgreSQLServer
from mlproducer.testing.redis_server import RedisServer
from mlproducer.topology import ROUTING_KEYS
from tests.broker.conftest import Connect
from tests.faults.traffic import FIGURES, LIMIT
from tests.long import GIVEN

pytestmark = pytest.mark.broker

LEASE = 2.0
"""Seconds; in SQLite a killed process is noticed, and its lease, which would be too long, is not
waited for."""

LETTERS = "ml.dead_letter"
FAULTS = ("none", "none", "none", "none", "freeze", "kill")
LONG = GIVEN.times or 200
INSTANTS = [
    pytest.param("sqlite", 6, 1, id="sqlite-6"),
    pytest.param("sqlite", LONG, GIVEN.seed, id="sqlite-long", marks=pytest.mark.slow),
    pytest.param("redis", 5, 3, id="redis-5"),
    pytest.param("redis", LONG, GIVEN.seed, id="redis-long", marks=pytest.mark.slow),
    pytest.param("postgresql", 5, 5, id="postgresql-5"),
    pytest.param("postgresql", LONG, GIVEN.seed, id="postgresql-long", marks=pytest.mark.slow),
]


@define
class Scene:
    """A store, the journal of those who use it, and the broker's virtual host.

    :ivar server: the store's URL in Redis or PostgreSQL; SQLite without
    :ivar rows: how many rows each process left in the store when it was killed, together
    """

    url: str = field(repr=False)
    folder: Path
    write_ahead: bool = True
    server: str | None = None
    rows: int = 0
    _names: Iterator[int] = field(factory=lambda: iter(range(1_000_000)))

    @property
    def store_url(self) -> str:
        """The store as settings name it."""
        if self.server is not None:
            return f"{self.server}&write_ahead={self.write_ahead:d}"
        return f"sqlite:///{self.folder / 'store.db'}?write_ahead={self.write_ahead:d}"

    @property
    def lease(self) -> float:
        """Seconds for which a process may be silent."""
        return 10 * LIMIT if self.server is None else LEASE

    @contextmanager
    def publisher(self, role: str, url: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Run a publisher, which is killed with the block; then see what it left, unharmed."""
        environ = {
            **os.environ,
            "RABBITMQ_URL": url or self.url,
            "ML_STORE_URL": self.store_url,
            "ML_STORE_LEASE": f"{self.lease * 1000:.0f}",
            "ML_RETRY_SWEEP_INTERVAL": "100",
            "ML_CIRCUIT_BREAKER_THRESHOLD": "1000000",
        }
        script = [sys.executable, "-m", "tests.faults.scripts.kill9", role]
        name = f"p{next(self._names)}"
        with subprocess.Popen(
            [*script, str(self.folder / "journal"), name], env=environ
        ) as running:
            try:
                yield running
            finally:
                running.kill()
        assert running.returncode == -signal.SIGKILL
        self.rows += self.left()

    def left(self) -> int:
        """Count the rows in the store; a file has to be whole."""
        if self.server is not None:
            with closing(open_store(Settings(store_url=self.store_url))) as store:
                return store.depth().total
        with closing(sqlite3.connect(self.folder / "store.db")) as connection:
            assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            count: int = connection.execute("SELECT count(*) FROM messages").fetchone()[0]
            return count

    def journal(self) -> dict[str, set[str]]:
        """Return ids by what was said of them."""
        said = defaultdict(set)
        path = self.folder / "journal"
        for line in path.read_text().splitlines() if path.exists() else ():
            word, _, message_id = line.partition(" ")
            said[word].add(message_id)
        return said

    def wait_for(self, word: str, more_than: int = 0) -> None:
        """Wait until something was said of so many."""
        deadline = time.monotonic() + LIMIT
        while len(self.journal()[word]) <= more_than:
            assert time.monotonic() < deadline, f"no more than {more_than} {word}"
            threading.Event().wait(0.02)

    def balance(self, connect: Connect) -> Counter[str]:
        """Let a last producer deliver all that is left, and check what has arrived."""
        last = connect(store_url=self.store_url, store_lease=self.lease)
        last.start()
        assert last.flush(LIMIT) == 0
        assert last.close().stored == self.left() == 0  # now the deletions are carried out
        said, found = self.journal(), drain(self.url, [*ROUTING_KEYS, LETTERS])
        lost, leaked = said["taken"] - found.keys(), said["refused"] & found.keys()
        assert (lost, leaked, found.keys() - said["begun"]) == (set(), set(), set())
        assert found.total() - len(found) <= self.rows
        return found


@pytest.fixture
def scene(rabbitmq_vhost: VirtualHost, tmp_path: Path, connect: Connect) -> Scene:
    """Return a scene whose queues are there."""
    assert connect().wait_connected(LIMIT)
    rabbitmq_vhost.node.save_queues()
    return Scene(rabbitmq_vhost.url, tmp_path)


@contextmanager
def fault(kind: str, node: RabbitMQNode) -> Iterator[None]:
    """Have the broker away, and back afterwards."""
    if kind == "freeze":
        node.freeze()
    elif kind == "kill":
        node.kill()
    try:
        yield
    finally:
        if kind == "freeze":
            node.thaw()
        elif kind == "kill":
            node.start()


@pytest.mark.parametrize(("kind_of_store", "instants", "seed"), INSTANTS)
def test_killed_at_any_instant(
    scene: Scene,
    mortal_node: RabbitMQNode,
    connect: Connect,
    request: pytest.FixtureRequest,
    kind_of_store: str,
    instants: int,
    seed: int,
) -> None:
    """No message is lost whose call had returned, with the broker there, frozen or killed (97)."""
    if kind_of_store == "redis":
        redis: RedisServer = request.getfixturevalue("redis_server")
        scene.server = f"{redis.url}?prefix=kill9-{secrets.token_hex(4)}:"
    elif kind_of_store == "postgresql":
        postgresql: PostgreSQLServer = request.getfixturevalue("postgresql_server")
        scene.server = f"{postgresql.url}?table=kill9_{secrets.token_hex(4)}"
    chance = random.Random(seed)
    never = threading.Event()
    kinds = [FAULTS[number % len(FAULTS)] for number in range(instants)]
    chance.shuffle(kinds)
    for kind in kinds:
        before = len(scene.journal()["taken"])
        with scene.publisher("storm") as running:
            scene.wait_for("taken", before)
            never.wait(chance.uniform(0.0, 0.5))
            with fault(kind, mortal_node):
                never.wait(chance.uniform(0.0, 0.3) if kind != "none" else 0.0)
                running.kill()
    found = scene.balance(connect)
    said = scene.journal()
    FIGURES[f"{kind_of_store}: killed at {instants} instants"] = (
        f"{len(said['taken'])} taken over, 0 lost, {found.total() - len(found)} duplicates, "
        f"{scene.rows} rows in flight at the kills, "
        f"{len(said['begun'] - said['taken'] - said['refused'])} unanswered"
    )
    assert len(said["taken"]) >= instants


def test_killed_between_ack_and_deletion(
    scene: Scene, rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """A message that was confirmed, and is still in the store, comes again, with its id (97)."""
    with scene.publisher("ack") as running:
        assert running.wait(LIMIT) == -signal.SIGKILL
    assert scene.rows == 1
    assert scene.balance(connect) == {"p0-0": 2}


def test_killed_in_an_outage(
    scene: Scene, rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy
) -> None:
    """Without write-ahead, what was deferred is delivered after its process was killed (97)."""
    scene.write_ahead = False
    proxy.refuse()
    with scene.publisher("outage", proxy.url(rabbitmq_vhost.url)):
        scene.wait_for("over")
    found = scene.balance(connect)
    assert len(found) == len(scene.journal()["taken"]) == 50
    assert found.total() == 50
