"""``mlproducer check``: connect, declare, publish, confirm, and advice where a step fails.

The least invasive honest check: probes (see `mlproducer.cli.reach`) that the broker must read,
route, return and confirm, and that reach no worker. Declaring is done by the library whenever it
connects, and publishing ends with the confirm, so these pairs of steps share a time. What could not
be declared is told by the library in its log only, and is read there.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import logging
import queue
import re
import time
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import evolve, frozen

from mlproducer import MLProducer, Settings
from mlproducer.cli import reach
from mlproducer.cli.output import Console
from mlproducer.errors import BrokerRejectedError, NotConnectedError, PublishError

HELP = "connect, declare, publish and confirm, step by step"
DESCRIPTION = (
    "Check the broker in RABBITMQ_URL: connect, declare, publish, confirm. "
    "Nothing is left behind for a worker."
)
LOG_LEVEL = logging.CRITICAL  # the steps themselves say what the library would log

STEPS = ("connect", "declare", "publish", "confirm")
MARGIN = 1.0
"""Seconds beyond the connection timeout within which the library must have said how it went."""

NO_PERMISSION = 403

_FAULT = re.compile(r"cannot declare target=(\S+) code=(\d+) reason=(.*)")


@frozen
class Step:
    """What came of one step.

    :ivar ok: ``None`` where it was not come to
    :ivar seconds: how long it took, together with the step that it shares its time with
    """

    name: str
    ok: bool | None
    seconds: float | None = None
    detail: str = ""
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give the form that programs read."""
        seconds = None if self.seconds is None else round(self.seconds, 6)
        return {
            "step": self.name,
            "ok": self.ok,
            "seconds": seconds,
            "detail": self.detail,
            "advice": self.advice,
        }


@frozen
class _Fault:
    """Something that the broker did not let us declare."""

    target: str
    reply_code: int
    reason: str


def configure(_parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(_arguments: argparse.Namespace, console: Console) -> bool:
    """Check, print, and say whether all is well.

    :raises ConfigurationError: no broker is named, or a setting does not parse
    """
    settings = evolve(Settings.from_env(), max_reconnect_attempts=1)  # so that gave_up comes soon
    producer = MLProducer(settings)
    try:
        steps = []
        for step in _steps(producer):
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
    console.say(f"  {step.name}  {word:<7}  {taken:>8}  {step.detail}".rstrip())
    if step.advice:
        console.say(f"           -> {step.advice}")


def _steps(producer: MLProducer) -> Iterator[Step]:
    with _declaration_faults() as faults:
        connect = _connect(producer)
    yield connect
    if not connect.ok:
        yield from (Step(name, None) for name in STEPS[1:])
        return
    yield _declared(producer.settings, faults, connect.seconds)
    yield from _publish(producer)


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
    # Only an error tells credentials from the rest; without a connection it comes at once.
    error = reach.probe(producer, MARGIN) or NotConnectedError("the connection does not last")
    return Step("connect", False, seconds, str(error), reach.advise(error))


def _declared(settings: Settings, faults: list[_Fault], seconds: float | None) -> Step:
    if settings.declare_topology == "off":
        return Step("declare", None, None, "ML_DECLARE_TOPOLOGY is off")
    if faults:
        detail = "; ".join(f"{each.target}: {each.reply_code} {each.reason}" for each in faults)
        advice = reach.advise_code(faults[0].reply_code)
        if faults[0].reply_code == NO_PERMISSION:
            advice += "; where somebody else declares, set ML_DECLARE_TOPOLOGY=passive"
        return Step("declare", False, seconds, detail, advice)
    done = "are there" if settings.declare_topology == "passive" else "are declared"
    return Step("declare", True, seconds, f"exchange {settings.exchange} and the queues {done}")


def _publish(producer: MLProducer) -> Iterator[Step]:
    started = time.monotonic()
    timeout = producer.settings.publish_timeout
    # With an alarm a broker takes a connection's first message, and blocks it from then on.
    error = reach.probe(producer, timeout) or reach.probe(producer, timeout)
    seconds = time.monotonic() - started
    blocked = producer.status().blocked
    if error is None:
        yield Step("publish", True, seconds, "written, routed to nowhere, returned")
        yield Step("confirm", True, seconds, "acknowledged by the broker")
        return
    detail = "the broker blocks publishers" if blocked else _words(error)
    advice = reach.advise(error, blocked=blocked)
    if error.possibly_sent and not blocked:
        yield Step("publish", True, seconds, "written")
        yield Step("confirm", False, seconds, detail, advice)
    else:
        yield Step("publish", False, seconds, detail, advice)
        yield Step("confirm", None)


def _words(error: PublishError) -> str:
    if isinstance(error, BrokerRejectedError):
        return f"{error.reply_code} {error}"
    return str(error)


@contextmanager
def _declaration_faults() -> Iterator[list[_Fault]]:
    """Collect what the library logs about declarations that were refused."""
    faults: list[_Fault] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = _FAULT.match(record.getMessage())
            if found is not None:
                faults.append(_Fault(found[1], int(found[2]), literal_eval(found[3])))

    logger, reader = logging.getLogger("mlproducer"), Reader()
    logger.addHandler(reader)
    try:
        yield faults
    finally:
        logger.removeHandler(reader)
