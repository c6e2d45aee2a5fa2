"""``mlproducer check``: the whole way of a message, step by step, with advice where one fails.

Probes (see `mlproducer.cli.connectivity`) that the broker must read, route, return and confirm
reach no worker. Whether a routing key leads to a queue is known where this command, or the library,
has just bound it. Where others declare, AMQP has no question for it but a message: a Celery task
that expired long ago, which workers discard unseen, and which is taken back where there is no
worker. Whether dead letters may be sent is asked with a message that the broker refuses as invalid,
after it has looked at the permission and the exchange, so that none comes about.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from mlproducer import MLProducer, Settings, Topology
from mlproducer._core.interfaces import Loss
from mlproducer._engine.endpoints import Endpoints
from mlproducer._engine.session import Session
from mlproducer.cli import connectivity
from mlproducer.cli.output import Console
from mlproducer.errors import (
    BrokerRejectedError,
    NotConnectedError,
    PublishError,
    StoreError,
)
from mlproducer.settings import topology_of
from mlproducer.stores import anchored, open_store
from mlproducer.stores.protocol import Entry, Record
from mlproducer.topology import Declaration

HELP = "check the whole way of a message, step by step"
DESCRIPTION = (
    "Check the broker in RABBITMQ_URL and the store in ML_STORE_URL: connect, declare, publish, "
    "confirm, that each routing key leads to a queue, that dead letters may be sent, that the "
    "store can be written to. Nothing is left behind that a worker would run."
)
LOG_LEVEL = logging.CRITICAL  # the steps print what the library would log

STEPS = ("connect", "declare", "publish", "confirm", "routes", "dead letters", "store")
MARGIN = 1.0
"""Seconds beyond the connection timeout within which the library must have reported an outcome."""

NO_PERMISSION, NOT_FOUND, PRECONDITION_FAILED = 403, 404, 406


@frozen
class Step:
    """The result of one step.

    :ivar ok: ``None`` if the step was skipped
    :ivar seconds: how long it took, with the step that it shares its time with
    """

    name: str
    ok: bool | None
    seconds: float | None = None
    detail: str = ""
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        seconds = None if self.seconds is None else round(self.seconds, 6)
        return {
            "step": self.name,
            "ok": self.ok,
            "seconds": seconds,
            "detail": self.detail,
            "advice": self.advice,
        }


def configure(_parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Run all steps, print them, and return whether none failed.

    :raises ConfigurationError: no broker is named, or a setting does not parse
    """
    settings: Settings = arguments.settings()
    # One attempt, so that gave_up comes soon; the store has a step of its own.
    producer = MLProducer(evolve(settings, max_reconnect_attempts=1, store_url="memory://"))
    try:
        steps = []
        for step in (*_broker_steps(producer), _store(settings, producer)):
            _show(step, console)
            steps.append(step)
        broker = producer.status().broker
    finally:
        producer.close(0.0)
    well = all(step.ok is not False for step in steps)
    console.say(f"{broker}: {'all is well' if well else 'something is wrong'}")
    console.emit({"ok": well, "broker": broker, "steps": [step.to_json() for step in steps]})
    return well


def _show(step: Step, console: Console) -> None:
    word = {True: "ok", False: "failed", None: "skipped"}[step.ok]
    taken = "" if step.seconds is None else f"{step.seconds:.3f} s"
    console.say(f"  {step.name:<12}  {word:<7}  {taken:>8}  {step.detail}".rstrip())
    if step.advice:
        console.say(f"                -> {step.advice}")


def _broker_steps(producer: MLProducer) -> Iterator[Step]:
    connect = _connect(producer)
    yield connect
    if not connect.ok:
        yield from (Step(name, None) for name in STEPS[1:-1])
        return
    left = list(STEPS[1:-1])
    try:
        for step in _session_steps(producer):
            left.remove(step.name)
            yield step
    except NotConnectedError as error:
        yield Step(left.pop(0), False, None, str(error), connectivity.advise(error))
        yield from (Step(name, None) for name in left)


