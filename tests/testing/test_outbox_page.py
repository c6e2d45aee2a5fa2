"""The Python in the pages about the outbox runs.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.orm import Session

import mlproducer
from mlproducer import CeleryTask, MLProducer, Settings, SummarizationTask, outbox, stores
from mlproducer.testing import FakeBroker, PostgreSQLServer
from tests.pages import ROOT, run, snippets

LIMIT = 120.0

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
    shown, _ = [each for each in snippets(PAGE.read_text()) if "outbox.add" in each]
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


def test_flask_sqlalchemy(postgresql_server: PostgreSQLServer) -> None:
    """A request's rows and tasks are committed together, or neither is there."""
    flask = pytest.importorskip("flask")
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    from mlproducer.contrib.flask import MLProducerExtension

    table = f"test_{secrets.token_hex(4)}"
    store_url = f"{postgresql_server.url}?table={table}"
    postgresql_server.call(outbox.schema(table), user="app")
    database = postgresql_server.url.replace("postgresql://", "postgresql+psycopg://")
    app, db, ml = flask.Flask(__name__), flask_sqlalchemy.SQLAlchemy(), MLProducerExtension()
    app.config["SQLALCHEMY_DATABASE_URI"] = database
    app.config["MLPRODUCER_STORE_URL"] = store_url
    app.config["MLPRODUCER_PRODUCER"] = "mlproducer.MLProducer"
    with FakeBroker() as broker, MLProducer(Settings(url=broker.url, store_url=store_url)) as relay:
        app.config["MLPRODUCER_URL"] = broker.url
        db.init_app(app)
        ml.init_app(app)
        _, shown = [each for each in snippets(PAGE.read_text()) if "outbox.add" in each]
        module = {"app": app, "db": db, "ml": ml, "request": flask.request}
        names = {"outbox": outbox, "SummarizationTask": SummarizationTask}
        run(shown, PAGE, module | names)

        @app.post("/mistakes")
        def make_a_mistake() -> Any:
            outbox.add(db.session, CeleryTask("t", routing_key="k"), producer=ml.producer)
            return {}

        relay.start()
        with app.app_context():
            db.create_all()
        client = app.test_client()
        assert client.post("/mistakes").status_code == 200  # it has forgotten to commit
        assert client.post("/shares", data={"text": "some"}).status_code == 202
        [found] = broker.wait_for_messages(1, LIMIT)
        assert b"some" in found.body
        counted = f"SELECT count(*) FROM {table} WHERE task_type <> 'summarization'"
        assert postgresql_server.call(counted) == [(0,)]
        with app.app_context():
            db.drop_all()
            db.engine.dispose()
            ml.producer.close()


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
