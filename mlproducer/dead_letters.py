"""Dead letters: look at them, send them again, throw them away.

They lie in the dead-letter queue and, until the broker has taken them there, in the store of the
producers. A letter is deleted only once the broker has confirmed its copy; one that cannot be sent
stays a dead letter. Whoever is killed in between leaves a letter twice at most, never none.

Runs on: the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from typing import Protocol

from attrs import evolve, frozen

from mlproducer._engine.dead_letter_reader import DeadLetterReader, Letter, stored_letter
from mlproducer._engine.endpoints import Endpoints
from mlproducer._engine.session import Session
from mlproducer.errors import (
    AuthenticationError,
    InvalidMessageError,
    NotConnectedError,
    PublishError,
    StoreError,
)
from mlproducer.message import Message
from mlproducer.producer import MLProducer
from mlproducer.settings import Settings
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Change, Row, Store
from mlproducer.topology import Topology

__all__ = ["DeadLetters", "Letter", "Place", "StoredDeadLetters", "Target", "places"]

Wanted = Collection[str] | Callable[[Letter], bool] | None
"""Message ids, or what says yes to a letter; ``None`` means all."""

Page = list[tuple[Row, Letter]]
Fate = tuple[Letter, PublishError | None]
Told = Callable[[Letter, PublishError | None], object]

_NEVER = 1_000_000
"""A breaker's threshold: one full queue must not keep the letters of the others."""

_QUICK = 1.0
"""Seconds within which a connection is usually there, so that no claim has to wait for it."""

_NO_BROKER = (NotConnectedError, AuthenticationError)


@frozen
class Target:
    """Where letters are sent instead of where they were to go; ``None`` leaves it as it was."""

    exchange: str | None = None
    routing_key: str | None = None

    def applied(self, message: Message) -> Message:
        """Give a message this address."""
        return evolve(
            message,
            exchange=message.exchange if self.exchange is None else self.exchange,
            routing_key=message.routing_key if self.routing_key is None else self.routing_key,
        )


def _tell_nobody(_letter: Letter, _error: PublishError | None) -> None:
    pass


