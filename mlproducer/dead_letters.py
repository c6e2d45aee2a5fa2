"""Dead letters: list, replay and purge them.

They are in the dead-letter queue and, until the broker has confirmed them there, in the producers'
store. A dead letter is deleted only once the broker has confirmed its copy; one that cannot be sent
stays. A process that is killed in between leaves a letter twice, never loses it.

Runs on: the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
from mlproducer.settings import Settings, topology_of
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Change, Row, Store

__all__ = ["DeadLetters", "Letter", "Place", "StoredDeadLetters", "Target", "places"]

Wanted = Collection[str] | Callable[[Letter], bool] | None
"""Message ids, or a predicate; ``None`` means all."""

Page = list[tuple[Row, Letter]]
Fate = tuple[Letter, PublishError | None]
Told = Callable[[Letter, PublishError | None], object]
Whole = Callable[[], AbstractContextManager[object]]

_NEVER = 1_000_000
"""A circuit breaker's threshold: one full queue must not stop the letters for others."""

_QUICK = 1.0
"""Seconds to wait for the connection before rows are claimed."""

_NO_BROKER = (NotConnectedError, AuthenticationError)


@frozen
class Target:
    """Another exchange or routing key for replayed letters; ``None`` keeps the original one."""

    exchange: str | None = None
    routing_key: str | None = None

    def applied(self, message: Message) -> Message:
        """Return a message with this exchange and routing key."""
        return evolve(
            message,
            exchange=message.exchange if self.exchange is None else self.exchange,
            routing_key=message.routing_key if self.routing_key is None else self.routing_key,
        )


def _ignore(_letter: Letter, _error: PublishError | None) -> None:
    pass


class Place(Protocol):
    """A place that has dead letters: the queue, or the store."""

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Yield letters."""

    def replay(
        self,
        wanted: Wanted = None,
        told: Told = _ignore,
        target: Target | None = None,
        whole: Whole = nullcontext,
    ) -> int:
        """Publish letters to their original route, and return how many could not be sent.

        :param told: called for each letter, with the error if it stays
        :param target: another route
        :param whole: entered for each batch, from its publishing until all its letters are told:
            one that is cut in between is published once more by the next replay
        """

    def purge(self, wanted: Wanted = None, told: Told = _ignore) -> int:
        """Delete letters, and return how many.

        :param told: called for each letter, with the error if it stays
        """


def places(settings: Settings) -> list[Place]:
    """Return the places that the settings name.

    The store comes first: letters move from there to the queue, so that reading both in this order
    misses none.
    """
    queue = DeadLetters(settings)
    if settings.store_url.startswith("memory:"):
        return [queue]
    return [StoredDeadLetters(settings), queue]


class DeadLetters:
    """The dead letters in a queue of the broker that the settings name.

    Every method opens a connection of its own, and reads ``settings.prefetch`` letters at a time.

    :param queue: the queue's name; ``None`` is the dead-letter queue of the topology
    :raises NotConnectedError: by every method: no broker can be reached; the text says why
    """

    def __init__(self, settings: Settings, queue: str | None = None) -> None:
        topology = topology_of(settings)
        self._settings = settings
        self._queue = topology.dead_letter_queue if queue is None else queue
        self._dead_end = _DeadEnd(topology.dead_letter_exchange, self._queue)

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Yield letters; other consumers do not get them until the iterator ends."""
        with self._open() as box:
            for batch in box.take():
                yield from _chosen(batch, wanted)

    def replay(
        self,
        wanted: Wanted = None,
        told: Told = _ignore,
        target: Target | None = None,
        whole: Whole = nullcontext,
    ) -> int:
        """Publish letters to their original route, and return how many could not be sent."""
        stayed = 0
        with self._open() as box, _producer(self._settings) as producer:
            for batch in box.take():
                chosen = _chosen(batch, wanted)
                with whole():
                    fates = list(self._dead_end.republish(producer, chosen, target))
                    settled: list[Fate] = []
                    try:
                        for letter, error in fates:  # all of them before `told`, which may raise
                            if error is None:
                                box.ack(letter)
                            settled.append((letter, error))
                    finally:
                        for letter, error in settled:
                            stayed += error is not None
                            told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None, told: Told = _ignore) -> int:
        """Delete letters, and return how many."""
        purged = 0
        with self._open() as box:
            for batch in box.take():
                for letter in _chosen(batch, wanted):
                    box.ack(letter)
                    purged += 1
                    told(letter, None)
        return purged

    def _open(self) -> DeadLetterReader:
        session = Session(Endpoints(self._settings).known, self._settings.connection_timeout)
        return DeadLetterReader(session, self._queue, self._settings.prefetch)


class StoredDeadLetters:
    """The dead letters in the store that the settings name, of all processes.

    A letter that another process has claimed stays, with a `StoreError`: a producer may be sending
    it to the queue.

    :raises StoreError: by every method: the store cannot be used; the text names it
    :raises ConfigurationError: by every method: the store's URL does not parse
    """

    def __init__(self, settings: Settings) -> None:
        topology = topology_of(settings)
        self._settings = settings
        self._dead_end = _DeadEnd(topology.dead_letter_exchange, topology.dead_letter_queue)

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Yield letters, including claimed ones."""
        with self._open() as store:
            for page in self._pages(store, wanted):
                for _, letter in page:
                    yield letter

    def replay(
        self,
        wanted: Wanted = None,
        told: Told = _ignore,
        target: Target | None = None,
        whole: Whole = nullcontext,
    ) -> int:
        """Publish letters to their original route, and return how many could not be sent.

        :raises NotConnectedError: no broker can be reached; the letters that are left are not tried
        :raises AuthenticationError: the broker refuses the credentials
        """
        stayed = 0
        with self._open() as store, _producer(self._settings) as producer:
            producer.wait_connected(_QUICK)
            for page in self._pages(store, wanted):
                with whole():
                    for letter, error in self._send(store, producer, page, target):
                        stayed += error is not None
                        told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None, told: Told = _ignore) -> int:
        """Delete letters, and return how many."""
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
            # A mistyped path must not create a file, which may then belong to root.
            raise StoreError(f"the store {store.name} does not exist: no producer has used it yet")
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
        """Publish a page of letters, note the outcomes in the store, and yield them."""
        held, busy = _seize(store, page)
        yield from busy
        limit = min(
            self._settings.publish_timeout, store.lease / 2
        )  # half the lease: the claim holds until then
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
    """Claim letters; return those claimed, and errors for those that another process has."""
    held: Page = []
    busy: list[Fate] = []
    for row, letter in page:
        seized = store.seize(row)
        if seized is None:
            text = f"another process has claimed it in the store {store.name}"
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
    """Make a producer for replays, with a memory store, so that it sends no stored rows.

    Every replay waits for the answer, so that nothing is left to be drained at the end.
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
    """The dead-letter exchange and queue, to which no letter must be replayed.

    It would come back, and count as replayed.
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
        """Publish the letters that are complete; an incomplete one would be another message."""
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
        """Return the message to be sent, or the error if it cannot be."""
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
            text = "its route leads back to the dead-letter queue"
            return InvalidMessageError(text, message_id=letter.message_id)
        return message
