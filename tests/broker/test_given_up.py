"""What workers and the broker give up is a dead letter that can be seen, and goes back."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from mlproducer import CeleryTask, Message, Queue, Settings, Topology
from mlproducer.settings import topology_of
from mlproducer.testing import CeleryWorker, RabbitMQNode
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.commands import documents, run
from tests.broker.conftest import Connect

pytestmark = pytest.mark.broker

EXCHANGE, EMBED, DEAD = "bookmarkai.ml", "ml.embed", "ml.dead_letter"
DLX = f"{EXCHANGE}.dlx"
TASK = "x.report"
LIMIT = 2
"""Deliveries after the first; the default of 20 only takes longer."""


def _eventually(true: Callable[[], bool], limit: float = 300.0) -> None:
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _letters(url: str) -> list[dict[str, Any]]:
    return documents(run("dead-letters", "list", "--json", url=url).stdout)


def _publish(connect: Connect, names: list[str], **fields: Any) -> None:
    producer = connect(delivery_limit=LIMIT)
    assert producer.wait_connected(30.0)  # or a countdown may be over before that
    for name in names:
        task = CeleryTask(TASK, ["PRIVATE"], routing_key=EMBED, task_id=name, **fields)
        assert producer.publish(task).confirmed


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_a_worker_that_is_restarted_time_and_again(
    how: signal.Signals, rabbitmq_vhost: VirtualHost, connect: Connect, tmp_path: Path
) -> None:
    """Whatever it holds at each end goes back to the queue, and past the limit to the dead letters.

    There it is shown with its task and its reason, and from there replayed to where it came from.
    """
    url, node = rabbitmq_vhost.url, rabbitmq_vhost.node
    names = [str(number) for number in range(10)]
    connect(delivery_limit=LIMIT).wait_connected(30.0)
    # By way of the default exchange the worker itself holds a task until it is due.
    _publish(connect, names, exchange="", countdown=3600.0)
    for _ in range(LIMIT + 1):
        worker = CeleryWorker(
            url, [EMBED], tasks=[TASK], declare=False, prefetch=20, directory=tmp_path
        )
        with worker:
            _eventually(lambda: node.queue_depth(rabbitmq_vhost.name, EMBED) == 0)
            assert worker.pid is not None
            os.kill(worker.pid, how)
            _eventually(lambda worker=worker: not worker.running)
    _eventually(lambda: node.queue_depth(rabbitmq_vhost.name, DEAD) == len(names))
    letters = _letters(url)
    assert {letter["message_id"] for letter in letters} == set(names)
    assert {letter["reason"] for letter in letters} == {"delivery_limit"}
    assert {(letter["exchange"], letter["routing_key"]) for letter in letters} == {("", EMBED)}
    for_people = run("dead-letters", "list", url=url).stdout
    assert f"queue  {TASK}  attempts 1  delivery_limit" in for_people
    assert run("dead-letters", "replay", "--task", TASK, url=url).returncode == 0
    assert drain(url, [EMBED, DEAD]) == dict.fromkeys(names, 1)


def _hand_back(channel: BlockingChannel, count: int) -> None:
    """Take messages and hand them back, as often as it takes for the broker to give them up."""
    for _ in range(LIMIT + 1):
        tags: list[int] = []
        _eventually(lambda tags=tags: _take(channel, tags) >= count)
        for tag in tags:
            channel.basic_nack(tag, requeue=True)


def _take(channel: BlockingChannel, tags: list[int]) -> int:
    while (method := channel.basic_get(EMBED)[0]) is not None:
        tags.append(method.delivery_tag)
    return len(tags)


def _be_impatient(node: RabbitMQNode) -> None:
    """Have the broker try again after a second what it could not dead-letter."""
    node.eval("application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 1000).")


def _purged(url: str) -> list[str]:
    deleted = run("dead-letters", "purge", "--yes", "--json", url=url)
    return [letter["message_id"] for letter in documents(deleted.stdout)]


@pytest.mark.parametrize("how", ["unbound", "deleted", "full"])
def test_dead_letters_have_nowhere_to_go(
    how: str, rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """Fault 131: the broker keeps what it gives up until the dead-letter queue is there again."""
    url = rabbitmq_vhost.url
    names = [str(number) for number in range(10)]
    _be_impatient(rabbitmq_vhost.node)
    with open_channel(url) as channel:
        if how == "full":
            limits = {"x-max-length": 2, "x-overflow": "reject-publish"}
            channel.queue_declare(DEAD, durable=True, arguments=limits)
        _publish(connect, names)
        if how == "unbound":
            channel.queue_unbind(DEAD, DLX, "#")
        elif how == "deleted":
            channel.queue_delete(DEAD)
            channel.exchange_delete(DLX)
        _hand_back(channel, len(names))
        time.sleep(1.0)
        before = [] if how == "deleted" else _purged(url)
        assert len(before) <= (2 if how == "full" else 0)
        if how != "full":
            producer = connect(delivery_limit=LIMIT)  # declares it again
            assert producer.wait_connected(30.0)
        found = set(before)

        def all_there() -> bool:
            found.update(_purged(url))
            return found == set(names)

        _eventually(all_there)


def test_a_delayed_task_that_is_given_up_goes_back_to_its_queue(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """The levels of its delay are no deaths; it does not wait again."""
    url = rabbitmq_vhost.url
    _publish(connect, ["a"], countdown=3.0)
    with open_channel(url) as channel:
        _hand_back(channel, 1)
    _eventually(lambda: rabbitmq_vhost.node.queue_depth(rabbitmq_vhost.name, DEAD) == 1)
    (letter,) = _letters(url)
    assert (letter["reason"], letter["exchange"], letter["routing_key"]) == (
        "delivery_limit",
        "",
        EMBED,
    )
    assert run("dead-letters", "replay", url=url).returncode == 0
    assert drain(url, [EMBED]) == {"a": 1}


def test_a_queue_that_is_there_with_other_arguments(
    rabbitmq_vhost: VirtualHost, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Publishing goes on; it is reported once, with a way to mend it that loses nothing."""
    url, node = rabbitmq_vhost.url, rabbitmq_vhost.node
    old = {"x-queue-type": "quorum", "x-delivery-limit": 5}
    with open_channel(url) as channel:
        channel.queue_declare(EMBED, durable=True, arguments=old)
    producer = connect()
    message = Message(body=b"", routing_key=EMBED, message_id="a")
    assert producer.publish(message, timeout=60.0).confirmed
    for connection in (1, 2):
        node.close_all_connections()
        _eventually(lambda: node.queue_depth(rabbitmq_vhost.name, EMBED) >= 0)
        assert producer.publish(message, timeout=60.0).confirmed, connection
    faults = [each for each in caplog.records if "cannot declare" in each.getMessage()]
    assert len(faults) == 1
    assert faults[0].levelno == logging.ERROR
    told = faults[0].getMessage()
    assert f"target={EMBED} code=406" in told
    assert "mlproducer topology" in told
    assert "delete" not in told
    # What the command advises mends it in place: the policy adds what the arguments lack.
    result = run("topology", url=url)
    assert result.returncode == 1
    assert "set_policy" in result.stdout
    assert "delete" not in result.stdout
    line = next(line for line in result.stdout.splitlines() if "set_policy" in line)
    policy = _policy(shlex.split(line), rabbitmq_vhost.name)
    drain(url, [EMBED])
    assert producer.publish(message, timeout=60.0).confirmed
    node.eval(policy)
    with open_channel(url) as channel:
        for _ in range(6):
            tags: list[int] = []
            _eventually(lambda tags=tags: _take(channel, tags) >= 1)
            channel.basic_nack(tags[0], requeue=True)
    _eventually(lambda: node.queue_depth(rabbitmq_vhost.name, DEAD) == 1)


