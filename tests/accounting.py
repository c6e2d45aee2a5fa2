"""What each call said of its message, what the broker then held, and whether the two agree.

The check is that of Jepsen's total queue: what a call took over must be found (else it is *lost*),
what a call gave back as not sent must not be found (else it is *leaked*), and no message may be
found more often than it was written to the wire (else it is in *excess*). Any number of threads may
write the journal; the drain is one consumer with a connection of its own.

Runs on: the tests' threads.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pika
from attrs import frozen
from pika.adapters.blocking_connection import BlockingChannel

from mlproducer import Message, MLProducer, Outcome, Receipt
from mlproducer.errors import PublishError
from mlproducer.topology import ROUTING_KEYS

Answer = Receipt | PublishError

DRAIN_LIMIT = 10.0
"""Seconds without a delivery after which a drain is given up; a quorum queue may still elect."""


@contextmanager
def open_channel(url: str) -> Iterator[BlockingChannel]:
    """Give a channel in confirm mode on a connection of its own."""
    parameters = pika.URLParameters(url)
    parameters.blocked_connection_timeout = DRAIN_LIMIT
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def drain(url: str, queues: Iterable[str] = ROUTING_KEYS) -> Counter[str]:
    """Take everything out of the queues and count the copies of each message id.

    Each queue is read up to a marker that is published last, so that the end needs no waiting.
    """
    found: Counter[str] = Counter()
    with open_channel(url) as channel:
        for queue in queues:
            found.update(_up_to_marker(channel, queue))
    return found


def _up_to_marker(channel: BlockingChannel, queue: str) -> Iterator[str]:
    marker = f"marker-{uuid.uuid4()}"
    channel.basic_publish("", queue, b"", pika.BasicProperties(message_id=marker), mandatory=True)
    deliveries = channel.consume(queue, auto_ack=True, inactivity_timeout=DRAIN_LIMIT)
    for method, properties, _body in deliveries:
        if method is None:
            raise TimeoutError(f"queue {queue} does not give the marker")
        if properties.message_id == marker:
            break
        yield properties.message_id
    channel.cancel()


@frozen
class Account:
    """The journal held against what was found.

    :ivar lost: ids that a call took over, found nowhere
    :ivar leaked: ids that a call gave back as not sent, found all the same
    :ivar foreign: ids found of which no call spoke
    :ivar recovered: ids that a call gave back as possibly sent, and found
    :ivar excess: ids found more often than their message was written to the wire
    :ivar duplicates: copies on top of each first one
    :ivar most: the copies of the message that was found most often
    :ivar in_doubt: calls whose answer was that the message may have been sent
    """

    lost: frozenset[str]
    leaked: frozenset[str]
    foreign: frozenset[str]
    recovered: frozenset[str]
    excess: frozenset[str]
    duplicates: int
    most: int
    in_doubt: int


class Journal:
    """What the calls said, by message id."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}
        self._grown = threading.Condition()  # guards: _answers

    def __len__(self) -> int:
        return len(self._answers)

    def publish(
        self,
        producer: MLProducer,
        message: Message,
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Answer:
        """Publish, and write down what the call said."""
        try:
            answer: Answer = producer.publish(message, timeout=timeout, retry=retry)
        except PublishError as error:
            answer = error
        self.note(str(message.message_id), answer)
        return answer

    def note(self, message_id: str, answer: Answer) -> None:
        """Write down the answer of a call; each id has one call."""
        with self._grown:
            assert message_id not in self._answers, f"two calls published {message_id}"
            self._answers[message_id] = answer
            self._grown.notify_all()

    def wait_for(self, n: int, timeout: float) -> None:
        """Wait until `n` calls have spoken.

        :raises TimeoutError: they have not within `timeout` seconds
        """
        with self._grown:
            if not self._grown.wait_for(lambda: len(self._answers) >= n, timeout):
                raise TimeoutError(f"{len(self._answers)} of {n} calls have spoken")

    @property
    def receipts(self) -> list[Receipt]:
        """The answers of the calls that took their message over."""
        return [each for each in self._answers.values() if isinstance(each, Receipt)]

    @property
    def given_back(self) -> list[PublishError]:
        """The answers of the calls that gave their message back."""
        return [each for each in self._answers.values() if isinstance(each, PublishError)]

    def count(self, outcome: Outcome) -> int:
        """Count the calls that returned with this outcome, as it now stands."""
        return sum(each.outcome is outcome for each in self.receipts)

    def check(self, found: Counter[str]) -> Account:
        """Hold the journal against what was found."""
        given_back = {k: a for k, a in self._answers.items() if isinstance(a, PublishError)}
        ours = self._answers.keys() - given_back.keys()
        sent = {k for k, error in given_back.items() if error.possibly_sent}
        return Account(
            lost=frozenset(ours - found.keys()),
            leaked=frozenset((given_back.keys() - sent) & found.keys()),
            foreign=frozenset(found.keys() - self._answers.keys()),
            recovered=frozenset(sent & found.keys()),
            excess=frozenset(k for k, a in self._answers.items() if found[k] > _written(a)),
            duplicates=found.total() - len(found),
            most=max(found.values(), default=0),
            in_doubt=sum(map(_in_doubt, self._answers.values())),
        )


def _written(answer: Answer) -> float:
    """Say how often the message was written; without a bound where another process had it."""
    if isinstance(answer, PublishError):
        return answer.attempts
    try:
        return answer.result(0.0).attempts
    except PublishError as error:
        return error.attempts
    except TimeoutError:
        return math.inf


def _in_doubt(answer: Answer) -> bool:
    error = answer.reason if isinstance(answer, Receipt) else answer
    return error is not None and error.possibly_sent
