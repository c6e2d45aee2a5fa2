"""A publisher that is to be killed: ``ROLE JOURNAL NAME``; broker and store are in its environment.

Before each call it writes the message's id to the journal, and after it what the call said; what is
written is there however the process ends.

- ``storm``: six threads publish, two submit, until it is killed.
- ``outage``: publishes 50 messages, says so, and waits to be killed.
- ``ack``: is killed in the moment in which a confirmed message is to be deleted from the store.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Sequence

from mlproducer import Message, MLProducer, Settings
from mlproducer.errors import PublishError
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Claim
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.topology import ROUTING_KEYS

PUBLISHERS, SUBMITTERS = 6, 2
PAUSE = 0.003
OUTAGE = 50
LIMIT = 180.0


class Publisher:
    """Publishes, and keeps the journal."""

    def __init__(self, producer: MLProducer, journal: str, name: str) -> None:
        self._producer = producer
        self._name = name
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._never = threading.Event()

    def note(self, word: str, message_id: str = "") -> None:
        """Write a line that survives this process."""
        os.write(self._journal, f"{word} {message_id}\n".encode())

    def publish(self, number: str, *, submit: bool = False) -> None:
        """Hand in one message."""
        message_id = f"{self._name}-{number}"
        queue = ROUTING_KEYS[hash(number) % len(ROUTING_KEYS)]
        message = Message(body=b"x" * 500, routing_key=queue, message_id=message_id)
        self.note("begun", message_id)
        try:
            if submit:
                self._producer.submit(message)
            else:
                self._producer.publish(message)
        except PublishError as error:
            self.note("unsure" if error.possibly_sent else "refused", message_id)
        else:
            self.note("taken", message_id)

    def storm(self, thread: int, *, submit: bool) -> None:
        """Publish for ever."""
        for number in itertools.count():
            self.publish(f"{thread}-{number}", submit=submit)
            self._never.wait(PAUSE)


class Deadly(SQLiteStore):
    """A store in whose hands the process dies."""

    def done(self, claims: Sequence[Claim]) -> None:
        """Die before anything is deleted."""
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Play the role."""
    role, journal, name = sys.argv[1:]
    settings = Settings.from_env()
    store = open_store(settings)
    if role == "ack":
        store = Deadly(store.name, write_ahead=True, lease=settings.store_lease)
    publisher = Publisher(MLProducer(settings, store=store), journal, name)
    if role == "ack":
        publisher.publish("0")
        threading.Event().wait(LIMIT)
    if role == "outage":
        for number in range(OUTAGE):
            publisher.publish(str(number))
        publisher.note("over")
        threading.Event().wait(LIMIT)
    threads = [
        threading.Thread(
            target=publisher.storm, args=(number,), kwargs={"submit": number >= PUBLISHERS}
        )
        for number in range(PUBLISHERS + SUBMITTERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)


if __name__ == "__main__":
    main()
