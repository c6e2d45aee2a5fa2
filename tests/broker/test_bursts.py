"""Bursts from many threads, undisturbed and with the broker frozen or killed in their middle.

The figures that the tests measure stand in `FIGURES`, and are printed by ``pytest -s``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import pytest

from mlproducer import Message, MLProducer, Outcome, Receipt
from mlproducer.errors import UnroutableError
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.audit import Audit, Journal, drain
from mlproducer.testing.plugin import VirtualHost
from mlproducer.topology import ROUTING_KEYS
from tests.broker.conftest import Connect
from tests.stopwatch import Stopwatch

pytestmark = pytest.mark.broker

LIMIT = 60.0
"""Seconds after which a burst is taken to hang."""

FIGURES: dict[str, str] = {}
"""What was measured, in words."""


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Print what was measured, once all is."""
    yield
    print("\n" + "\n".join(f"{name}: {figure}" for name, figure in FIGURES.items()))


def message(number: int, prefix: str = "m") -> Message:
    """A message with an id of its own, to the queues in turn."""
    routing_key = ROUTING_KEYS[number % len(ROUTING_KEYS)]
    return Message(body=b"x" * 200, routing_key=routing_key, message_id=f"{prefix}{number}")


class Burst:
    """Threads that publish one message after the other, all into one journal."""

    def __init__(self, producer: MLProducer, threads: int, each: int) -> None:
        self.journal = Journal()
        self.longest = 0.0
        self._producer = producer
        self._each = each
        self._start = threading.Barrier(threads)
        self._pool = ThreadPoolExecutor(threads)
        self.calls = [self._pool.submit(self._publish, thread) for thread in range(threads)]

    def _publish(self, thread: int) -> float:
        self._start.wait(LIMIT)
        longest = 0.0
        for number in range(thread * self._each, (thread + 1) * self._each):
            started = time.monotonic()
            self.journal.publish(self._producer, message(number), retry=number % 4 != 0)
            longest = max(longest, time.monotonic() - started)
        return longest

    def finish(self) -> float:
        """Wait for all threads; seconds of the longest publish."""
        longest = max(call.result(LIMIT) for call in self.calls)
        self._pool.shutdown()
        return longest


def settled(producer: MLProducer, journal: Journal, url: str) -> Audit:
    """Let everything that is ours arrive, and draw up the account."""
    assert producer.flush(LIMIT) == 0
    assert journal.count(Outcome.DEFERRED) == 0
    return journal.check(drain(url))


def assert_nothing_lost(account: Audit) -> None:
    """Nothing lost, nothing leaked, and no message found more often than it was written."""
    assert account.lost == account.leaked == account.foreign == account.excess == frozenset()


def test_two_hundred_threads(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Each of 200 x 100 messages is confirmed, and in the queues exactly once."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    burst = Burst(producer, threads=200, each=30)
    started = time.monotonic()
    longest = burst.finish()
    rate = 6000 / (time.monotonic() - started)
    FIGURES["200 threads"] = f"{rate:,.0f} publishes/s, longest publish {longest:.3f} s"
    assert burst.journal.count(Outcome.CONFIRMED) == 6000
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(6000)}


