"""The broker, or the way to it, goes away in every manner while threads publish.

The breaker, which has a scenario of its own, is switched off: so publish() takes over what comes
while there is no connection, instead of giving it back.

Runs on: the main thread.
"""

from __future__ import annotations

import time

from mlproducer import Receipt
from mlproducer.cli import connectivity
from mlproducer.cli.reliability.environment import BACK, TIMERS, Lab
from mlproducer.cli.reliability.steps import Need, Scenario, Trial, expect, hear

TIMES = 5
RESTART = 30.0
BREAKER = 1_000_000
LATE = float(TIMERS["publish_timeout"]) + 0.25


def _killed(lab: Lab) -> str:
    producer = lab.producer(circuit_breaker_threshold=BREAKER)
    lab.check(producer)
    lab.node.save_queues()
    connected = lab.events(producer, "connected")
    with lab.traffic(producer):
        lab.node.kill()
        lab.node.start(RESTART)
        seconds = hear(connected, BACK, "connected again")
        lab.check(producer)
    return f"connected again {seconds:.2f} s after the broker was up"


def _closed(lab: Lab) -> str:
    producer = lab.producer(circuit_breaker_threshold=BREAKER)
    connected = lab.events(producer, "connected")
    with lab.traffic(producer):
        longest = 0.0
        for _ in range(TIMES):
            lab.node.close_all_connections()
            longest = max(longest, hear(connected, BACK, "connected again"))
    return f"connected again each time, within {longest:.2f} s"


def _reset(lab: Lab) -> str:
    proxy = lab.proxy()
    producer = lab.producer(lab.through(proxy), circuit_breaker_threshold=BREAKER)
    connected = lab.events(producer, "connected")
    with lab.traffic(producer):
        longest = 0.0
        for _ in range(TIMES):
            proxy.reset()
            longest = max(longest, hear(connected, BACK, "connected again"))
            lab.check(producer)
    return f"connected again each time, within {longest:.2f} s"


def _deaf(lab: Lab) -> str:
    proxy = lab.proxy()
    producer = lab.producer(lab.through(proxy), circuit_breaker_threshold=BREAKER)
    connected = lab.events(producer, "connected")
    proxy.deaf()
    proxy.reset()
    started = time.monotonic()
    if lab.private:
        answer = lab.journal.publish(producer, lab.message())
        expect(isinstance(answer, Receipt), f"given back: {type(answer).__name__}")
    else:
        connectivity.probe(producer, LATE)
    answered = time.monotonic() - started
    proxy.accept()
    seconds = hear(connected, BACK, "connected again")
    lab.check(producer)
    seen = f"publish() answered after {answered:.2f} s; connected {seconds:.2f} s after the fault"
    return expect(answered <= LATE, seen)


def _several(lab: Lab) -> str:
    gone = lab.proxy()
    gone.refuse()
    longest = 0.0
    for _ in range(TIMES):  # each in an order of its own
        started = time.monotonic()
        producer = lab.producer(f"{lab.through(gone)},{lab.url}")
        longest = max(longest, time.monotonic() - started)
        lab.check(producer)
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
