"""From COMMIT on, nothing is lost: applications, relays, PostgreSQL and the broker are killed.

The account is the application's own: a business row is in its table if and only if its transaction
was committed, whatever the process that asked for it lived to hear.

Runs on: pytest's main thread; processes of their own.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.postgres import PostgreSQLStore
from mlproducer.testing import PostgreSQLServer, RabbitMQNode
from mlproducer.testing.audit import drain
from tests.broker.commands import COMMAND, environ_of
from tests.faults.traffic import FIGURES
from tests.long import GIVEN

LIMIT = 120.0
LEASE = 2.0
FASTER = {"ML_STORE_LEASE": f"{LEASE * 1000:.0f}", "ML_RETRY_SWEEP_INTERVAL": "200"}

SCRIPT = Path(__file__).parent / "scripts" / "outbox_app.py"

AWAY = ("postgresql killed", "broker frozen", "postgresql frozen", "broker killed")
CYCLE = [kind for away in AWAY for kind in (away, "relay killed", "application alone")]
"""A third of the rounds each: a server is away, a relay is killed, nothing else happens. In each
round both applications are killed, each at an instant of its own."""

INSTANTS = [
    pytest.param(len(CYCLE), 1, id="cycle"),
    pytest.param(GIVEN.times or 200, GIVEN.seed, id="long", marks=pytest.mark.slow),
]
FRAMEWORKS = ("django", "sqlalchemy")

SLOW_COMMIT = {"fsync": "on", "commit_delay": "2000", "commit_siblings": "0"}
"""Each COMMIT takes 2 ms, so that kills fall into it."""


class Relays:
    """Some relays; the oldest is killed, and another one started."""

    def __init__(self, broker: RabbitMQNode, store: str, stack: ExitStack) -> None:
        self._environ = environ_of(broker.url, {"ML_STORE_URL": store, **FASTER})
        self._stack = stack
        self._relays: list[subprocess.Popen[bytes]] = []
        self.start()

    def kill_one(self) -> None:
        """SIGKILL the oldest."""
        _end(self._relays.pop(0))
        self.start()

    def start(self) -> None:
        """Start one more."""
        relay = subprocess.Popen(
            [*COMMAND, "relay"],
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(_end, relay)
        self._relays.append(relay)


class Application:
    """The program, whose business is killed around its COMMITs.

    :ivar last: of each kill the transaction under way, and how far it was
    """

    def __init__(
        self, framework: str, server: PostgreSQLServer, broker: RabbitMQNode, stack: ExitStack
    ) -> None:
        self._program = subprocess.Popen(
            [sys.executable, str(SCRIPT), framework, server.url, server.url],
            env=environ_of(broker.url, FASTER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, self._program)
        self._name = ""
        self.last: list[tuple[str, str]] = []

    def order(self, order: str) -> None:
        """Have it do business, ``begin``, or be killed around a COMMIT, ``kill``."""
        stdin, _ = _pipes(self._program)
        stdin.write(f"{order}\n")
        stdin.flush()

    def wait_begun(self) -> None:
        """Wait for its first COMMIT."""
        [self._name] = self._answer()

    def wait_killed(self) -> None:
        """Wait until it is killed."""
        number, how_far = self._answer()
        self.last.append((f"{self._name}-{number}", how_far))

    def _answer(self) -> list[str]:
        _, stdout = _pipes(self._program)
        return stdout.readline().split()[1:]


def begin(applications: Sequence[Application], how: str = "") -> None:
    """Have all do business, and wait for the first COMMIT of each."""
    for each in applications:
        each.order(f"begin {how}")
    for each in applications:
        each.wait_begun()


def kill(applications: Sequence[Application]) -> None:
    """Have all killed, each around a COMMIT of its own."""
    for each in applications:
        each.order("kill")
    for each in applications:
        each.wait_killed()


def _pipes(program: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert program.stdin is not None
    assert program.stdout is not None
    return program.stdin, program.stdout


def _end(program: subprocess.Popen[Any]) -> None:
    program.kill()
    program.wait(LIMIT)
    for pipe in (program.stdin, program.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def away(kind: str, server: PostgreSQLServer, broker: RabbitMQNode) -> Iterator[None]:
    """Have PostgreSQL or the broker away, and back afterwards."""
    place: PostgreSQLServer | RabbitMQNode = server if "postgresql" in kind else broker
    if "frozen" in kind:
        place.freeze()
    else:
        if place is broker:
            broker.save_queues()
        place.kill()
    try:
        yield
    finally:
        if "frozen" in kind:
            place.thaw()
        else:
            place.start()


@pytest.mark.parametrize(("instants", "seed"), INSTANTS)
def test_every_committed_row_arrives_and_no_other(instants: int, seed: int) -> None:
    """Two applications are killed around COMMIT, with all others there, away or killed (I35, I36).

    With Django the killed process has a producer of its own, beside the relays; with SQLAlchemy
    the relays alone deliver. Before there are faults, rows go out in the order of each transaction.
    """
    chance = random.Random(seed)
    kinds = [CYCLE[number % len(CYCLE)] for number in range(instants // len(FRAMEWORKS))]
    chance.shuffle(kinds)
    never = threading.Event()
    with ExitStack() as outer:
        server = outer.enter_context(PostgreSQLServer(config=SLOW_COMMIT))
        broker = outer.enter_context(RabbitMQNode())
        stack = outer.enter_context(ExitStack())
        applications = [Application(each, server, broker, stack) for each in FRAMEWORKS]
        with closing(PostgreSQLStore(server.url, lease=LEASE)) as store:
            store.create()
        server.call("CREATE TABLE orders (id text PRIMARY KEY)", user="app")
        relays = Relays(broker, server.url, stack)
        before = _in_order(applications, server, broker)
        relays.start()
        for kind in kinds:
            begin(applications)
            never.wait(chance.uniform(0.0, 0.2))
            if kind in AWAY:
                with away(kind, server, broker):
                    never.wait(chance.uniform(0.0, 0.2))
                    kill(applications)
            else:
                if kind == "relay killed":
                    relays.kill_one()
                kill(applications)
        committed = _committed(server) - before
        _wait_until_empty(server)
        arrived = drain(broker.url, ["ml.embed"])
    assert (committed - arrived.keys(), arrived.keys() - committed) == (set(), set())
    _tell(kinds, applications, committed, arrived)
    assert committed


def _in_order(
    applications: Sequence[Application], server: PostgreSQLServer, broker: RabbitMQNode
) -> set[str]:
    """Have one relay deliver what applications commit that do not, and give what that was."""
    begin(applications, "alone")
    threading.Event().wait(0.3)
    kill(applications)
    committed = _committed(server)
    _wait_until_empty(server)
    arrived = drain(broker.url, ["ml.embed"])
    assert arrived.keys() == committed
    assert arrived.total() == len(arrived)
    transactions: dict[str, list[str]] = {}
    for order in arrived:
        transaction, _, place = order.rpartition("-")
        transactions.setdefault(transaction, []).append(place)
    assert {"".join(each) for each in transactions.values()} == {"0123"}
    return committed


def _tell(
    kinds: Sequence[str],
    applications: Sequence[Application],
    committed: set[str],
    arrived: Counter[str],
) -> None:
    """Write down the figures."""
    again = arrived.total() - len(arrived)
    found = Counter[str]()
    for application in applications:
        for transaction, how_far in application.last[1:]:
            done = f"{transaction}-0" in committed
            found[f"{how_far}, {'committed' if done else 'not committed'}"] += 1
    FIGURES[f"outbox: killed at {len(kinds) * len(applications)} instants"] = (
        f"{len(committed)} rows committed, 0 lost, 0 of others, {again} second copies with the "
        f"same id; the transaction under way was: {dict(found)}; rounds: {dict(Counter(kinds))}"
    )


def _committed(server: PostgreSQLServer) -> set[str]:
    """Give the business rows; what a killed process asked for last may still be under way."""
    server.call(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE usename = 'app' AND application_name = ''"  # relays have a name
    )
    return {row[0] for row in server.call("SELECT id FROM orders", user="app")}


def _wait_until_empty(server: PostgreSQLServer) -> None:
    deadline = time.monotonic() + LIMIT
    with closing(PostgreSQLStore(server.url, lease=LEASE)) as store:
        while True:
            try:
                if store.depth().total == 0:
                    return
            except StoreError:
                pass
            assert time.monotonic() < deadline, server.call("SELECT * FROM mlproducer_messages")
            time.sleep(random.uniform(0.1, 0.2))
