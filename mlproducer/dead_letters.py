"""Dead letters: look at them, send them again, throw them away.

A letter is deleted only once the broker has confirmed its copy; one that cannot be sent stays a
dead letter. Whoever is killed in between leaves a letter twice at most, never none.

Runs on: the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from attrs import evolve

from mlproducer.engine.engine import routes
from mlproducer.engine.letterbox import Letter, Letterbox
from mlproducer.errors import InvalidMessageError, PublishError
from mlproducer.message import Receipt
from mlproducer.producer import MLProducer
from mlproducer.settings import Settings
from mlproducer.topology import Topology

__all__ = ["DeadLetters", "Letter"]

Wanted = Collection[str] | None
Replayed = Callable[[Letter, PublishError | None], object]
Purged = Callable[[Letter], object]

_NEVER = 1_000_000
"""A breaker's threshold: one full queue must not keep the letters of the others."""


class DeadLetters:
    """The dead letters of the broker that the settings name.

    Every method opens a connection of its own, and takes ``settings.prefetch`` letters at a time.

    :param queue: where they lie; ``None`` is the library's own dead-letter queue
    :raises NotConnectedError: by every method: no broker answers; the text says why
    """

    def __init__(self, settings: Settings, queue: str | None = None) -> None:
        self._settings = settings
        self._queue = Topology.of(settings).dead_letter_queue if queue is None else queue

    def list(self, wanted: Wanted = None) -> Iterator[Letter]:
        """Give the letters with these message ids, one by one; ``None`` gives all.

        They are held back from everybody else until the last of them was asked for.
        """
        with self._open() as box:
            for batch in box.take():
                yield from _chosen(batch, wanted)

    def replay(self, wanted: Wanted = None, told: Replayed = lambda _letter, _error: None) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :param told: called for each letter, with the error if it stays
        """
        settings = evolve(self._settings, circuit_breaker_threshold=_NEVER)
        stayed = 0
        with self._open() as box, MLProducer(settings) as producer:
            for batch in box.take():
                letters = _chosen(batch, wanted)
                for letter, result in zip(letters, _republish(producer, letters), strict=True):
                    error = result if isinstance(result, PublishError) else None
                    if error is None:
                        box.ack(letter)
                    stayed += error is not None
                    told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None, told: Purged = lambda _letter: None) -> int:
        """Delete letters for good, and give how many.

        :param told: called for each letter that was deleted
        """
        purged = 0
        with self._open() as box:
            for batch in box.take():
                for letter in _chosen(batch, wanted):
                    box.ack(letter)
                    purged += 1
                    told(letter)
        return purged

    def _open(self) -> Letterbox:
        return Letterbox(routes(self._settings), self._queue, self._settings.prefetch)


def _chosen(batch: list[Letter], wanted: Wanted) -> list[Letter]:
    return [letter for letter in batch if wanted is None or letter.message_id in wanted]


def _republish(producer: MLProducer, letters: list[Letter]) -> Iterator[Receipt | PublishError]:
    """Publish what is complete; what is not would not be the same message."""
    whole = [letter.message for letter in letters if not letter.lacks]
    results = iter(producer.publish_many(whole, retry=False))
    for letter in letters:
        if letter.lacks:
            yield InvalidMessageError(f"cannot be sent again with its {', '.join(letter.lacks)}")
        else:
            yield next(results)
