"""Threads that publish while a fault is played, and the account that is drawn up afterwards.

Runs on: the tests' threads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import TracebackType

from attrs import define, field

from mlproducer import Message, MLProducer, Outcome
from mlproducer.testing.audit import Audit, Journal, drain
from mlproducer.topology import ROUTING_KEYS
from tests.helpers import Background
from tests.stopwatch import Stopwatch

LIMIT = 120.0
"""Seconds after which a test stops waiting for what ought to come."""

SLACK = 0.25
"""Seconds that a publish may take on top of its timeout."""

FOUND = 10.5
"""Seconds within which a silent broker is found out, with traffic."""

FIGURES: dict[str, str] = {}
"""What was measured, in words, by the fault."""

MakeMessage = Callable[[int], Message]


def to_each_queue(number: int) -> Message:
    """A message with an id of its own, to the queues in turn."""
    routing_key = ROUTING_KEYS[number % len(ROUTING_KEYS)]
    return Message(body=b"x" * 200, routing_key=routing_key, message_id=f"m{number}")


@define(eq=False)
class Traffic:
    """Threads that publish, as a context manager; every fourth message is one without a retry.

    :ivar pause: seconds of each thread between two calls, so that an outage does not flood
    :ivar longest: seconds of the longest call
    :ivar own: these without what threads waited for a CPU, all in all
    """

    producer: MLProducer
    threads: int = 16
    pause: float = 0.005
    make: MakeMessage = to_each_queue
    journal: Journal = field(factory=Journal)
    longest: float = 0.0
    own: float = 0.0
    _numbers: itertools.count[int] = field(factory=itertools.count)
    _over: threading.Event = field(factory=threading.Event)
    _calls: Background = field(factory=Background)
    _watch: Stopwatch = field(factory=Stopwatch)

    def __enter__(self) -> Traffic:
        for _ in range(self.threads):
            self._calls.call(self._publish)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self.longest = max(self._calls.gather(LIMIT))
        self.own = self.longest - self._watch.waited()

    def more(self, n: int) -> None:
        """Wait until so many further calls have spoken."""
        self.journal.wait_for(len(self.journal) + n, LIMIT)

    def last(self, seconds: float) -> None:
        """Let it go on for so long."""
        assert not self._over.wait(seconds)

    def _publish(self) -> float:
        longest = 0.0
        while not self._over.wait(self.pause):
            number = next(self._numbers)
            started = time.monotonic()
            self.journal.publish(self.producer, self.make(number), retry=number % 4 != 0)
            longest = max(longest, time.monotonic() - started)
        return longest


def balance(traffic: Traffic, url: str) -> Audit:
    """Let everything that is ours arrive, and check that nothing is lost, leaked or unexplained.

    A further copy is explained where the message was written once more.
    """
    journal = traffic.journal
    assert traffic.producer.flush(LIMIT) == 0
    assert journal.count(Outcome.DEFERRED) == 0
    account = journal.check(drain(url))
    assert account.lost == account.leaked == account.foreign == account.excess == frozenset()
    return account


def tell(fault: str, traffic: Traffic, account: Audit, more: str = "") -> None:
    """Write down the figures of one fault."""
    FIGURES[fault] = (
        f"{len(traffic.journal)} messages, 0 lost, {account.duplicates} duplicates of "
        f"{account.in_doubt} in doubt, longest publish {traffic.longest:.3f} s{more}"
    )
