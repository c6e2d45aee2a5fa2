"""An application with an outbox, which is killed again and again while it commits.

``outbox_app.py django|sqlalchemy DATABASE STORE``. A line ``begin`` on stdin starts a process that
does business until it is killed, and ``begin alone`` one that knows no broker; ``running`` is
printed once it has committed something. ``kill`` kills it with SIGKILL around a COMMIT, and prints
``killed``, the number of its last transaction, and how far that one was: ``begun``, ``asked`` for
its COMMIT, or ``over``.

Each transaction inserts rows of the business, each with its task; a savepoint with one more is
rolled back, and so is every fourth transaction.

Runs on: the main thread; each business has a process of its own, which is forked.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable

from mlproducer import CeleryTask, MLProducer, Settings, outbox

ROWS = 4
AFTER = 0.006
"""Seconds after the beginning of a transaction, or of its COMMIT, within which the process is
killed."""

PATIENCE = 0.3
"""Seconds to wait for either; there is none while PostgreSQL is away."""

LIMIT = 120.0

FIRST = ("django.db.backends.postgresql.base", "prometheus_client", "mlproducer._engine.runtime")
"""Modules of each business, imported once, so that one begins in a fraction of a second."""

BEGUN, ASKED, OVER = b"b", b"a", b"o"
WORDS = {BEGUN: "begun", ASKED: "asked", OVER: "over"}

Tell = Callable[[bytes], object]
Business = Callable[[str, Tell], None]


def task(order: str) -> CeleryTask:
    """Make the task of a row, which has the row's id."""
    return CeleryTask("t", routing_key="ml.embed", task_id=order)


class Undone(Exception):  # noqa: N818 - ends a block that is to be rolled back
    """Not an error: what was done is to be rolled back."""


def through_sqlalchemy(database: str, store: str) -> Business:
    """Give a business that leaves all delivering to others."""
    import sqlalchemy
    from sqlalchemy.orm import Session

    insert = sqlalchemy.text("INSERT INTO orders VALUES (:id)")
    url = database.replace("postgresql://", "postgresql+psycopg://")
    sqlalchemy.create_engine(url)  # imports what each business needs

    def run(name: str, tell: Tell) -> None:
        engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": 2})
        settings = Settings(url="amqp://u:p@127.0.0.1:1/", store_url=store)
        producer = MLProducer(settings)

        def order(session: Session, row: str) -> None:
            session.execute(insert, {"id": row})
            outbox.add(session, task(row), producer=producer)

        for number in itertools.count():
            try:
                with Session(engine) as session:
                    tell(BEGUN)
                    for place in range(ROWS):
                        order(session, f"{name}-{number}-{place}")
                    with session.begin_nested() as savepoint:
                        order(session, f"{name}-{number}-savepoint")
                        savepoint.rollback()
                    if number % 4 == 3:
                        session.rollback()
                    else:
                        tell(ASKED)
                        session.commit()
                    tell(OVER)
            except sqlalchemy.exc.DBAPIError:
                time.sleep(0.01)  # PostgreSQL is away

    return run


def through_django(database: str, store: str) -> Business:
    """Give a business whose process has a producer, if the environment names a broker."""
    import django
    from django.conf import settings
    from django.db import DatabaseError, InterfaceError, connection, transaction

    from mlproducer._store_url import read_postgresql

    address = read_postgresql(database)
    [(host, port)] = address.nodes
    settings.configure(
        INSTALLED_APPS=["mlproducer.contrib.django"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": host,
                "PORT": port,
                "NAME": address.options["dbname"],
                "USER": address.options["user"],
                "PASSWORD": address.options["password"],
                "OPTIONS": {"connect_timeout": 2},
            }
        },
        MLPRODUCER={"STORE_URL": store},
    )
    django.setup()

    from django.db import models

    from mlproducer.contrib.django import publish_in_transaction

    class Order(models.Model):  # type: ignore[misc]
        id = models.TextField(primary_key=True)

        class Meta:
            app_label = "mlproducer"
            db_table = "orders"

    def order(row: str) -> None:
        Order.objects.create(id=row)
        publish_in_transaction(task(row))

    def transact(transaction_id: str) -> None:
        for place in range(ROWS):
            order(f"{transaction_id}-{place}")
        try:
            with transaction.atomic():
                order(f"{transaction_id}-savepoint")
                raise Undone
        except Undone:
            pass

    def run(name: str, tell: Tell) -> None:
        for number in itertools.count():
            try:
                with transaction.atomic():
                    tell(BEGUN)
                    transact(f"{name}-{number}")
                    if number % 4 == 3:
                        raise Undone
                    tell(ASKED)
            except Undone:
                pass
            except (DatabaseError, InterfaceError):
                connection.close()
                time.sleep(0.01)  # PostgreSQL is away
                continue
            tell(OVER)

    return run


class Child:
    """A process that does business."""

    def __init__(self, name: str, business: Business, *, alone: bool) -> None:
        self._told = b""
        self._pipe, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                if alone:
                    os.environ.pop("RABBITMQ_URL", None)
                business(name, lambda word: os.write(writer, word))
            finally:
                os._exit(1)
        os.close(writer)

    def wait_for(self, word: bytes, limit: float) -> None:
        """Wait until it tells that from now on, or the time is over."""
        end, known = time.monotonic() + limit, len(self._told)
        while word not in self._told[known:]:
            if not self._listen(max(0.0, end - time.monotonic())):
                return

    def kill(self) -> str:
        """Kill it around a COMMIT, and give the number of its transaction, and how far it was."""
        while self._listen(0.0):
            pass
        self.wait_for(random.choice((BEGUN, ASKED, ASKED)), PATIENCE)
        time.sleep(random.uniform(0.0, AFTER))
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        while self._listen(0.0):
            pass
        os.close(self._pipe)
        return f"{self._told.count(BEGUN) - 1} {WORDS[self._told[-1:]]}"

    def _listen(self, limit: float) -> bool:
        if not select.select([self._pipe], [], [], limit)[0]:
            return False
        told = os.read(self._pipe, 65536)
        self._told += told
        return bool(told)


def main() -> None:
    """Do what is said on stdin."""
    framework, database, store = sys.argv[1:]
    for module in FIRST:
        importlib.import_module(module)
    made = {"django": through_django, "sqlalchemy": through_sqlalchemy}[framework]
    business = made(database, store)
    names = itertools.count()
    child: Child | None = None
    try:
        for line in sys.stdin:
            order, _, how = line.strip().partition(" ")
            if order == "begin":
                name = f"{framework}-{next(names)}"
                child = Child(name, business, alone=how == "alone")
                child.wait_for(OVER, LIMIT)
                print("running", name, flush=True)
            elif child is not None:
                print("killed", child.kill(), flush=True)
                child = None
    finally:
        if child is not None:
            child.kill()


if __name__ == "__main__":
    main()
