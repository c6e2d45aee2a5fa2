"""What cannot be delivered at once is tried again, with its id, and ends where it can be found.

Runs on: the main thread.
"""

from __future__ import annotations

import threading

from mlproducer import Receipt, Settings
from mlproducer.cli.reliability.scenario import Scenario, Trial, UnexpectedError, expect
from mlproducer.cli.reliability.scenario_setup import (
    BACK,
    DEAD_LETTERS,
    QUEUES,
    SETTLING,
    TIMERS,
    ScenarioSetup,
)
from mlproducer.dead_letters import DeadLetters
from mlproducer.errors import RetriesExhaustedError, UnroutableError

FROZEN = 3.0
PUBLISHERS = 20
CUT_OFF = 5
"""Fewer than open the breaker."""

RETRIES = 3

_BINDING = (
    'rabbit_binding:{}({{binding, rabbit_misc:r(<<47>>, exchange, <<"bookmarkai.ml">>), '
    '<<"{}">>, rabbit_misc:r(<<47>>, queue, <<"{}">>), []}}, <<"reliability">>)'
)


def _deferred(answer: object) -> Receipt:
    if not isinstance(answer, Receipt):
        raise UnexpectedError(f"given back: {type(answer).__name__}")
    expect(not answer.confirmed or answer.reason is not None, "confirmed at once")
    return answer


def _healed(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    unbound = QUEUES[1]
    setup.node.eval(_BINDING.format("remove", unbound, unbound))
    message = setup.message(unbound)
    receipt = _deferred(setup.journal.publish(producer, message))
    expect(isinstance(receipt.reason, UnroutableError), type(receipt.reason).__name__)
    setup.node.eval(_BINDING.format("add", unbound, unbound))
    settled = receipt.result(SETTLING)
    once = setup.once({receipt.message_id})
    return f"DEFERRED (UnroutableError), then confirmed at attempt {settled.attempts}; {once}"


def _buried(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    dead = setup.events(producer, "dead_lettered")
    message = setup.message("not.bound")
    receipt = _deferred(setup.journal.publish(producer, message))
    try:
        receipt.result(SETTLING)
    except RetriesExhaustedError as error:
        attempts = error.attempts
    else:
        raise UnexpectedError("confirmed")
    expect(dead.get(timeout=BACK).message_id == receipt.message_id, "another message's event")
    expect(setup.copies(DEAD_LETTERS)[receipt.message_id] == 1, "not among the dead letters")
    (letter,) = DeadLetters(Settings(url=setup.url)).list([receipt.message_id])
    as_before = letter.body == message.body and letter.routing_key == message.routing_key
    seen = f"RetriesExhaustedError after {attempts} attempts; the letter says: {letter.reason}"
    return expect(as_before and attempts == letter.attempts == RETRIES + 1, seen)


def _late(setup: ScenarioSetup) -> str:
    producer = setup.shared()
    with setup.node.frozen():
        over = threading.Event()
        timer = threading.Timer(FROZEN, over.set)
        timer.start()
        receipts = [_deferred(each) for each in setup.publish_at_once(producer, PUBLISHERS)]
        over.wait(FROZEN)
        timer.join(FROZEN)
    attempts = {receipt.result(SETTLING).attempts for receipt in receipts}
    once = setup.once({receipt.message_id for receipt in receipts})
    return expect(attempts == {1}, f"all confirmed late, attempts {sorted(attempts)}; {once}")


def _cut_off(setup: ScenarioSetup) -> str:
    proxy = setup.proxy()
    producer = setup.producer(setup.through(proxy))
    disconnected = setup.events(producer, "disconnected")
    proxy.refuse()
    proxy.reset()
    disconnected.get(timeout=BACK)
    receipts = [_deferred(setup.journal.publish(producer, setup.message())) for _ in range(CUT_OFF)]
    written = {receipt.attempts for receipt in receipts}
    proxy.accept()
    attempts = {receipt.result(SETTLING).attempts for receipt in receipts}
    once = setup.once({receipt.message_id for receipt in receipts})
    seen = f"attempts {sorted(written)} while cut off, {sorted(attempts)} in the end; {once}"
    return expect((written, attempts) == ({0}, {1}), seen)


SCENARIO = Scenario(
    "message-retry",
    "what cannot be delivered at once is tried again, and never only logged",
    (
        Trial(
            "publish to a key that is bound to no queue, then bind it",
            "DEFERRED, then CONFIRMED, in the queue exactly once",
            _healed,
        ),
        Trial(
            "publish to a key that is never bound",
            f"after {RETRIES} retries a dead letter that says why, and RetriesExhaustedError",
            _buried,
        ),
        Trial(
            f"freeze the broker for {FROZEN:g} s, with a timeout of {TIMERS['publish_timeout']:g}",
            "DEFERRED, confirmed late at the first attempt, in the queue exactly once",
            _late,
        ),
        Trial(
            "publish while the broker cannot be reached",
            "DEFERRED, no attempt used up, in the queue exactly once",
            _cut_off,
        ),
    ),
)
