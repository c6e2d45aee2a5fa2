"""Celery's native delayed delivery: a task that is due later waits in the broker.

There are 28 exchanges, ``celery_delayed_27`` to ``celery_delayed_0``, each with a queue whose
messages expire after 2 ** level seconds and go on to the next level (Celery's guide, *Using
RabbitMQ*, and ``kombu.transport.native_delayed_delivery``). A routing key begins with the seconds
to wait as 28 binary digits, one for each level: a 1 leads through the level's queue, a 0 past it.
After level 0 a message reaches the exchange ``celery_delayed_delivery``, and from there its queue.

A worker holds a task that it gets before its ``eta``, and the task counts towards its prefetch
limit. So the broker waits the whole seconds, and the worker the rest of less than one.

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
"""Eight and a half years; the worker waits the rest of a longer delay."""

SLACK = 0.1
"""Seconds that a task may be late by, so that one due in 59.95 s does not wait for 59."""

_LEVEL_QUEUE = re.compile(r"(?:.*_)?celery_delayed_\d{1,2}", re.DOTALL)
_PREFIX = re.compile(r"(?:[01]\.){28}")
_ETA = re.compile(rb"\x03etaS\x00\x00\x00(.)", re.DOTALL)


def is_level(queue: str) -> bool:
    """Return whether a queue is one of the levels, with any prefix."""
    return _LEVEL_QUEUE.fullmatch(queue) is not None


@frozen
class Delays:
    """The delayed delivery to the quorum queues of one topology.

    :ivar exchange: the exchange of the topology
    :ivar routing_keys: those that lead from it to a quorum queue
    :ivar prefix: before the names of the levels, as in kombu, so that environments that share a
        virtual host do not get each other's tasks
    """

    exchange: str
    routing_keys: frozenset[str]
    bindings: tuple[tuple[str, str], ...]
    prefix: str = ""

    @classmethod
    def of(cls, topology: Topology, prefix: str = "") -> Delays:
        """Return the delays of a topology; only a topic exchange routes delayed messages."""
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
        """Return the exchange and routing key for a task that is due in so many seconds."""
        whole = min(int(seconds + SLACK), MAX_SECONDS)
        if whole < 1 or exchange != self.exchange or routing_key not in self.routing_keys:
            return exchange, routing_key
        delayed = f"{'.'.join(f'{whole:0{LEVELS}b}')}.{routing_key}"
        # AMQP has no longer routing keys: then the worker waits.
        return (self.entry, delayed) if len(delayed.encode()) <= 255 else (exchange, routing_key)

    def is_ours(self, envelope: Envelope) -> bool:
        """Return whether a message was addressed by `address`, with a delay."""
        return (
            envelope.exchange == self.entry
            and _PREFIX.sub("", envelope.routing_key, count=1) in self.routing_keys
        )

    def again(self, envelope: Envelope, now: datetime, *, usable: bool) -> Envelope:
        """Return a delayed message, addressed by what is left of its delay.

        :param usable: whether the exchanges exist; otherwise the message goes to its queue at once,
            and the worker waits
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
        """Yield all declarations, with the same arguments as Celery's workers."""
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
        """Yield passive declarations that show whether another program declared the levels."""
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
    """Return a message that another program delayed, addressed by what is left of its delay.

    An overdue message goes past all levels. Without an eta that can be read it is unchanged.
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
    """Find the header ``eta`` in properties that this library encoded."""
    found = _ETA.search(properties)
    if found is None:
        return None
    start = found.end()
    try:
        return datetime.fromisoformat(properties[start : start + found[1][0]].decode())
    except ValueError:
        return None
