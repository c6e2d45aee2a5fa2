"""A connection that looks alive and is dead is found, without any traffic; one that waits is left.

Runs on: the main thread.
"""

from __future__ import annotations

import queue
from typing import Any

from mlproducer import MLProducer, Receipt
from mlproducer.cli.reliability.scenario import (
    Need,
    Scenario,
    Trial,
    UnexpectedError,
    expect,
    wait_for_event,
)
from mlproducer.cli.reliability.scenario_setup import BACK, SETTLING, ScenarioSetup

INTERVAL = 1.0
PROBE_LIMIT = 5.0
FOUND = INTERVAL + PROBE_LIMIT + 1.0


def _producer(
    setup: ScenarioSetup, url: str | None = None
) -> tuple[MLProducer, queue.SimpleQueue[Any]]:
    producer = setup.producer(url, health_check_interval=INTERVAL)
    return producer, setup.events(producer, "disconnected")


def _frozen(setup: ScenarioSetup) -> str:
    producer, disconnected = _producer(setup)
    connected = setup.events(producer, "connected")
    with setup.node.frozen():
        found = wait_for_event(disconnected, FOUND, "found dead")
    back = wait_for_event(connected, BACK, "connected again")
    setup.check(producer)
    return f"found dead after {found:.2f} s, connected {back:.2f} s after it went on"


def _one_way(setup: ScenarioSetup) -> str:
    proxy = setup.proxy()
    producer, disconnected = _producer(setup, setup.through(proxy))
    connected = setup.events(producer, "connected")
    proxy.hole("s2c")
    found = wait_for_event(disconnected, FOUND, "found dead")
    proxy.heal()
    back = wait_for_event(connected, BACK, "connected again")
    setup.check(producer)
    return f"found dead after {found:.2f} s, connected {back:.2f} s after the path was mended"


def _alarmed(setup: ScenarioSetup) -> str:
    producer, disconnected = _producer(setup)
    blocked = setup.events(producer, "blocked")
    with setup.node.memory_alarm():
        receipts = [setup.journal.publish(producer, setup.message()) for _ in range(2)]
        wait_for_event(blocked, BACK, "blocked")
        try:
            disconnected.get(timeout=FOUND)
        except queue.Empty:
            healthy = producer.is_healthy()
        else:
            raise UnexpectedError("the connection was given up")
    taken = [each for each in receipts if isinstance(each, Receipt)]
    for receipt in taken:
        receipt.result(SETTLING)
    once = setup.once({receipt.message_id for receipt in taken})
    seen = f"left alone for {FOUND:.1f} s, is_healthy() {healthy}; afterwards {once}"
    return expect(not healthy and len(taken) == len(receipts), seen)


SCENARIO = Scenario(
    "health-checks",
    "a dead connection is found without traffic, and a blocked one is left alone",
    (
        Trial("freeze the broker", f"found dead within {FOUND:g} s, reconnected", _frozen),
        Trial(
            "let everything that the broker sends disappear",
            f"found dead within {FOUND:g} s, reconnected",
            _one_way,
            Need.PATH,
        ),
        Trial(
            f"set a memory alarm for {FOUND:g} s",
            "blocked, not healthy, not reconnected; afterwards each message is there once",
            _alarmed,
        ),
    ),
)