class Place(Protocol):
    """Where dead letters lie."""

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters, one by one."""

    def replay(
        self, wanted: Wanted = None, told: Told = _tell_nobody, target: Target | None = None
    ) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :param told: called for each letter, with the error if it stays
        :param target: where to send them instead
        """

    def purge(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Delete letters for good, and give how many.

        :param told: called for each letter, with the error if it stays
        """


def places(settings: Settings) -> list[Place]:
    """Give the places that the settings name.

    The store comes first: letters go from there to the queue, so that none is overlooked by whoever
    looks into both.
    """
    queue = DeadLetters(settings)
    if settings.store_url.startswith("memory:"):
        return [queue]
    return [StoredDeadLetters(settings), queue]


class DeadLetters:
    """The dead letters in a queue of the broker that the settings name.

    Every method opens a connection of its own, and takes ``settings.prefetch`` letters at a time.

    :param queue: where they lie; ``None`` is the library's own dead-letter queue
    :raises NotConnectedError: by every method: no broker answers; the text says why
    """

    def __init__(self, settings: Settings, queue: str | None = None) -> None:
        topology = Topology.of(settings)
        self._settings = settings
        self._queue = topology.dead_letter_queue if queue is None else queue
        self._dead_end = _DeadEnd(topology.dead_letter_exchange, self._queue)

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters; they are held back from everybody else until the last was asked for."""
        with self._open() as box:
            for batch in box.take():
                yield from _chosen(batch, wanted)

    def replay(
        self, wanted: Wanted = None, told: Told = _tell_nobody, target: Target | None = None
    ) -> int:
        """Send letters to where they were to go, and give how many had to stay."""
        stayed = 0
        with self._open() as box, _producer(self._settings) as producer:
            for batch in box.take():
                for letter, error in self._dead_end.republish(
                    producer, _chosen(batch, wanted), target
                ):
                    if error is None:
                        box.ack(letter)
                    stayed += error is not None
                    told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Delete letters for good, and give how many."""
        purged = 0
        with self._open() as box:
            for batch in box.take():
                for letter in _chosen(batch, wanted):
                    box.ack(letter)
                    purged += 1
                    told(letter, None)
        return purged

    def _open(self) -> DeadLetterReader:
        session = Session(Endpoints(self._settings).routes, self._settings.connection_timeout)
        return DeadLetterReader(session, self._queue, self._settings.prefetch)


class StoredDeadLetters:
    """The dead letters in the store that the settings name, whichever process wrote them.

    A letter that another process has claimed is left alone, and stays with a `StoreError`: that
    may be a producer which is just sending it to the queue.

    :raises StoreError: by every method: the store cannot be used; the text names it
    :raises ConfigurationError: by every method: the store's URL does not parse
    """

    def __init__(self, settings: Settings) -> None:
        topology = Topology.of(settings)
        self._settings = settings
        self._dead_end = _DeadEnd(topology.dead_letter_exchange, topology.dead_letter_queue)

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters, also those that somebody has claimed."""
        with self._open() as store:
            for page in self._pages(store, wanted):
                for _, letter in page:
                    yield letter

    def replay(
        self, wanted: Wanted = None, told: Told = _tell_nobody, target: Target | None = None
    ) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :raises NotConnectedError: no broker answers; those not tried yet are left alone
        :raises AuthenticationError: it lets nobody in
        """
        stayed = 0
        with self._open() as store, _producer(self._settings) as producer:
            producer.wait_connected(_QUICK)
            for page in self._pages(store, wanted):
                for letter, error in self._send(store, producer, page, target):
                    stayed += error is not None
                    told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Delete letters for good, and give how many."""
        purged = 0
        with self._open() as store:
            for page in self._pages(store, wanted):
                held, busy = _seize(store, page)
                store.done([row.claim for row, _ in held])
                purged += len(held)
                fates: list[Fate] = [(letter, None) for _, letter in held]
                for letter, error in [*fates, *busy]:
                    told(letter, error)
        return purged

    def _open(self) -> closing[Store]:
        store = open_store(self._settings)
        if self._settings.store_url.startswith("sqlite:") and not os.path.lexists(store.name):
            # An operator's typing error must not make a file, least of all as root.
            raise StoreError(f"the store {store.name} is not there: no producer has used it yet")
        return closing(store)

    def _pages(self, store: Store, wanted: Wanted) -> Iterator[Page]:
        last = 0
        # No more than may be in flight together: what is claimed must not wait for its turn.
        most = min(self._settings.prefetch, self._settings.max_in_flight)
        while rows := store.letters(most, last):
            last = rows[-1].claim.key
            letters = [(row, stored_letter(row.record.envelope)) for row in rows]
            yield [each for each in letters if _is_wanted(each[1], wanted)]

    def _send(
        self, store: Store, producer: MLProducer, page: Page, target: Target | None
    ) -> Iterator[Fate]:
        """Send a page of letters; what becomes of them is noted before it is told."""
        held, busy = _seize(store, page)
        yield from busy
        limit = min(self._settings.publish_timeout, store.lease / 2)  # while it is surely ours
        fates = list(
            self._dead_end.republish(producer, [letter for _, letter in held], target, limit)
        )
        noted = list(zip((row for row, _ in held), (error for _, error in fates), strict=True))
        try:
            store.done([row.claim for row, error in noted if error is None])
        except StoreError as error:
            yield from ((letter, error) for letter, _ in fates)
            raise
        try:
            back = [Change(row.claim, row.record, 0.0) for row, error in noted if error is not None]
            store.release(back)
        except StoreError:  # those come back by themselves; the others are gone nevertheless
            yield from fates
            raise
        yield from fates
        for _, fate in fates:
            if isinstance(fate, _NO_BROKER):
                raise fate


def _seize(store: Store, page: Page) -> tuple[Page, list[Fate]]:
    """Claim letters; those that are another's get an error."""
    held: Page = []
    busy: list[Fate] = []
    for row, letter in page:
        seized = store.seize(row)
        if seized is None:
            text = f"another process is busy with it in the store {store.name}"
            busy.append((letter, StoreError(text, message_id=letter.message_id)))
        else:
            held.append((seized, letter))
    return held, busy


def _chosen(batch: list[Letter], wanted: Wanted) -> list[Letter]:
    return [letter for letter in batch if _is_wanted(letter, wanted)]


def _is_wanted(letter: Letter, wanted: Wanted) -> bool:
    if wanted is None:
        return True
    return wanted(letter) if callable(wanted) else letter.message_id in wanted


@contextmanager
def _producer(settings: Settings) -> Iterator[MLProducer]:
    """Make a producer that sends nothing but what it is given, also where there is a store.

    It waits for each answer, so that nothing is left to be drained at its end, however it comes.
    """
    producer = MLProducer(
        evolve(settings, circuit_breaker_threshold=_NEVER, store_url="memory://"),
    )
    try:
        yield producer
    finally:
        producer.close(0.0)


@frozen
class _DeadEnd:
    """The dead-letter exchange and queue: what is sent there comes back.

    A replay that sent letters there would say that it has replayed them.
    """

    exchange: str
    queue: str

    def republish(
        self,
        producer: MLProducer,
        letters: list[Letter],
        target: Target | None,
        timeout: float | None = None,
    ) -> Iterator[Fate]:
        """Publish what is complete; what is not would not be the same message."""
        messages = [self._message(letter, target) for letter in letters]
        whole = [message for message in messages if isinstance(message, Message)]
        results = iter(producer.publish_many(whole, timeout=timeout, retry=False))
        for letter, message in zip(letters, messages, strict=True):
            if isinstance(message, Message):
                result = next(results)
                yield letter, result if isinstance(result, PublishError) else None
            else:
                yield letter, message

    def _message(self, letter: Letter, target: Target | None) -> Message | InvalidMessageError:
        """Give what is to be sent, or why nothing is."""
        message = letter.message
        if message is not None and target is not None:
            message = target.applied(message)
        elif letter.problem:
            message = None
        if message is None:
            return InvalidMessageError(letter.problem, message_id=letter.message_id)
        if message.exchange == self.exchange or (message.exchange, message.routing_key) == (
            "",
            self.queue,
        ):
            text = "its route leads back to the dead letters"
            return InvalidMessageError(text, message_id=letter.message_id)
        return message