def test_five_hundred_of_which_half_are_unroutable(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """With 500 in flight every return finds its own message, and no other."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    futures: list[Future[Receipt]] = []
    with rabbitmq_vhost.node.frozen():  # so that all are in flight when the first answer comes
        for n in range(500):
            lost = Message(body=b"x", routing_key=f"nowhere.{n}", message_id=f"lost{n}")
            futures.append(producer.submit(lost if n % 2 else message(n), retry=False))
        # written last, so that all the others are in flight once its time is up
        producer.publish(message(500), timeout=0.3)
        assert producer.status().pending_confirms == 501
    for n, future in enumerate(futures):
        error = future.exception(LIMIT)
        if n % 2:
            assert isinstance(error, UnroutableError)
            assert (error.message_id, error.reply_code) == (f"lost{n}", 312)
        else:
            assert error is None
            assert future.result(0).message_id == f"m{n}"
    assert producer.flush(LIMIT) == 0
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(0, 501, 2)}


def test_frozen_in_the_middle(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A broker frozen for 2 s, less than the timeout, costs the wait: no loss, no duplicate."""
    producer = connect()
    burst = Burst(producer, threads=32, each=150)
    burst.journal.wait_for(1000, LIMIT)
    with rabbitmq_vhost.node.frozen():
        done, _ = wait(burst.calls, 2.0, return_when=FIRST_COMPLETED)
        assert not done
    longest = burst.finish()
    FIGURES["frozen for 2 s"] = f"longest publish {longest:.3f} s"
    assert burst.journal.count(Outcome.CONFIRMED) == len(burst.journal) == 32 * 150
    assert all(receipt.reason is None for receipt in burst.journal.receipts)
    account = settled(producer, burst.journal, rabbitmq_vhost.url)
    assert_nothing_lost(account)
    assert account.duplicates == 0


class FirstConfirm:
    """Hears when the producer's next message is confirmed."""

    def __init__(self, producer: MLProducer) -> None:
        self._armed = threading.Event()
        self._heard = threading.Event()
        producer.on("confirmed", self._hear)

    def _hear(self) -> None:
        if self._armed.is_set():
            self._heard.set()

    def restart(self, node: RabbitMQNode, producer: MLProducer) -> tuple[float, float]:
        """Restart a killed node: seconds from its port's opening to the first confirm.

        :returns: also the longest reconnect delay that was due then
        """
        settings = producer.settings
        node.launch()
        self._armed.set()
        node.wait_ready()
        watch = Stopwatch()
        failures = producer.status().reconnect_attempts
        step = min(settings.reconnect_initial_delay * 2**failures, settings.reconnect_max_delay)
        assert self._heard.wait(LIMIT)
        return watch.own(), step * (1 + settings.reconnect_jitter)


def test_killed_in_the_middle_of_publish(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_node: RabbitMQNode
) -> None:
    """Killed and restarted under 32 threads: what a call took over arrives, and in time."""
    producer = connect(reconnect_initial_delay=0.5, reconnect_max_delay=32.0)
    first_confirm = FirstConfirm(producer)
    burst = Burst(producer, threads=32, each=150)
    burst.journal.wait_for(1000, LIMIT)
    mortal_node.save_queues()  # they were declared a moment ago
    mortal_node.kill()
    recovery, due = first_confirm.restart(mortal_node, producer)
    longest = burst.finish()
    account = settled(producer, burst.journal, rabbitmq_vhost.url)
    FIGURES["killed under publish()"] = (
        f"longest publish {longest:.3f} s, first confirm {recovery:.2f} s after the port was open "
        f"(delay then due: {due:.2f} s), duplicates {account.duplicates} of {account.in_doubt} "
        f"in doubt"
    )
    assert_nothing_lost(account)
    assert account.in_doubt <= 32
    assert recovery < due + 1.0


def test_killed_in_the_middle_of_publish_many(
    rabbitmq_vhost: VirtualHost, connect: Connect, mortal_node: RabbitMQNode
) -> None:
    """Killed and restarted under publish_many: each result is true, and in its place."""
    producer = connect(reconnect_initial_delay=0.5, reconnect_max_delay=32.0)
    first_confirm = FirstConfirm(producer)
    half_taken = threading.Event()

    def tasks() -> Iterator[Message]:
        for n in range(6000):
            if n == 3000:
                half_taken.set()
            yield message(n)

    journal = Journal()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(producer.publish_many, tasks())
        assert half_taken.wait(LIMIT)
        mortal_node.save_queues()
        mortal_node.kill()
        recovery, due = first_confirm.restart(mortal_node, producer)
        answers = call.result(LIMIT)
    for n, answer in enumerate(answers):
        assert answer.message_id == f"m{n}"
        journal.note(f"m{n}", answer)
    account = settled(producer, journal, rabbitmq_vhost.url)
    FIGURES["killed under publish_many()"] = (
        f"first confirm {recovery:.2f} s after the port was open (delay then due: {due:.2f} s), "
        f"duplicates {account.duplicates} of {account.in_doubt} in doubt"
    )
    assert len(journal) == 6000
    assert_nothing_lost(account)
    assert account.in_doubt <= producer.settings.max_in_flight
    assert recovery < due + 1.0


@pytest.mark.parametrize("threads", [1, 32])
def test_speed(rabbitmq_vhost: VirtualHost, connect: Connect, threads: int) -> None:
    """A publish waits for the broker and for no timer of ours: it takes milliseconds."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    burst = Burst(producer, threads=threads, each=2000 if threads == 1 else 100)
    watch = Stopwatch()
    longest = burst.finish()
    took, own = watch.wall(), watch.own()
    rate = len(burst.journal) / took
    FIGURES[f"{threads} threads"] = f"{rate:,.0f} publishes/s, longest publish {longest:.3f} s"
    assert burst.journal.count(Outcome.CONFIRMED) == len(burst.journal)
    assert own < len(burst.journal) / 100  # Nagle and a delayed ack would make it 25 in a second


def test_speed_of_publish_many(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Pipelined, one thread passes some thousands a second, each message once."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    watch = Stopwatch()
    answers = producer.publish_many(message(n) for n in range(10_000))
    took, own = watch.wall(), watch.own()
    rate = len(answers) / took
    FIGURES["publish_many"] = f"{rate:,.0f} publishes/s"
    assert all(isinstance(each, Receipt) and each.reason is None for each in answers)
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(10_000)}
    assert own < 10.0
