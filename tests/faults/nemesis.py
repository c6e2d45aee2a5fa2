"""A seeded nemesis, the threads it torments, and the account of what became of their messages.

The nemesis plays faults at random, one after the other, on a real node behind a proxy. Eight
threads publish meanwhile in every way there is. At the end each message is looked for.

Runs on: the nemesis on the test's thread; the threads that publish are its own.
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future

from attrs import define, field, frozen

from mlproducer import Message, MLProducer, Receipt
from mlproducer.errors import PublishError, RetriesExhaustedError
from mlproducer.observe.callbacks import Event
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.audit import Audit, Journal, drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from mlproducer.topology import ROUTING_KEYS
from tests.helpers import Background
from tests.stopwatch import Stopwatch

LIMIT = 120.0
EXCHANGE = "bookmarkai.ml"
DEAD_LETTERS = "ml.dead_letter"
THREADS = 8

LIGHT = {
    "freeze": 3,
    "rst": 6,
    "fin": 6,
    "half_close": 3,
    "hole": 4,
    "alarm": 4,
    "close_all_connections": 6,
    "unbind": 5,
}
"""Faults and their weights; those which leave the node running."""

ALL = {**LIGHT, "kill": 1, "stop": 1}

Place = tuple[RabbitMQNode, Proxy]


class Nemesis:
    """Plays faults, in a cluster each at a node and its proxy that it chooses.

    :ivar seed: of its choices
    :ivar played: how often each fault was
    """

    def __init__(self, vhost: VirtualHost, proxy: Proxy, seed: int, *more: Place) -> None:
        self._vhost = vhost
        self._places = [(vhost.node, proxy), *more]
        self.seed = seed
        self._random = random.Random(seed)
        self._roaming = random.Random(seed)
        self._never = threading.Event()
        self.played: Counter[str] = Counter()

    def play(self, faults: dict[str, int], seconds: float) -> None:
        """Play faults, with short rests between them, for about so long.

        The journal keeps every answer to the end. Were the collector to look through all of them
        again and again, it would hold up every thread for seconds: 2.4 s after 600,000 messages.
        """
        for node, _ in self._places:
            node.save_queues()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            [name] = self._random.choices(list(faults), list(faults.values()))
            self._node, self._proxy = self._roaming.choice(self._places)
            getattr(self, f"_{name}")()
            self.played[name] += 1
            self._rest(0.1, 0.6)
            gc.freeze()
        gc.unfreeze()

    def heal(self) -> None:
        """Let everything through again."""
        for _, proxy in self._places:
            proxy.heal()

    def _rest(self, shortest: float, longest: float) -> None:
        self._never.wait(self._random.uniform(shortest, longest))

    def _kill(self) -> None:
        self._node.kill()
        self._rest(0.0, 1.0)
        self._node.start()

    def _stop(self) -> None:
        self._node.stop()
        self._rest(0.0, 1.0)
        self._node.start()

    def _freeze(self) -> None:
        with self._node.frozen():
            self._never.wait(self._random.choice([0.3, 0.5, 1.0, 2.0, 8.0]))

    def _rst(self) -> None:
        self._proxy.reset()

    def _fin(self) -> None:
        self._proxy.fin()

    def _half_close(self) -> None:
        self._proxy.half_close()

    def _hole(self) -> None:
        """Swallow for a while; what was swallowed is missing, so those connections end."""
        self._proxy.hole(self._random.choice(["both", "c2s", "s2c"]))
        self._never.wait(self._random.choice([0.2, 0.5, 1.0, 9.0]))
        self._proxy.reset()
        self._proxy.heal()

    def _alarm(self) -> None:
        with self._node.memory_alarm():
            self._rest(0.1, 2.5)

    def _close_all_connections(self) -> None:
        self._node.close_all_connections()

    def _unbind(self) -> None:
        queue = self._random.choice(ROUTING_KEYS)
        with open_channel(self._vhost.url) as channel:
            channel.queue_unbind(queue, EXCHANGE, queue)
        self._never.wait(self._random.choice([0.2, 1.0, 6.0]))
        with open_channel(self._vhost.url) as channel:
            channel.queue_bind(queue, EXCHANGE, queue)


@define(eq=False)
class Victims:
    """Threads that publish, submit and publish many, until they are told to stop.

    :ivar longest: seconds of the longest publish() or submit()
    :ivar own: these without what threads waited for a CPU, all in all
    :ivar left: messages without a fate at the end
    :ivar reasons: why a message was deferred first, by its id
    """

    producer: MLProducer
    seed: int
    journal: Journal = field(factory=Journal)
    longest: float = 0.0
    own: float = 0.0
    left: int = 0
    reasons: dict[str, str] = field(factory=dict)
    _submitted: list[tuple[str, Future[Receipt]]] = field(factory=list)
    _over: threading.Event = field(factory=threading.Event)
    _calls: Background = field(factory=Background)
    _watch: Stopwatch = field(factory=Stopwatch)

    def start(self) -> None:
        """Start the threads."""
        self.producer.on("deferred", self._note_reason)
        for number in range(THREADS):
            self._calls.call(self._publish, number)

    def stop(self) -> None:
        """Let the threads end, and all that is ours find its fate."""
        self._over.set()
        self.longest = max(self._calls.gather(LIMIT))
        self.own = self.longest - self._watch.waited()
        self.left = self.producer.flush(LIMIT)
        for name, future in self._submitted:
            self.journal.note(name, _answer(name, future))

    def _note_reason(self, event: Event) -> None:
        self.reasons.setdefault(str(event.message_id), event.detail)

    def _publish(self, thread: int) -> float:
        dice = random.Random(f"{self.seed}-{thread}")
        longest = 0.0
        numbers = itertools.count()
        while not self._over.wait(0.02):
            name = f"{thread}-{next(numbers)}"
            retry = dice.random() < 0.75
            way = dice.choices([self._one, self._later, self._many], [60, 25, 15])[0]
            started = time.monotonic()
            way(name, dice.choice(ROUTING_KEYS), retry=retry)
            if way != self._many:
                longest = max(longest, time.monotonic() - started)
        return longest

    def _one(self, name: str, queue: str, *, retry: bool) -> None:
        self.journal.publish(self.producer, _message(name, queue), retry=retry)

    def _later(self, name: str, queue: str, *, retry: bool) -> None:
        try:
            future = self.producer.submit(_message(name, queue), retry=retry)
        except PublishError as error:
            self.journal.note(name, error)
        else:
            self._submitted.append((name, future))

    def _many(self, name: str, queue: str, *, retry: bool) -> None:
        names = [f"{name}-{n}" for n in range(20)]
        tasks = (_message(each, queue) for each in names)
        answers = self.producer.publish_many(tasks, retry=retry)
        for each, answer in zip(names, answers, strict=True):
            self.journal.note(each, answer)


def _message(name: str, queue: str) -> Message:
    return Message(body=b"x" * 200, routing_key=queue, message_id=name)


def _answer(name: str, future: Future[Receipt]) -> Receipt | PublishError:
    """Say of a submitted message what a publish would have said: a dead letter was ours."""
    error = future.exception(0)
    if error is None:
        return future.result(0)
    assert isinstance(error, PublishError)
    if isinstance(error, RetriesExhaustedError):
        return Receipt(name, error.attempts, 0.0, durable=False, reason=error, fate=future)
    return error


@frozen
class Decision:
    """What became of all messages.

    :ivar account: the journal against the queues and the dead letters
    :ivar undecided: ids that are ours, and neither confirmed nor dead letters
    :ivar buried: ids whose publisher was told that they are dead letters
    :ivar dead: copies of each id among the dead letters
    :ivar resent: writes on top of each message's first one
    :ivar in_flight: of these, the writes of messages that a loss or a nack has hit first
    :ivar unexplained: ids of which there are more copies than they were written
    """

    account: Audit
    undecided: frozenset[str]
    buried: frozenset[str]
    dead: Counter[str]
    resent: int
    in_flight: int
    unexplained: frozenset[str]


def failures(victims: Victims, url: str) -> Decision:
    """Look for each message in the queues and among the dead letters."""
    alive, dead = drain(url), drain(url, [DEAD_LETTERS])
    fates = {each.message_id: _fate(each) for each in victims.journal.receipts}
    written = {name: attempts for name, (_, attempts) in fates.items()}
    written |= {str(each.message_id): each.attempts for each in victims.journal.given_back}
    again = Counter({name: attempts - 1 for name, attempts in written.items() if attempts > 1})
    returned = {name for name, why in victims.reasons.items() if why == "UnroutableError"}
    # A dead letter stands beside the copies that earlier attempts may have left in the queue.
    only_dead = Counter({name: n for name, n in dead.items() if name not in alive})
    return Decision(
        account=victims.journal.check(alive + only_dead),
        undecided=frozenset(name for name, (fate, _) in fates.items() if fate == "undecided"),
        buried=frozenset(name for name, (fate, _) in fates.items() if fate == "buried"),
        dead=dead,
        resent=again.total(),
        in_flight=sum(n for name, n in again.items() if name not in returned),
        unexplained=frozenset(n for n, copies in alive.items() if copies > written.get(n, 0)),
    )


def _fate(receipt: Receipt) -> tuple[str, int]:
    """Say what became of a message that was ours, and after how many attempts."""
    try:
        settled = receipt.result(0)
    except RetriesExhaustedError as error:
        return "buried", error.attempts
    except TimeoutError:
        return "undecided", receipt.attempts
    return settled.outcome.name.lower(), settled.attempts
