"""A broker that stops answering opens the breaker; one message at a time finds out when it is back.

The broker stays frozen over the first trials, less long than the health check waits for an answer.

Runs on: the main thread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter

from mlproducer import CircuitState
from mlproducer.cli.reliability.scenario import (
    Scenario,
    Trial,
    expect,
    wait_until,
    waited_for_cpu,
)
from mlproducer.cli.reliability.scenario_setup import BACK, TIMERS, ScenarioSetup
from mlproducer.errors import CircuitOpenError

THRESHOLD = 10
COOLDOWN = float(TIMERS["circuit_breaker_cooldown"])
MARGIN = 1.0
FAST = 0.005
CALLS = 200
OUTLIERS = CALLS // 100
"""Calls that may take longer: a virtual machine is stopped now and then, which nothing counts."""

AT_ONCE = 32
TIMEOUT = 0.2


def _opens(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    setup.check(producer)
    opened = setup.events(producer, "circuit_opened")
    setup.node.freeze()
    setup.publish_at_once(producer, THRESHOLD - 1, timeout=TIMEOUT, retry=False)
    before = producer.status()
    setup.publish_at_once(producer, 1, timeout=TIMEOUT, retry=False)
    opened.get(timeout=BACK)
    after = producer.status()
    failures = before.consecutive_failures
    seen = f"{failures} failures: {before.circuit_state.name}; one more: {after.circuit_state.name}"
    well = failures == THRESHOLD - 1 and before.circuit_state is CircuitState.CLOSED
    return expect(well and after.circuit_breaker_open, seen)


def _fails_fast(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    seconds: list[float] = []
    kinds: set[type] = set()
    half_open_at = math.inf
    while len(seconds) < CALLS and time.monotonic() < half_open_at - COOLDOWN / 2:
        waited, started = (
            waited_for_cpu(),
            time.monotonic(),
        )  # in this order, so that none is missed
        answer = setup.journal.publish(producer, setup.message())
        took = time.monotonic() - started
        if isinstance(answer, CircuitOpenError):
            half_open_at = started + answer.retry_after
        elif started + took >= half_open_at:
            break  # on a busy machine: it was the probe
        kinds.add(type(answer))
        seconds.append(max(0.0, took - (waited_for_cpu() - waited)))
    slow = sum(each >= FAST for each in seconds)
    median, longest = statistics.median(seconds) * 1000, max(seconds) * 1000
    seen = f"{len(seconds)} calls: median {median:.3f} ms, longest {longest:.3f} ms"
    return expect(kinds == {CircuitOpenError} and slow <= OUTLIERS, seen)


def _cools(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    answer = setup.journal.publish(producer, setup.message())
    left = answer.retry_after if isinstance(answer, CircuitOpenError) else 0.0
    seconds = wait_until(lambda: _is(setup, CircuitState.HALF_OPEN), COOLDOWN + MARGIN, "half-open")
    seen = f"retry_after was {left:.2f} s; half-open {seconds:.2f} s later, without a publish()"
    return expect(abs(seconds - left) < MARGIN, seen)


def _probes(setup: ScenarioSetup) -> str:
    answers = setup.publish_at_once(setup.shared(), AT_ONCE, timeout=TIMEOUT, retry=False)
    written = sum(answer.attempts for answer in answers)
    kinds = Counter(type(answer).__name__ for answer in answers)
    state = setup.shared().status().circuit_state
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    seen = f"{written} message written ({told}); then {state.name}"
    return expect(written == 1 and state is CircuitState.OPEN, seen)


def _closes(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    closed = setup.events(producer, "circuit_closed")
    setup.node.thaw()
    # A late confirm of what is in flight closes it at once; where there is none, the probe's does.
    wait_until(lambda: not _is(setup, CircuitState.OPEN), COOLDOWN + MARGIN, "half-open or closed")
    setup.check(producer)
    closed.get(timeout=BACK)
    state = producer.status().circuit_state
    return expect(state is CircuitState.CLOSED, f"a message was confirmed; then {state.name}")


def _is(setup: ScenarioSetup, state: CircuitState) -> bool:
    return setup.shared().status().circuit_state is state


SCENARIO = Scenario(
    "circuit-breaker",
    "a broker that does not answer is left alone, and tried with one message at a time",
    (
        Trial(
            f"freeze the broker and publish {THRESHOLD} messages",
            f"open after exactly {THRESHOLD} failures in a row",
            _opens,
        ),
        Trial(
            f"publish {CALLS} more",
            f"CircuitOpenError in less than {FAST * 1000:g} ms",
            _fails_fast,
        ),
        Trial("wait, publishing nothing", f"half-open after {COOLDOWN:g} s", _cools),
        Trial(
            f"publish from {AT_ONCE} threads at once, the broker still frozen",
            "one of them is the probe; open again when it fails",
            _probes,
        ),
        Trial("let the broker go on, and publish", "closed by the first confirm", _closes),
    ),
)
