"""``mlproducer relay``: deliver what waits in the store, and do nothing else.

Several relays share the work: each claims rows of its own. At SIGTERM or Ctrl-C one takes no more
rows, waits for the confirms of what is under way, gives back what it could not deliver, and ends.

Runs on: the main thread; all work is done by a producer's threads.
"""

from __future__ import annotations

import argparse
import logging
import threading
from contextlib import ExitStack, closing

from mlproducer import CloseReport, MLProducer, Settings
from mlproducer._store_url import NAME, read_postgresql
from mlproducer.cli.output import Console, UsageError
from mlproducer.errors import StoreError
from mlproducer.outbox import Mover, schema
from mlproducer.stores import open_store
from mlproducer.wsgi import serve

HELP = "deliver what waits in the store, until it is terminated"
DESCRIPTION = (
    "Deliver the messages that wait in the store of ML_STORE_URL, those of outboxes above all, to "
    "the broker in RABBITMQ_URL. Several relays share the work. SIGTERM and Ctrl-C end it once "
    "what is under way is confirmed or given back; then the exit code is 0."
)
LOG_LEVEL = logging.WARNING

DRAIN = 10.0
"""Seconds for what is under way at the end."""

IDLE = 1.0
"""Seconds after which the order to end is looked for: Python drops what a signal handler raises
where it interrupts a finaliser."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add where to serve health and metrics, and what to do about the table."""
    parser.add_argument(
        "--port", type=int, help="serve /health and /metrics over HTTP on this port"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="serve them at this address; 0.0.0.0: at all"
    )
    parser.add_argument(
        "--outbox",
        metavar="FILE",
        help="for development: also take the rows of outbox.add() from the application's SQLite "
        "file into the store",
    )
    table = parser.add_mutually_exclusive_group()
    table.add_argument(
        "--create-table",
        action="store_true",
        help="make the table of a postgresql:// store unless it is there, and end",
    )
    table.add_argument(
        "--print-sql", action="store_true", help="print the SQL that makes the table, and end"
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Make the table, print how it is made, or relay until terminated.

    :raises UsageError: the store is none that others can leave messages in
    :raises ConfigurationError: no broker is named, or a setting does not parse
    :raises StoreError: the table cannot be made
    """
    settings: Settings = arguments.settings()
    if arguments.print_sql or arguments.create_table:
        return _table(settings, console, create=arguments.create_table)
    if settings.store_url.startswith("memory:"):
        raise UsageError(
            f"{NAME} is memory://, in which no other process can leave anything: name the store "
            "that is to be emptied, such as postgresql://user:password@host/database"
        )
    with console.deferring_sigterm():
        report = _relay(settings, arguments, console)
        if console.terminated:
            console.terminated = False  # that was the order to end, and it has been obeyed
    confirmed, waiting = report.confirmed, _waiting(settings)
    if isinstance(waiting, StoreError):
        console.say(f"ended: {confirmed} confirmed at the end; what waits is not known: {waiting}")
        console.emit({"ok": False, "confirmed": confirmed, "stored": None, "error": str(waiting)})
        return False
    console.say(f"ended: {confirmed} confirmed at the end, {waiting} wait")
    console.emit({"ok": True, "confirmed": confirmed, "stored": waiting})
    return True


def _waiting(settings: Settings) -> int | StoreError:
    """Return how many rows wait; where the store cannot be asked, the error."""
    try:
        with closing(open_store(settings)) as store:
            return store.depth().stored
    except StoreError as error:
        return error


def _table(settings: Settings, console: Console, *, create: bool) -> bool:
    if not settings.store_url.startswith("postgresql:"):
        raise UsageError(f"{NAME} must be postgresql://...: other stores make their own files")
    address = read_postgresql(settings.store_url)
    text = schema(address.table)
    if create:
        from mlproducer.stores.postgres import PostgreSQLStore  # noqa: PLC0415 - an extra

        store = PostgreSQLStore(settings.store_url)
        try:
            store.create()
        finally:
            store.close()
        console.say(f"{address.name} has the table {address.table}")
        console.emit({"ok": True, "store": address.name, "table": address.table})
    else:
        console.detail(text.rstrip())
        console.emit({"sql": text})
    return True


def _relay(settings: Settings, arguments: argparse.Namespace, console: Console) -> CloseReport:
    producer = MLProducer(settings)
    with ExitStack() as stack:
        try:
            if arguments.port is not None:
                server = serve(producer, arguments.port, arguments.host)
                stack.callback(server.close)
                console.say(f"health and metrics: http://{arguments.host}:{server.port}/")
            producer.start()
            console.say("relaying; SIGTERM or Ctrl-C ends it")
            mover = None
            if arguments.outbox is not None:
                store = open_store(settings)
                stack.callback(store.close)
                mover = Mover(arguments.outbox, store)
            _wait(mover, settings.retry_sweep_interval, console)
        except KeyboardInterrupt:
            pass
        finally:
            producer.rest()
            report = producer.close(DRAIN)
    return report


def _wait(mover: Mover | None, interval: float, console: Console) -> None:
    """Wait for the order to end, and move rows meanwhile where there is an outbox of SQLite's."""
    told = ""
    while not console.terminated:
        problem, moved = "", 0
        if mover is not None:
            try:
                moved = mover.move()
            except StoreError as error:
                problem = str(error)
                if problem != told:
                    console.error(problem)
        told = problem
        with console.interruptible():
            if not moved:
                threading.Event().wait(IDLE if mover is None else interval)
