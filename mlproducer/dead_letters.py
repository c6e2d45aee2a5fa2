"""Dead letters: look at them, send them again, throw them away.

They lie in the dead-letter queue and, until the broker has taken them there, in the store of the
producers. A letter is deleted only once the broker has confirmed its copy; one that cannot be sent
stays a dead letter. Whoever is killed in between leaves a letter twice at most, never none.

Runs on: the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from typing import Protocol

from attrs import evolve

from mlproducer.engine.directory import Directory
from mlproducer.engine.letterbox import Letter, Letterbox, stored_letter
from mlproducer.errors import (
    AuthenticationError,
    InvalidMessageError,
    NotConnectedError,
    PublishError,
    StoreError,
)
from mlproducer.producer import MLProducer
from mlproducer.settings import Settings
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Change, Row, Store
from mlproducer.topology import Topology

__all__ = ["DeadLetters", "Letter", "Place", "StoredDeadLetters", "places"]

Wanted = Collection[str] | None
Page = list[tuple[Row, Letter]]
Fate = tuple[Letter, PublishError | None]
Told = Callable[[Letter, PublishError | None], object]

_NEVER = 1_000_000
"""A breaker's threshold: one full queue must not keep the letters of the others."""

_QUICK = 1.0
"""Seconds within which a connection is usually there, so that no claim has to wait for it."""

_NO_BROKER = (NotConnectedError, AuthenticationError)


def _tell_nobody(_letter: Letter, _error: PublishError | None) -> None:
    pass


class Place(Protocol):
    """Where dead letters lie; ``wanted`` are message ids, ``None`` means all."""

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters, one by one."""

    def replay(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :param told: called for each letter, with the error if it stays
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
        self._settings = settings
        self._queue = Topology.of(settings).dead_letter_queue if queue is None else queue

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters; they are held back from everybody else until the last was asked for."""
        with self._open() as box:
            for batch in box.take():
                yield from _chosen(batch, wanted)

    def replay(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Send letters to where they were to go, and give how many had to stay."""
        stayed = 0
        with self._open() as box, _producer(self._settings) as producer:
            for batch in box.take():
                for letter, error in _republish(producer, _chosen(batch, wanted)):
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

    def _open(self) -> Letterbox:
        return Letterbox(Directory(self._settings).routes, self._queue, self._settings.prefetch)


class StoredDeadLetters:
    """The dead letters in the store that the settings name, whichever process wrote them.

    A letter that another process has claimed is left alone, and stays with a `StoreError`: that
    may be a producer which is just sending it to the queue.

    :raises StoreError: by every method: the store cannot be used; the text names it
    :raises ConfigurationError: by every method: the store's URL does not parse
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give letters, also those that somebody has claimed."""
        with self._open() as store:
            for page in self._pages(store, wanted):
                for _, letter in page:
                    yield letter

    def replay(self, wanted: Wanted = None, told: Told = _tell_nobody) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :raises NotConnectedError: no broker answers; those not tried yet are left alone
        :raises AuthenticationError: it lets nobody in
        """
        stayed = 0
        with self._open() as store, _producer(self._settings) as producer:
            producer.wait_connected(_QUICK)
            for page in self._pages(store, wanted):
                for letter, error in self._send(store, producer, page):
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
        while rows := store.letters(self._settings.prefetch, last):
            last = rows[-1].claim.key
            letters = [(row, stored_letter(row.record.envelope)) for row in rows]
            yield [each for each in letters if wanted is None or each[1].message_id in wanted]

    def _send(self, store: Store, producer: MLProducer, page: Page) -> Iterator[Fate]:
        """Send a page of letters; what becomes of them is noted before it is told."""
        held, busy = _seize(store, page)
        yield from busy
        limit = min(self._settings.publish_timeout, store.lease / 2)  # while it is surely ours
        fates = list(_republish(producer, [letter for _, letter in held], limit))
        try:
            _note(store, [row for row, _ in held], [error for _, error in fates])
        except StoreError as error:
            yield from ((letter, error) for letter, _ in fates)
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


def _note(store: Store, rows: Sequence[Row], errors: Sequence[PublishError | None]) -> None:
    """Delete the rows of what was sent, and give the others back."""
    noted = list(zip(rows, errors, strict=True))
    store.done([row.claim for row, error in noted if error is None])
    store.release([Change(row.claim, row.record, 0.0) for row, error in noted if error is not None])


def _chosen(batch: list[Letter], wanted: Wanted) -> list[Letter]:
    return [letter for letter in batch if wanted is None or letter.message_id in wanted]


def _producer(settings: Settings) -> MLProducer:
    """Make a producer that sends nothing but what it is given, also where there is a store."""
    return MLProducer(evolve(settings, circuit_breaker_threshold=_NEVER, store_url="memory://"))


def _republish(
    producer: MLProducer, letters: list[Letter], timeout: float | None = None
) -> Iterator[Fate]:
    """Publish what is complete; what is not would not be the same message."""
    whole = [letter.message for letter in letters if not letter.lacks]
    results = iter(producer.publish_many(whole, timeout=timeout, retry=False))
    for letter in letters:
        if letter.lacks:
            lacks = ", ".join(letter.lacks)
            yield letter, InvalidMessageError(f"cannot be sent again with its {lacks}")
        else:
            result = next(results)
            yield letter, result if isinstance(result, PublishError) else None
