"""What each call answered about its message, held against what arrived.

The check is that of Jepsen's total queue: a message that a call took must be found, or it is
*lost*; one that a call gave back as not sent must not be found, or it has *leaked*; none may be
found more often than it was written to the wire, or it is in *excess*.

Runs on: any number of threads write to a journal; `drain` is one consumer with a connection of its
own, on the caller's thread.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pika
from attrs import frozen

from mlproducer import MLProducer, Outcome, Receipt
from mlproducer._wire.encode import Task
from mlproducer.errors import PublishError
from mlproducer.topology import ROUTING_KEYS

__all__ = ["DRAIN_LIMIT", "Answer", "Audit", "Journal", "drain", "open_channel"]

Answer = Receipt | PublishError

DRAIN_LIMIT = 10.0
"""Seconds without a delivery after which a drain fails; a quorum queue may still elect a leader."""


@frozen
class Audit:
    """A journal held against what was found.

    :ivar lost: ids that a call took, and that were found nowhere
    :ivar leaked: ids that a call gave back as not sent, and that were found
    :ivar foreign: ids that were found, and that no call was about
    :ivar recovered: ids that a call gave back as possibly sent, and that were found
    :ivar excess: ids that were found more often than their message was written to the wire
    :ivar duplicates: copies beyond the first one of each message
    :ivar most: copies of the message that was found most often
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
    """The answers of calls, by message id."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}
        self._changed = threading.Condition()  # guards: _answers, longest
        self.longest = 0.0
        """Seconds that the longest `publish` took."""

    def __len__(self) -> int:
        return len(self._answers)

    def publish(
        self,
        producer: MLProducer,
        task: Task,
        *,
        timeout: float | None = None,
        retry: bool = True,
    ) -> Answer:
        """Publish a task, write the answer down and return it."""
        started = time.monotonic()
        try:
            answer: Answer = producer.publish(task, timeout=timeout, retry=retry)
        except PublishError as error:
            answer = error
        seconds = time.monotonic() - started
        with self._changed:
            self.longest = max(self.longest, seconds)
        return self.note(getattr(task, "message_id", None) or answer.message_id, answer)

    def note(self, message_id: str | None, answer: Answer) -> Answer:
        """Write down the answer of a call, and return it; each id has one call.

        An error that is about no message has no id.
        """
        with self._changed:
            key = message_id or f"call {len(self._answers)}"
            assert key not in self._answers, f"two calls published {key}"
            self._answers[key] = answer
            self._changed.notify_all()
        return answer

    def wait_for(self, n: int, timeout: float) -> None:
        """Wait until `n` calls have answered.

        :raises TimeoutError: they have not within `timeout` seconds
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._answers) >= n, timeout):
                raise TimeoutError(f"{len(self._answers)} of {n} calls have answered")

    @property
    def receipts(self) -> list[Receipt]:
        """The answers of the calls that took their message, in order."""
        return [each for each in self._all() if isinstance(each, Receipt)]

    @property
    def given_back(self) -> list[PublishError]:
        """The answers of the calls that gave their message back, in order."""
        return [each for each in self._all() if isinstance(each, PublishError)]

    def count(self, outcome: Outcome) -> int:
        """Count the receipts that have this outcome by now."""
        return sum(each.outcome is outcome for each in self.receipts)

    def check(self, found: Counter[str]) -> Audit:
        """Hold the journal against the copies of each id that were found."""
        given_back = {k: a for k, a in self._answers.items() if isinstance(a, PublishError)}
        taken = self._answers.keys() - given_back.keys()
        sent = {k for k, error in given_back.items() if error.possibly_sent}
        return Audit(
            lost=frozenset(taken - found.keys()),
            leaked=frozenset((given_back.keys() - sent) & found.keys()),
            foreign=frozenset(found.keys() - self._answers.keys()),
            recovered=frozenset(sent & found.keys()),
            excess=frozenset(k for k, a in self._answers.items() if found[k] > _written(a)),
            duplicates=found.total() - len(found),
            most=max(found.values(), default=0),
            in_doubt=sum(map(_in_doubt, self._answers.values())),
        )

    def _all(self) -> list[Answer]:
        with self._changed:
            return list(self._answers.values())


def _written(answer: Answer) -> float:
    """Return how often the message was written; infinite if another process may have written it."""
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


@contextmanager
def open_channel(url: str) -> Iterator[Any]:
    """Open a pika channel in confirm mode, on a connection of its own, for the block."""
    parameters = pika.URLParameters(url)
    parameters.blocked_connection_timeout = DRAIN_LIMIT
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def drain(url: str, queues: Iterable[str] = ROUTING_KEYS) -> Counter[str]:
    """Consume all messages of the queues, and count the copies of each message id.

    Each queue is read up to a marker that is published last, so the end needs no waiting.
    """
    found: Counter[str] = Counter()
    with open_channel(url) as channel:
        for queue in queues:
            found.update(_up_to_marker(channel, queue))
    return found


def _up_to_marker(channel: Any, queue: str) -> Iterator[str]:
    marker = f"marker-{uuid.uuid4()}"
    channel.basic_publish("", queue, b"", pika.BasicProperties(message_id=marker), mandatory=True)
    deliveries = channel.consume(queue, auto_ack=True, inactivity_timeout=DRAIN_LIMIT)
    for method, properties, _body in deliveries:
        if method is None:
            raise TimeoutError(f"queue {queue} does not deliver the marker")
        if properties.message_id == marker:
            break
        yield properties.message_id
    channel.cancel()
