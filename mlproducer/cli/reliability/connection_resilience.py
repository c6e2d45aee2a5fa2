"""The broker, or the way to it, goes away in every manner while threads publish.

The breaker, which has a scenario of its own, is switched off: so publish() takes over what comes
while there is no connection, instead of giving it back.

Runs on: the main thread.
"""

from __future__ import annotations

import time

from mlproducer import Receipt
from mlproducer.cli import connectivity
from mlproducer.cli.reliability.scenario import Need, Scenario, Trial, expect, wait_for_event
from mlproducer.cli.reliability.scenario_setup import BACK, TIMERS, ScenarioSetup

TIMES = 5
RESTART = 30.0
BREAKER = 1_000_000
LATE = float(TIMERS["publish_timeout"]) + 0.25


def _killed(setup: ScenarioSetup) -> str:
    producer = setup.producer(circuit_breaker_threshold=BREAKER)
    setup.check(producer)
    setup.node.save_queues()
    connected = setup.events(producer, "connected")
    with setup.traffic(producer):
        setup.node.kill()
        setup.node.start(RESTART)
        seconds = wait_for_event(connected, BACK, "connected again")
        setup.check(producer)
    return f"connected again {seconds:.2f} s after the broker was up"


def _closed(setup: ScenarioSetup) -> str:
    producer = setup.producer(circuit_breaker_threshold=BREAKER)
    connected = setup.events(producer, "connected")
    with setup.traffic(producer):
        longest = 0.0
        for _ in range(TIMES):
            setup.node.close_all_connections()
            longest = max(longest, wait_for_event(connected, BACK, "connected again"))
    return f"connected again each time, within {longest:.2f} s"


def _reset(setup: ScenarioSetup) -> str:
    proxy = setup.proxy()
    producer = setup.producer(setup.through(proxy), circuit_breaker_threshold=BREAKER)
    connected = setup.events(producer, "connected")
    with setup.traffic(producer):
        longest = 0.0
        for _ in range(TIMES):
            proxy.reset()
            longest = max(longest, wait_for_event(connected, BACK, "connected again"))
            setup.check(producer)
    return f"connected again each time, within {longest:.2f} s"


def _deaf(setup: ScenarioSetup) -> str:
    proxy = setup.proxy()
    producer = setup.producer(setup.through(proxy), circuit_breaker_threshold=BREAKER)
    connected = setup.events(producer, "connected")
    proxy.deaf()
    proxy.reset()
    started = time.monotonic()
    if setup.private:
        answer = setup.journal.publish(producer, setup.message())
        expect(isinstance(answer, Receipt), f"given back: {type(answer).__name__}")
    else:
        connectivity.probe(producer, LATE)
    answered = time.monotonic() - started
    proxy.accept()
    seconds = wait_for_event(connected, BACK, "connected again")
    setup.check(producer)
    seen = f"publish() answered after {answered:.2f} s; connected {seconds:.2f} s after the fault"
    return expect(answered <= LATE, seen)


def _several(setup: ScenarioSetup) -> str:
    gone = setup.proxy()
    gone.refuse()
    longest = 0.0
    for _ in range(TIMES):  # each in an order of its own
        started = time.monotonic()
        producer = setup.producer(f"{setup.through(gone)},{setup.url}")
        longest = max(longest, time.monotonic() - started)
        setup.check(producer)
        producer.close()
    return expect(longest < BACK, f"{TIMES} producers connected, each within {longest:.2f} s")


SCENARIO = Scenario(
    "connection-resilience",
    "the connection comes back by itself, and nothing is lost meanwhile",
    (
        Trial("kill -9 the broker, start it again", f"connected within {BACK:g} s", _killed),
        Trial(
            f"have the broker close all connections, {TIMES} times",
            f"connected again each time within {BACK:g} s",
            _closed,
        ),
        Trial(
            f"reset the connection (RST), {TIMES} times",
            f"connected again each time within {BACK:g} s",
            _reset,
            Need.PATH,
        ),
        Trial(
            "reconnect to something that accepts and stays silent",
            f"publish() answers within {LATE:g} s; connected once it speaks",
            _deaf,
            Need.PATH,
        ),
        Trial(
            "name two brokers, one of which is down",
            f"connected to the other within {BACK:g} s",
            _several,
            Need.PATH,
        ),
    ),
)
