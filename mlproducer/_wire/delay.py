"""Celery's native delayed delivery: a task that is due later waits in the broker.

There are 28 exchanges, ``celery_delayed_27`` to ``celery_delayed_0``, each with a queue whose
messages expire after 2 ** level seconds and go on to the next level (Celery's guide, *Using
RabbitMQ*, and ``kombu.transport.native_delayed_delivery``). A routing key begins with the seconds
to wait as 28 binary digits, one a level: a 1 leads through the level's queue, a 0 past it. What has
passed level 0 reaches the exchange ``celery_delayed_delivery`` and from there its own queue.

A worker holds a task with an ``eta`` that it gets too early, and with it a place among the messages
that it may hold; so the broker waits whole seconds, and the worker the rest of less than one.

Runs on: any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from attrs import evolve, frozen

from mlproducer.message import Envelope
from mlproducer.topology import Declaration, Topology

LEVELS = 28
MAX_SECONDS = 2**LEVELS - 1
"""Eight and a half years; what is due later waits with the worker for the rest."""

SLACK = 0.1
"""Seconds that a task may be late by, so that one due in 59.95 s does not wait for 59."""

_LEVEL_QUEUE = re.compile(r"(?:.*_)?celery_delayed_\d{1,2}", re.DOTALL)
_PREFIX = re.compile(r"(?:[01]\.){28}")
_ETA = re.compile(rb"\x03etaS\x00\x00\x00(.)", re.DOTALL)


def is_level(queue: str) -> bool:
    """Whether a queue is one in which delayed tasks wait, whatever prefix it has."""
    return _LEVEL_QUEUE.fullmatch(queue) is not None


@frozen
class Delays:
    """The delayed delivery to the quorum queues of one topology.

    :ivar exchange: what a topology's tasks are published to
    :ivar routing_keys: those that lead from there to a quorum queue
    :ivar prefix: what is before the names of the levels, so that environments that share a virtual
        host do not get each other's tasks; as in kombu
    """

    exchange: str
    routing_keys: frozenset[str]
    bindings: tuple[tuple[str, str], ...]
    prefix: str = ""

    @classmethod
    def of(cls, topology: Topology, prefix: str = "") -> Delays:
        """Give the delays of a topology; only a topic exchange passes on what was delayed."""
        quorum = [queue for queue in topology.queues if queue.quorum]
        bindings = [(queue.name, key) for queue in quorum for key in queue.routing_keys]
        if topology.exchange_type != "topic":
            bindings = []
        return cls(
            topology.exchange,
            frozenset(key for _, key in bindings),
            tuple(bindings),
            f"{prefix}_" if prefix else "",
        )

    @property
    def entry(self) -> str:
        """The exchange to which a delayed task is published."""
        return self._level(LEVELS - 1)

    def address(self, exchange: str, routing_key: str, seconds: float) -> tuple[str, str]:
        """Give the exchange and routing key of a task that is due in so many seconds."""
        whole = min(int(seconds + SLACK), MAX_SECONDS)
        if whole < 1 or exchange != self.exchange or routing_key not in self.routing_keys:
            return exchange, routing_key
        delayed = f"{'.'.join(f'{whole:0{LEVELS}b}')}.{routing_key}"
        # A longer key does not fit: its task waits with the worker.
        return (self.entry, delayed) if len(delayed.encode()) <= 255 else (exchange, routing_key)

    def is_ours(self, envelope: Envelope) -> bool:
        """Whether a message is one that was addressed here, with a delay."""
        return (
            envelope.exchange == self.entry
            and _PREFIX.sub("", envelope.routing_key, count=1) in self.routing_keys
        )

    def again(self, envelope: Envelope, now: datetime, *, usable: bool) -> Envelope:
        """Address a delayed message by what is left of its delay.

        :param usable: whether the exchanges are there; otherwise it goes to its queue at once, and
            waits with the worker
        """
        if envelope.exchange != self.entry:
            return envelope
        plain = _PREFIX.sub("", envelope.routing_key, count=1)
        if plain not in self.routing_keys:
            return _shortened(envelope, plain, now)
        due = _eta(envelope.properties) if usable else None
        seconds = 0.0 if due is None else (due - now).total_seconds()
        exchange, routing_key = self.address(self.exchange, plain, seconds)
        return evolve(envelope, exchange=exchange, routing_key=routing_key)

    def declarations(self) -> Iterator[Declaration]:
        """Give all that is to be declared, with the arguments with which Celery's workers do."""
        for level in range(LEVELS - 1, -1, -1):
            name = self._level(level)
            yield _exchange(name)
            arguments = {
                "x-queue-type": "quorum",
                "x-overflow": "reject-publish",
                "x-message-ttl": 2**level * 1000,
                "x-dead-letter-exchange": self._level(level - 1) if level else self._delivery,
                "x-dead-letter-strategy": "at-least-once",
            }
            yield Declaration(
                "queue_declare", {"queue": name, "durable": True, "arguments": arguments}
            )
            yield Declaration(
                "queue_bind",
                {"queue": name, "exchange": name, "routing_key": self._pattern(level, "1")},
            )
        yield _exchange(self._delivery)
        for level in range(LEVELS - 1, -1, -1):
            following = self._level(level - 1) if level else self._delivery
            yield _exchange_bind(following, self._level(level), self._pattern(level, "0"))
        for queue, key in self.bindings:
            pattern = key if key.startswith("#") else f"#.{key}"
            yield _exchange_bind(self.exchange, self._delivery, pattern)
            yield Declaration(
                "queue_bind", {"queue": queue, "exchange": self.exchange, "routing_key": pattern}
            )

    def passive(self) -> Iterator[Declaration]:
        """Give what tells whether another program has declared it."""
        for name in (self.entry, self._delivery):
            yield Declaration("exchange_declare", {"exchange": name, "passive": True})

    @property
    def _delivery(self) -> str:
        return f"{self.prefix}celery_delayed_delivery"

    def _level(self, level: int) -> str:
        return f"{self.prefix}celery_delayed_{level}"

    def _pattern(self, level: int, digit: str) -> str:
        return "*." * (LEVELS - 1 - level) + f"{digit}.#"


def _shortened(envelope: Envelope, plain: str, now: datetime) -> Envelope:
    """Address a message that was delayed elsewhere, by Celery say, by what is left of its delay.

    What is overdue goes past all levels. Without a date that can be read it is left as it is.
    """
    due = _eta(envelope.properties)
    if due is None or due.tzinfo is None or plain == envelope.routing_key:
        return envelope
    left = max(0, int((due - now).total_seconds() + SLACK))
    before = int(envelope.routing_key[: 2 * LEVELS].replace(".", ""), 2)
    if left >= before:
        return envelope
    return evolve(envelope, routing_key=f"{'.'.join(f'{left:0{LEVELS}b}')}.{plain}")


def _exchange(name: str) -> Declaration:
    return Declaration(
        "exchange_declare", {"exchange": name, "exchange_type": "topic", "durable": True}
    )


def _exchange_bind(destination: str, source: str, pattern: str) -> Declaration:
    return Declaration(
        "exchange_bind", {"destination": destination, "source": source, "routing_key": pattern}
    )


def _eta(properties: bytes) -> datetime | None:
    """Read the header ``eta`` out of encoded properties, whose form is our own."""
    found = _ETA.search(properties)
    if found is None:
        return None
    start = found.end()
    try:
        return datetime.fromisoformat(properties[start : start + found[1][0]].decode())
    except ValueError:
        return None