def _session_steps(producer: MLProducer) -> Iterator[Step]:
    settings = producer.settings
    topology = topology_of(settings)
    with Session(Endpoints(settings).known, settings.connection_timeout) as session:
        declared = _declare(session, topology, settings)
        yield declared
        yield from _publish(producer)
        yield _routes(session, topology, settings, declared)
        yield _dead_letters(session, topology)


def _connect(producer: MLProducer) -> Step:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    producer.on("connected", events.put)
    producer.on("gave_up", events.put)
    settings = producer.settings
    started = time.monotonic()
    producer.start()
    try:
        event = events.get(timeout=settings.connection_timeout * len(settings.brokers) + MARGIN)
    except queue.Empty:
        event = None
    seconds = time.monotonic() - started
    if event is not None and event.name == "connected":
        return Step("connect", True, seconds)
    # Only an error tells wrong credentials from the rest; unconnected, it comes at once.
    error = connectivity.probe(producer, MARGIN) or NotConnectedError(
        "the connection does not last"
    )
    return Step("connect", False, seconds, str(error), connectivity.advise(error))


# --- declare and publish -----------------------------------------------------------------------


def _declare(session: Session, topology: Topology, settings: Settings) -> Step:
    if settings.declare_topology == "off":
        return Step("declare", None, None, "ML_DECLARE_TOPOLOGY is off")
    started = time.monotonic()
    faults: list[tuple[Declaration, Loss]] = []
    for each in topology.declarations(settings.declare_topology):
        loss = session.refusal(each.method, **each.arguments)
        if loss is not None:
            faults.append((each, loss))
            if loss.reply_code == NO_PERMISSION:
                break  # the rest would be refused likewise
    seconds = time.monotonic() - started
    if faults:
        detail = "; ".join(f"{each.target}: {loss.reply_code} {loss.text}" for each, loss in faults)
        advice = connectivity.advise_code(faults[0][1].reply_code)
        if faults[0][1].reply_code == NO_PERMISSION:
            advice += "; if others declare the topology, set ML_DECLARE_TOPOLOGY=passive"
        return Step("declare", False, seconds, detail, advice)
    done = "are there" if settings.declare_topology == "passive" else "are declared"
    return Step("declare", True, seconds, f"exchange {topology.exchange} and the queues {done}")


def _publish(producer: MLProducer) -> Iterator[Step]:
    started = time.monotonic()
    timeout = producer.settings.publish_timeout
    # With an alarm a broker takes a connection's first message, and blocks it from then on.
    error = connectivity.probe(producer, timeout) or connectivity.probe(producer, timeout)
    seconds = time.monotonic() - started
    blocked = producer.status().blocked
    if error is None:
        yield Step("publish", True, seconds, "written, routed to nowhere, returned")
        yield Step("confirm", True, seconds, "acknowledged by the broker")
        return
    detail = "the broker blocks publishers" if blocked else _text(error)
    advice = connectivity.advise(error, blocked=blocked)
    if error.possibly_sent and not blocked:
        yield Step("publish", True, seconds, "written")
        yield Step("confirm", False, seconds, detail, advice)
    else:
        yield Step("publish", False, seconds, detail, advice)
        yield Step("confirm", None)


def _text(error: PublishError) -> str:
    if isinstance(error, BrokerRejectedError):
        return f"{error.reply_code} {error}"
    return str(error)


# --- routes ------------------------------------------------------------------------------------


def _routes(session: Session, topology: Topology, settings: Settings, declared: Step) -> Step:
    """Return whether each routing key leads to a queue."""
    keys = [key for each in topology.queues for key in each.routing_keys]
    if settings.declare_topology == "active" and declared.ok:
        return Step("routes", True, None, f"{len(keys)} routing keys are bound")
    started = time.monotonic()
    task_id = str(uuid.uuid4())
    missing = []
    for key in keys:
        outcome = session.publish(topology.exchange, key, **_expired_task(task_id))
        if outcome.reply_code in (NO_PERMISSION, NOT_FOUND):
            seconds = time.monotonic() - started
            detail = f"{topology.exchange}: {outcome.reply_code} {outcome.text}"
            advice = connectivity.advise_code(outcome.reply_code)
            return Step("routes", False, seconds, detail, advice)
        if outcome.returned:
            missing.append(key)
    left = sum(_take_back(session, each.name, task_id) for each in topology.queues)
    seconds = time.monotonic() - started
    if missing:
        detail = f"no queue is bound for {', '.join(missing)}"
        advice = "bind one, or let ML_DECLARE_TOPOLOGY=active do so: mlproducer topology --apply"
        return Step("routes", False, seconds, detail, advice)
    detail = f"{len(keys)} routing keys lead to a queue"
    if left:
        detail += f"; {left} have a probe in them, which workers discard"
    return Step("routes", True, seconds, detail)


