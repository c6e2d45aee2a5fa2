"""The Python in the pages about the outbox runs.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy
from sqlalchemy.orm import Session

import mlproducer
from mlproducer import MLProducer, Settings, outbox, stores
from mlproducer.testing import FakeBroker, PostgreSQLServer
from tests.pages import ROOT, run, snippets

LIMIT = 30.0

PAGE = Path(stores.__file__).with_name("README.rst")
README = ROOT / "README.rst"


def test_snippets_run(postgresql_server: PostgreSQLServer) -> None:
    """In the order of the page, in one module."""
    table = f"test_{secrets.token_hex(4)}"
    url = postgresql_server.url
    postgresql_server.call(outbox.schema(table), user="app")
    postgresql_server.call("CREATE TABLE IF NOT EXISTS orders (n int)", user="app")
    engine = sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    module: dict[str, Any] = {"psycopg": psycopg, "DATABASE": url, "engine": engine}
    module |= {"Session": Session, "text": sqlalchemy.text}
    [shown] = [each for each in snippets(PAGE.read_text()) if "outbox.add" in each]
    [first] = [each for each in snippets(README.read_text()) if "outbox.add" in each]
    with FakeBroker() as broker:
        settings = Settings(url=broker.url, store_url=f"{url}?table={table}")
        with MLProducer(settings) as producer:
            producer.start()
            run(shown, PAGE, module)
            assert len(broker.wait_for_messages(2, LIMIT)) == 2
            postgresql_server.call("DELETE FROM orders", user="app")
            run(first, README, module | {"mlproducer": mlproducer})
            assert len(broker.wait_for_messages(3, LIMIT)) == 3
    engine.dispose()


def test_grants_are_enough(postgresql_server: PostgreSQLServer) -> None:
    """What the page grants names the tables that there are."""
    server = postgresql_server
    server.call(outbox.schema(), user="app")
    role = f"role_{secrets.token_hex(4)}"
    server.call(f"CREATE ROLE {role} LOGIN PASSWORD '{server.password}'")
    grants = re.findall(r"GRANT [^;]*;", PAGE.read_text())
    assert len(grants) == 2
    for grant in grants:
        server.call(grant.replace("TO role", f"TO {role}"), user="app")
    from mlproducer.stores.postgres import PostgreSQLStore

    store = PostgreSQLStore(server.url_for(role))
    store.create()
    assert store.depth().total >= 0
    store.close()
