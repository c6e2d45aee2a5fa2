"""Every answer that a broker can give to a message finds that message, and no other.

Runs on: the main thread.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from mlproducer import Message, Receipt
from mlproducer.cli import connectivity
from mlproducer.cli.reliability.scenario import Need, Scenario, Trial, expect
from mlproducer.cli.reliability.scenario_setup import BACK, QUEUES, SETTLING, ScenarioSetup
from mlproducer.errors import NackError, PublishError, UnroutableError
from mlproducer.testing import Behaviour, FakeBroker

MANY = 500
FULL = 5
TRIES = 1000
LIMIT = f'{{"max-length": {FULL}, "overflow": "reject-publish"}}'


def _acked(setup: ScenarioSetup) -> str:
    messages = [setup.message() for _ in range(MANY)]
    results = setup.shared().publish_many(messages)
    for message, result in zip(messages, results, strict=True):
        setup.journal.note(message.message_id, result)
    ids = {str(message.message_id) for message in messages}
    confirmed = sum(isinstance(each, Receipt) and each.reason is None for each in results)
    return expect(confirmed == MANY, f"{confirmed} of {MANY} confirmed; {setup.once(ids)}")


def _nacked(setup: ScenarioSetup) -> str:
    producer, limited = setup.shared(), QUEUES[2]
    setup.node.ctl("set_policy", "--apply-to", "queues", "full", f"^{limited}$", LIMIT)
    confirmed: set[str] = set()
    answer: object = None
    for _ in range(TRIES):
        answer = setup.journal.publish(producer, setup.message(limited), retry=False)
        if not isinstance(answer, Receipt):
            break
        confirmed.add(answer.message_id)
    setup.node.ctl("clear_policy", "full")
    seen = f"{len(confirmed)} confirmed, then {type(answer).__name__}; {setup.once(confirmed)}"
    return expect(isinstance(answer, NackError) and len(confirmed) >= FULL, seen)


def _returned(setup: ScenarioSetup) -> str:
    keys = (QUEUES[0], "not.bound")
    messages = [setup.message(keys[number % 2]) for number in range(MANY)]
    futures = [setup.shared().submit(message, retry=False) for message in messages]
    answers = [setup.journal.note(each.message_id, _answer(each)) for each in futures]
    right = sum(
        isinstance(answer, (Receipt, UnroutableError)[number % 2])
        for number, answer in enumerate(answers)
    )
    once = setup.once({answer.message_id for answer in answers if isinstance(answer, Receipt)})
    return expect(right == MANY, f"{right} of {MANY} answers were right; {once}")


def _comes_back(setup: ScenarioSetup) -> str:
    error = connectivity.probe(setup.producer(), BACK)
    return expect(error is None, "returned (312), then acked" if error is None else str(error))


class _Silent(Behaviour):
    """Leaves the confirming to the trial."""

    def on_publish(self, connection: Any, channel: int, tag: int, message: Any) -> None:
        """Do nothing."""


def _multiple(setup: ScenarioSetup) -> str:
    with FakeBroker(_Silent()) as broker:
        producer = setup.producer(broker.url, exchange="x", declare_topology="off")
        futures = [
            producer.submit(Message(body=b"x", routing_key="k"), retry=False) for _ in range(MANY)
        ]
        received = broker.wait_for_messages(MANY, SETTLING)
        last = received[-1]
        tags = {str(each.properties.message_id): each.tag for each in received}
        nacked = range(301, 401)
        last.connection.ack(last.channel, 300, multiple=True)
        last.connection.nack(last.channel, 400, multiple=True)
        for tag in range(MANY, 400, -1):  # one by one, the last first
            last.connection.ack(last.channel, tag)
        answers = [_answer(future) for future in futures]
        producer.close()
    right = sum(
        isinstance(answer, NackError if tags[str(answer.message_id)] in nacked else Receipt)
        for answer in answers
    )
    nacks = sum(isinstance(answer, NackError) for answer in answers)
    seen = f"{MANY - nacks} confirmed, {nacks} nacked; {right} of {MANY} answers were right"
    return expect(right == MANY, seen)


def _answer(future: Future[Receipt]) -> Receipt | PublishError:
    try:
        return future.result(SETTLING)
    except PublishError as error:
        return error


SCENARIO = Scenario(
    "publisher-confirms",
    "every answer of the broker finds its own message",
    (
        Trial(f"publish {MANY} messages, pipelined", "all confirmed, each there once", _acked),
        Trial(
            f"publish to a queue that takes {FULL} messages and rejects more",
            "NackError once it is full; what was confirmed is there",
            _nacked,
        ),
        Trial(
            f"{MANY} in flight, every second bound to no queue",
            "every second UnroutableError, the others there once",
            _returned,
        ),
        Trial("publish to a key that is bound to no queue", "returned", _comes_back, Need.NOTHING),
        Trial(
            f"{MANY} in flight at a scripted broker: ack and nack several at once, the rest "
            "one by one from the end",
            "each message gets its own answer",
            _multiple,
            Need.NOTHING,
        ),
    ),
)
