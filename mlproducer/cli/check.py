"""``mlproducer check``: connect, declare, publish, confirm, and advice where a step fails.

The least invasive honest check: a probe (see `mlproducer.cli.reach`) that the broker must read,
route, return and confirm, and that reaches no worker. Declaring is done by the library whenever it
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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrs import evolve, field, frozen

from mlproducer import MLProducer, Settings
from mlproducer.cli import reach
from mlproducer.cli.output import Console
from mlproducer.errors import (
    BrokerBlockedError,
    BrokerRejectedError,
    PublishError,
)

HELP = "connect, declare, publish and confirm, step by step"
DESCRIPTION = (
    "Check the broker in RABBITMQ_URL: connect, declare, publish, confirm. "
    "Nothing is left behind for a worker."
)
LOG_LEVEL = logging.CRITICAL  # the steps themselves say what the library would log

STEPS = ("connect", "declare", "publish", "confirm")
MARGIN = 1.0
"""Seconds beyond the connection timeout within which the library must have said how it went."""

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


def configure(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Check, print, and say whether all is well.

    :raises ConfigurationError: no broker is named, or a setting does not parse
    """
    settings = evolve(Settings.from_env(), max_reconnect_attempts=1)
    producer = MLProducer(settings)
    steps = []
    try:
        producer.start()
        broker = producer.status().broker
        for step in _steps(producer):
            broker = producer.status().broker
            steps.append(step)
            _show(step, console)
    finally:
        producer.close(0.0)
    well = all(step.ok for step in steps)
    console.emit({"ok": well, "broker": broker, "steps": [step.to_json() for step in steps]})
    return well
