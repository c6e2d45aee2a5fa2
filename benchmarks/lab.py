"""Where benchmarks are run: a broker of their own, the compiled C client, and how much of all.

The broker is started when the first benchmark wants one. A broker that the environment names is
used only if the queue, which is emptied over and over, is empty and has no consumer.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pika
from attrs import frozen

from benchmarks.contestants import native
from benchmarks.contestants.work import ROUTING_KEY
from benchmarks.harness import Contestant, Match, NativeContestant, Player, play
from mlproducer import Settings
from mlproducer.settings import topology_of
from mlproducer.testing import RabbitMQNode

OURS, C, C_HEADERS = "mlproducer", "C", "C, same headers"

MODULES = {
    OURS: ("ours", "mlproducer"),
    "pika": ("pika_blocking", "pika"),
    "pika select": ("pika_select", "pika"),
    "kombu": ("kombu_producer", "kombu"),
    "Celery": ("celery_app", "celery"),
    "Celery, installed": ("celery_installed", "celery"),
    "Celery, unconfirmed": ("celery_unconfirmed", "celery"),
    "aio-pika": ("aio_pika_client", "aio_pika"),
    "AMQPStorm": ("amqpstorm_client", "amqpstorm"),
}
"""Contestants by their names: the module, and the package that it needs."""


@frozen(kw_only=True)
class Scale:
    """How much is done.

    :ivar rounds: turns of each contestant
    :ivar seconds: of a turn, about
    :ivar quick: leave out what takes long
    """

    rounds: int
    seconds: float
    quick: bool = False


FULL = Scale(rounds=5, seconds=1.0)
QUICK = Scale(rounds=3, seconds=0.5, quick=True)


class QueueInUseError(RuntimeError):
    """The broker that the environment names is used for something else."""


class Lab:
    """One run's surroundings, as a context manager."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.notes: list[str] = []
        self._stack = ExitStack()
        self._broker: Broker | None = None
        self._program: Path | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def broker(self) -> Broker:
        """The broker, with the library's exchange and queues declared."""
        if self._broker is None:
            url = os.environ.get("RABBITMQ_URL", "").split(",")[0].strip()
            self._broker = self._stack.enter_context(given(url) if url else private())
        return self._broker

    @property
    def broker_name(self) -> str:
        """Which broker it was, for the table's caption."""
        return self._broker.name if self._broker is not None else "none"

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)

    def contest(
        self,
        names: Sequence[str],
        *,
        way: str,
        workers: int = 1,
        rounds: int | None = None,
        broker: Broker | None = None,
        **options: Any,
    ) -> Match:
        """Let contestants alternate; one that is not installed is left out, and said to be.

        :param broker: another than the lab's
        :param options: what the module of each of them takes besides
        """
        broker = broker or self.broker
        with ExitStack() as stack:
            players = []
            for name in names:
                contestant = self.contestant(name, workers=workers, url=broker.url, **options)
                if contestant is not None:
                    stack.enter_context(contestant)
                    players.append(Player(name, contestant, way, workers))
            return self.play(players, rounds, broker)

    def play(
        self, players: Sequence[Player], rounds: int | None = None, broker: Broker | None = None
    ) -> Match:
        """Let players alternate on a broker: the lab's, unless another is given."""
        return play(
            players,
            rounds=rounds or self.scale.rounds,
            seconds=self.scale.seconds,
            purge=(broker or self.broker).purge,
        )

    def contestant(
        self, name: str, *, workers: int = 1, url: str | None = None, **options: Any
    ) -> Contestant | None:
        """Give a contestant that is yet to be entered; nothing where it is not installed.

        :param url: another broker than the lab's
        :param options: what its module's ``Client`` takes besides
        """
        url = url or self.broker.url
        if name in (C, C_HEADERS):
            return self._native(name, url)
        module, package = MODULES[name]
        if find_spec(package) is None:
            self.note(f"{name} is left out: {package} is not installed")
            return None
        arguments = json.dumps({"url": url, "workers": workers, **options})
        return Contestant(name, [sys.executable, "-m", "benchmarks.contestants", module, arguments])

    def _native(self, name: str, url: str) -> Contestant | None:
        try:
            if self._program is None:
                directory = self._stack.enter_context(tempfile.TemporaryDirectory())
                self._program = native.build(Path(directory))
            command = native.command(self._program, url, headers=name == C_HEADERS)
            return NativeContestant(name, command)
        except native.NoCompilerError as error:
            self.note(f"the C client is left out: {error}")
            return None


class Broker:
    """A broker, and a connection by which its queue is emptied."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0
        self._connection = pika.BlockingConnection(parameters)
        self._channel = self._connection.channel()
        declare_topology(self._channel)

    def purge(self) -> None:
        """Empty the queue."""
        self._channel.queue_purge(ROUTING_KEY)

    def check_unused(self) -> None:
        """Refuse to empty a queue that the benchmarks have not made.

        :raises QueueInUseError: there are messages or consumers
        """
        found = self._channel.queue_declare(ROUTING_KEY, passive=True).method
        if found.message_count or found.consumer_count:
            raise QueueInUseError(
                f"the queue {ROUTING_KEY} of RABBITMQ_URL has messages or consumers, and would be "
                "emptied; give the benchmarks a virtual host of their own"
            )

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


def declare_topology(channel: Any) -> None:
    """Declare the library's exchange and queues, so that every contestant finds them."""
    for declaration in topology_of(Settings()).declarations("active"):
        getattr(channel, declaration.method)(**declaration.arguments)


@contextmanager
def private() -> Iterator[Broker]:
    """Start a node, and give it as a broker."""
    with RabbitMQNode() as node:
        version = node.eval("rabbit_misc:version()").strip('"')
        broker = Broker(f"RabbitMQ {version}, one node on the same machine", node.url)
        try:
            yield broker
        finally:
            broker.close()


@contextmanager
def given(url: str) -> Iterator[Broker]:
    """Use the broker that the environment names."""
    broker = Broker("the broker of RABBITMQ_URL", url)
    try:
        broker.check_unused()
        yield broker
    finally:
        broker.close()