def _expired_task(task_id: str) -> dict[str, Any]:
    """Return a task of Celery's own that expired long ago: a worker discards it."""
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return {
        "body": json.dumps([[], {}, embed]).encode(),
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": {
            "lang": "py",
            "task": "celery.backend_cleanup",
            "id": task_id,
            "root_id": task_id,
            "expires": datetime(2000, 1, 1, tzinfo=timezone.utc).isoformat(),
            "ignore_result": True,
            "origin": "mlproducer check",
        },
        "delivery_mode": 1,
        "correlation_id": task_id,
        "message_id": task_id,
    }


def _take_back(session: Session, name: str, task_id: str) -> bool:
    """Take a probe out of a queue without consumers; return whether it is still there.

    Only an empty queue is touched: looking at a message hands it out, which counts.
    """
    found, loss = session.attempt("queue_declare", name, passive=True)
    if loss is not None or found.method.consumer_count:
        return False
    if found.method.message_count > 1:
        return True
    answer, loss = session.attempt("basic_get", name)
    if loss is not None:
        return True
    method, properties, _ = answer
    if method is None:
        return False
    if properties.message_id == task_id:
        session.ask("basic_ack", method.delivery_tag)
        return False
    session.ask("basic_nack", method.delivery_tag, requeue=True)
    return True


# --- dead letters and the store ----------------------------------------------------------------


def _dead_letters(session: Session, topology: Topology) -> Step:
    """Return whether dead letters may be sent to their exchange."""
    started = time.monotonic()
    exchange = topology.dead_letter_exchange
    loss = session.publish_invalid(exchange)
    seconds = time.monotonic() - started
    if loss.reply_code == PRECONDITION_FAILED:
        return Step("dead letters", True, seconds, f"exchange {exchange} may be written to")
    detail = f"{exchange}: {loss.reply_code} {loss.text}"
    advice = connectivity.advise_code(loss.reply_code)
    return Step("dead letters", False, seconds, detail, advice)


def _store(settings: Settings, producer: MLProducer) -> Step:
    """Open the store, count what is in it, and see that it takes a message and deletes it.

    A full one, a read-only one, and a user who may only read are found by nothing else. A file that
    is not there yet is not made.
    """
    settings = anchored(settings)
    if settings.store_url.startswith("memory:"):
        return Step("store", None, None, "memory:// needs none")
    started = time.monotonic()
    try:
        store = open_store(settings)
        if settings.store_url.startswith("sqlite:") and not Path(store.name).exists():
            return _future_store(Path(store.name))
        with closing(store):
            depth = store.depth()
            envelope, policy = producer.prepare(connectivity.probe_message(), retry=False)
            # Claimed by this process, so that no other sends it; should this one end in between, it
            # is sent when the lease has ended, and returned.
            probe = Entry(Record(envelope, retry=policy), ahead=True)
            store.done(store.put([probe], settings.publish_timeout))
    except StoreError as error:
        advice = "fix the store or ML_STORE_URL; run this command as the producers' user"
        return Step("store", False, time.monotonic() - started, str(error), advice)
    seconds = time.monotonic() - started
    detail = f"{store.name}: {depth.stored} messages stored, {depth.dead} of them dead letters"
    return Step("store", True, seconds, detail)


def _future_store(path: Path) -> Step:
    if path.parent.is_dir() and connectivity.may_write(path.parent):
        return Step("store", True, None, f"{path} is not there yet; its directory can be written")
    advice = "create the directory, and let the producers' user write to it"
    return Step("store", False, None, f"{path.parent} cannot be written to", advice)
