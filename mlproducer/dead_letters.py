"""Dead letters: look at them, send them again, throw them away.

A letter is deleted only once the broker has confirmed its copy; one that cannot be sent stays a
dead letter.

Runs on: the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice

from mlproducer.engine.engine import routes
from mlproducer.engine.letterbox import Letter, Letterbox
from mlproducer.errors import PublishError
from mlproducer.producer import MLProducer
from mlproducer.settings import Settings
from mlproducer.topology import Topology

Wanted = Collection[str] | None
Progress = Callable[[Letter, PublishError | None], object]


class DeadLetters:
    """The dead letters of the broker that the settings name.

    Every method opens a connection of its own; `NotConnectedError` says why it cannot.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue = Topology.of(settings).dead_letter_queue

    def list(self, wanted: Wanted = None) -> list[Letter]:
        """Give the letters with these message ids; ``None`` gives all."""
        with self._open() as box:
            return list(_chosen(box, wanted))

    def replay(self, wanted: Wanted = None, told: Progress = lambda _letter, _error: None) -> int:
        """Send letters to where they were to go, and give how many had to stay.

        :param told: called for each letter, with the error if it stays
        """
        stayed = 0
        with MLProducer(self._settings) as producer, self._open() as box:
            letters = _chosen(box, wanted)
            while batch := list(islice(letters, self._settings.prefetch)):
                messages = [letter.message for letter in batch]
                results = producer.publish_many(messages, retry=False)
                for letter, result in zip(batch, results, strict=True):
                    error = result if isinstance(result, PublishError) else None
                    if error is None:
                        box.ack(letter)
                    else:
                        stayed += 1
                    told(letter, error)
        return stayed

    def purge(self, wanted: Wanted = None) -> int:
        """Delete letters for good, and give how many."""
        with self._open() as box:
            letters = list(_chosen(box, wanted))
            for letter in letters:
                box.ack(letter)
        return len(letters)

    def _open(self) -> Letterbox:
        return Letterbox(routes(self._settings)[0], self._queue)


def _chosen(box: Letterbox, wanted: Wanted) -> Iterator[Letter]:
    return (letter for letter in box.take() if wanted is None or letter.message_id in wanted)
