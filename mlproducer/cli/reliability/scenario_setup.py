"""A scenario's broker, producers and proxies, and the journal of what calls answered.

The broker is a private node; or the one in RABBITMQ_URL, on which nothing is declared, and nothing
published but probes that come back (see `mlproducer.cli.connectivity`).

Runs on: the main thread; `ScenarioSetup.traffic` publishes on threads ``reliability``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attrs import evolve

from mlproducer import Message, MLProducer, Receipt, Settings
from mlproducer.cli import connectivity
from mlproducer.cli.reliability.figures import Figures
from mlproducer.cli.reliability.scenario import Need, UnexpectedError, expect, wait_until
from mlproducer.dead_letters import DeadLetters
from mlproducer.errors import PublishError
from mlproducer.observe.callbacks import EventName
from mlproducer.testing import Proxy, RabbitMQError, RabbitMQNode
from mlproducer.testing.audit import Journal

TIMERS: dict[str, Any] = {
    "connection_timeout": 1.0,
    "publish_timeout": 1.0,
    "message_retry_base_delay": 0.3,
    "retry_sweep_interval": 0.2,
    "circuit_breaker_cooldown": 1.0,
    "reconnect_initial_delay": 0.1,
    "reconnect_max_delay": 0.5,
    "max_reconnect_attempts": 100,
}
"""Shortened, so that a fault and its end fit into seconds; a connection is back within `BACK`."""

BACK = 3.0
"""Seconds within which a connection must be there again once the broker can be reached."""

CONNECTING = 10.0
SETTLING = 20.0
"""Seconds in which taken messages must arrive, once the faults are over."""

QUEUES = ("ml.embed", "ml.summarize_local", "ml.transcribe")
DEAD_LETTERS = "ml.dead_letter"
PREFETCH = 1000

PUBLISHERS = 8
PACE = 0.01
"""Seconds between two messages of a publisher."""

UNDER_WAY = 40
"""Messages that were taken before a fault begins."""


class ScenarioSetup:
    """The set-up of one scenario; everything ends with the ``with`` block.

    :param settings: of the broker that is used; ``None`` starts a private node
    """

    def __init__(self, settings: Settings | None) -> None:
        self.private = settings is None
        self.journal = Journal()
        self._settings = settings or Settings()
        self._stack = contextlib.ExitStack()
        self._node: RabbitMQNode | None = None
        self._shared: MLProducer | None = None

    def __enter__(self) -> ScenarioSetup:
        with contextlib.ExitStack() as stack:
            if self.private:
                self._node = stack.enter_context(RabbitMQNode())
                self._settings = Settings(url=self._node.url)
            else:  # amq.topic is on every broker; nothing is bound to a probe's key
                self._settings = evolve(
                    self._settings, exchange="amq.topic", declare_topology="off"
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def node(self) -> RabbitMQNode:
        """The private node."""
        if self._node is None:
            raise RabbitMQError("there is no private node")
        return self._node

    @property
    def url(self) -> str:
        """The broker's address, which holds a password."""
        return str(self._settings.url)

    def lacks(self, need: Need) -> bool:
        """Whether a trial with this need must be skipped."""
        if need is Need.NODE:
            return not self.private
        return need is Need.PATH and any(broker.tls for broker in self._settings.brokers)

    # --- parts ---------------------------------------------------------------------------------

    def producer(self, url: str | None = None, **settings: Any) -> MLProducer:
        """Make a producer with shortened timers, connected; it is closed at the end.

        :raises UnexpectedError: it does not connect
        """
        producer = MLProducer(evolve(self._settings, url=url or self.url, **TIMERS, **settings))
        self._stack.callback(producer.close, 0.0)
        if not producer.wait_connected(CONNECTING):
            raise UnexpectedError(f"no connection within {CONNECTING:.0f} s")
        return producer

    def shared(self) -> MLProducer:
        """Return the producer that trials share."""
        if self._shared is None:
            self._shared = self.producer()
        return self._shared

    def proxy(self) -> Proxy:
        """Make a proxy in front of the broker."""
        broker = self._settings.brokers[0]
        return self._stack.enter_context(Proxy((broker.host, broker.port)))

    def through(self, proxy: Proxy) -> str:
        """Return the broker's address behind a proxy."""
        return proxy.url(self.url.partition(",")[0].strip())

    def events(self, producer: MLProducer, name: EventName) -> queue.SimpleQueue[Any]:
        """Collect a producer's events of one name from now on."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        producer.on(name, events.put)
        return events

    # --- messages ------------------------------------------------------------------------------

    def message(self, routing_key: str = QUEUES[0]) -> Message:
        """Make a message with an id of its own."""
        return Message(body=b"x" * 1000, routing_key=routing_key, message_id=str(uuid.uuid4()))

    def check(self, producer: MLProducer) -> None:
        """Check that a message gets through; on a broker that is not private, a probe.

        :raises UnexpectedError: it does not get through
        """
        if self.private:
            answer = self.journal.publish(producer, self.message())
            error = None if isinstance(answer, Receipt) else answer
        else:
            answer, error = None, connectivity.probe(producer, CONNECTING)
        if error is not None:
            raise UnexpectedError(f"{type(error).__name__}: {error}")
        if isinstance(answer, Receipt):
            answer.result(SETTLING)

    def publish_at_once(self, producer: MLProducer, count: int, **options: Any) -> list[Any]:
        """Publish from ``count`` threads at once, and return the answers."""
        with ThreadPoolExecutor(count, "reliability") as pool:
            futures = [
                pool.submit(self.journal.publish, producer, self.message(), **options)
                for _ in range(count)
            ]
            return [future.result(SETTLING) for future in futures]

    @contextlib.contextmanager
    def traffic(self, producer: MLProducer) -> Iterator[None]:
        """Publish from several threads during the block, which begins once messages flow."""
        stop = threading.Event()

        def publish() -> None:
            while not stop.wait(PACE):
                self.journal.publish(producer, self.message())

        if not self.private:
            yield
            return
        enough = len(self.journal.receipts) + UNDER_WAY
        with ThreadPoolExecutor(PUBLISHERS, "reliability") as pool:
            publishers = [pool.submit(publish) for _ in range(PUBLISHERS)]
            try:
                wait_until(lambda: len(self.journal.receipts) >= enough, CONNECTING, "under way")
                yield
            finally:
                stop.set()
            for publisher in publishers:
                publisher.result(SETTLING)

    # --- the account ---------------------------------------------------------------------------

    def copies(self, *queues: str) -> Counter[str]:
        """Count the copies of each message id in queues of the private node."""
        found: Counter[str] = Counter()
        for name in queues or QUEUES:
            if self.node.queue_depth("/", name):  # waits for a leader, without which it looks empty
                box = DeadLetters(evolve(self._settings, prefetch=PREFETCH), name)
                found.update(letter.message_id for letter in box.list())
        return found

    def figures(self) -> Figures:
        """Wait for taken messages to arrive, and return the figures."""
        if not (self.private and self.journal.receipts):
            return Figures()
        with contextlib.suppress(UnexpectedError):  # the figures will show what is missing
            wait_until(self._settled, SETTLING, "all settled")
        return Figures.of(self.journal, self.copies(), self.copies(DEAD_LETTERS))

    def _settled(self) -> bool:
        return all(_decided(receipt) for receipt in self.journal.receipts)

    def once(self, message_ids: set[str]) -> str:
        """Check that each of these messages is in its queue exactly once.

        :raises UnexpectedError: one is not
        """
        copies = self.copies()
        once = sum(copies[each] == 1 for each in message_ids)
        return expect(once == len(message_ids), f"{once} of {len(message_ids)} there exactly once")


def _decided(receipt: Receipt) -> bool:
    try:
        receipt.result(0.0)
    except PublishError:
        return True  # the figures will show where it went
    except TimeoutError:
        return False
    return True
