"""From COMMIT on, nothing is lost: applications, relays, PostgreSQL and the broker are killed.

Runs on: pytest's main thread; processes of their own.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.postgres import PostgreSQLStore
from mlproducer.testing import PostgreSQLServer, RabbitMQNode
from mlproducer.testing.audit import drain
from tests.broker.commands import COMMAND, environ_of
from tests.faults.traffic import FIGURES

INSTANTS = 45
LIMIT = 120.0
LEASE = 2.0

SCRIPT = Path(__file__).parent / "scripts" / "outbox_app.py"


class Relays:
    """Two relays; the older one is killed, and another one started."""

    def __init__(self, broker: RabbitMQNode, store: str, stack: ExitStack) -> None:
        more = {"ML_STORE_URL": store, "ML_STORE_LEASE": f"{LEASE * 1000:.0f}"}
        more["ML_RETRY_SWEEP_INTERVAL"] = "200"
        self._environ = environ_of(broker.url, more)
        self._stack = stack
        self._relays = [self._start(), self._start()]

    def kill_one(self) -> None:
        """SIGKILL the older one."""
        _end(self._relays.pop(0))
        self._relays.append(self._start())

    def _start(self) -> subprocess.Popen[bytes]:
        relay = subprocess.Popen(
            [*COMMAND, "relay"],
            env=self._environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(_end, relay)
        return relay


def _end(program: subprocess.Popen[Any]) -> None:
    program.kill()
    program.wait(LIMIT)


@pytest.mark.slow
def test_every_committed_row_arrives_and_no_other() -> None:
    """A third of the instants each: a relay is killed, PostgreSQL is, the broker is."""
    faults = Counter[str]()
    with ExitStack() as stack:
        server = stack.enter_context(PostgreSQLServer())
        broker = stack.enter_context(RabbitMQNode())
        with closing(PostgreSQLStore(server.url, lease=LEASE)) as store:
            store.create()
        server.call("CREATE TABLE orders (id text PRIMARY KEY)", user="app")
        relays = Relays(broker, server.url, stack)
        database = server.url.replace("postgresql://", "postgresql+psycopg://")
        application = subprocess.Popen(
            [sys.executable, str(SCRIPT), database, server.url, str(INSTANTS)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert application.stdout is not None
        stack.enter_context(application.stdout)
        stack.callback(_end, application)
        for line in application.stdout:
            fault = ("relay", "postgresql", "broker")[int(line) % 3]
            faults[fault] += 1
            if fault == "relay":
                relays.kill_one()
            elif fault == "postgresql":
                server.kill()
                server.start()
            else:
                broker.save_queues()
                broker.kill()
                broker.start()
        assert application.wait(LIMIT) == 0
        committed = {row[0] for row in server.call("SELECT id FROM orders", user="app")}
        _wait_until_empty(server)
        arrived = drain(broker.url, ["ml.embed"])
    assert sum(faults.values()) == INSTANTS
    assert set(arrived) == committed
    assert len(committed) > INSTANTS
    again = sum(arrived.values()) - len(arrived)
    FIGURES["outbox, killed at random instants"] = (
        f"{len(committed)} rows committed and delivered, {again} more than once; {dict(faults)}"
    )


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