def _policy(command: list[str], vhost: str) -> str:
    """Return what ``rabbitmqctl set_policy`` has the broker evaluate; itself it takes seconds."""
    name, pattern, definition = command[4:7]
    assert command == [
        *("rabbitmqctl", "set_policy", "-p", vhost, name, pattern, definition),
        *("--apply-to", "queues"),
    ]
    assert pattern == r"^ml\.embed$"
    # Erlang's escapes in a string are those of JSON.
    texts = (json.dumps(each) for each in (vhost, name, pattern, definition))
    values = ", ".join(f"<<{text}>>" for text in texts)
    return f'ok = rabbit_policy:parse_set({values}, 0, <<"queues">>, <<"tester">>).'


def test_a_topology_of_ones_own(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Publishing, dead letters and commands follow it, with the prefix before its queues."""
    own = Topology("shop", queues=(Queue("orders", ("order.*",)), Queue("mails", type="classic")))
    producer = connect(topology=own, queue_prefix="test.")
    for key, name in (("order.new", "a"), ("mails", "b")):
        assert producer.publish(Message(body=b"", routing_key=key, message_id=name)).confirmed
    url = rabbitmq_vhost.url
    with open_channel(url) as channel:
        for queue in ("test.orders", "test.mails"):
            method, _, _ = channel.basic_get(queue)
            channel.basic_reject(method.delivery_tag, requeue=False)
    _eventually(lambda: drain(url, ["test.ml.dead_letter"]).keys() >= {"a"})
    assert topology_of(Settings(queue_prefix="test.")).queues[0].name == "test.ml.summarize"
