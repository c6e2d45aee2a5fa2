"""Publishing with a transaction: after its COMMIT, or by its outbox.

Runs on: the thread that has the transaction.
"""

from __future__ import annotations

import logging
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache, partial

from attrs import define
from django.db import transaction

from mlproducer import MLProducer, Receipt, outbox
from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer._store_url import read_postgresql
from mlproducer._wire.encode import Task
from mlproducer.contrib.django.process import one, producer
from mlproducer.errors import ConfigurationError, PublishError, RetriesExhaustedError

logger = logging.getLogger(__name__)


def publish_on_commit(task: Task, *, using: str | None = None) -> None:
    """Publish a task once the transaction is committed; never after a ROLLBACK.

    It is checked now, and raises nothing after the COMMIT, when the request can no longer be
    undone: what the producer refuses then is logged at ERROR, counted, and given to
    ``producer.on("refused")``. Without a transaction it is published now.

    A process that is killed between its COMMIT and the end of the request loses the task; so does
    an ``on_commit`` callback before it that raises: Django calls none of those behind one, unless
    it was added with ``robust=True``. What must not get lost even then is for
    `publish_in_transaction`.

    However many tasks a transaction has, waiting for the broker takes the producer's
    ``publish_timeout`` once; what is left then is handed over, as far as the in-flight window has
    room, and confirmed, deferred or refused later.

    :param using: alias of the database; ``None`` is the default one
    :raises InvalidMessageError: AMQP or strict JSON cannot carry it
    :raises ConfigurationError: ``settings.MLPRODUCER`` does not parse
    """
    producer.check(task)
    batch = _batch(using)

    def publish() -> None:
        try:
            made = one.current()
        except Exception as error:  # noqa: BLE001 - whatever it is, the request goes on
            _log_refusal(task, error)
            return
        try:
            _publish(made, task, batch)
        except Exception as error:  # noqa: BLE001 - as above
            _refused(made, task, error)

    transaction.on_commit(publish, using)


def publish_in_transaction(task: Task, *, using: str | None = None) -> Receipt:
    """Write a task as a row of the outbox, in the transaction that is open.

    After COMMIT it is delivered or dead-lettered, although this process dies at once; after
    ROLLBACK it never was. ``STORE_URL`` names the same PostgreSQL database as ``using``. A producer
    that records does so at COMMIT.

    :param using: alias of the database; ``None`` is the default one
    :returns: a DEFERRED receipt, which follows the message's fate
    :raises InvalidMessageError: AMQP or strict JSON cannot carry it
    :raises ConfigurationError: there is no transaction, or no store in PostgreSQL
    """
    connection = transaction.get_connection(using)
    made = one.current()
    if _records(made):
        return _recorded(made, task, using)
    if not made.running:  # before, since only a producer that runs follows the row's fate
        with suppress(ConfigurationError):  # without a broker here, another process delivers
            made.start()
    receipt = outbox.add(connection, task, producer=made)
    if connection.vendor == outbox.POSTGRESQL and connection.settings_dict["NAME"]:
        _look_at_names(connection.settings_dict["NAME"], made.settings.store_url)
    return receipt


@lru_cache(maxsize=64)
def _look_at_names(written: str, store_url: str) -> None:
    """Warn once if a row was written to a database in which no producer looks for it.

    By names alone that is not certain: a pooler may have a name of its own for a database.
    """
    read = read_postgresql(store_url).options.get("dbname", written)
    if read != written:
        text = (
            "publish_in_transaction wrote a row to the database %r, but STORE_URL names %r: unless "
            "both lead to the same database, that row is not delivered"
        )
        write(logger, logging.WARNING, text, written, read)


def _records(made: MLProducer) -> bool:
    """Return whether it is a `RecordingProducer`, without importing that class."""
    recording = sys.modules.get("mlproducer.testing.recording")
    return recording is not None and isinstance(made, recording.RecordingProducer)


def _recorded(made: MLProducer, task: Task, using: str | None) -> Receipt:
    """Record a task at COMMIT."""
    if not transaction.get_connection(using).in_atomic_block:
        raise ConfigurationError("publish_in_transaction needs a transaction (atomic())")
    envelope, _ = made.prepare(task)
    fate: Future[Receipt] = Future()

    def note() -> None:
        try:
            fate.set_result(made.publish(task))
        except PublishError as error:
            fate.set_exception(error)

    transaction.on_commit(note, using)
    return Receipt(envelope.message_id, attempts=0, elapsed=0.0, fate=fate)


@define
class _Batch:
    """The tasks of one transaction.

    :ivar ends: monotonic time until which they may wait; ``None`` before its COMMIT
    """

    ends: float | None = None


_batches = threading.local()


def _batch(using: str | None) -> _Batch:
    """Return the batch of the transaction that is open on this thread.

    A batch that never began belongs to a transaction that was rolled back, and is used again.
    """
    batch: _Batch | None = getattr(_batches, using or "default", None)
    if batch is None or batch.ends is not None:
        batch = _Batch()
        setattr(_batches, using or "default", batch)
    return batch


def _publish(made: MLProducer, task: Task, batch: _Batch) -> None:
    now = time.monotonic()
    if batch.ends is None:
        batch.ends = now + made.settings.publish_timeout
    if now < batch.ends:
        made.publish(task, timeout=batch.ends - now)
    else:
        future = made.submit(task, timeout=0)
        future.add_done_callback(partial(_settled, made, task))


def _settled(made: MLProducer, task: Task, future: Future[Receipt]) -> None:
    """Tell what came of a task after its request; a dead letter is the producer's, not refused."""
    error = future.exception()
    if isinstance(error, Exception) and not isinstance(error, RetriesExhaustedError):
        _refused(made, task, error)


def _refused(made: MLProducer, task: Task, error: Exception) -> None:
    _log_refusal(task, error)
    try:
        made.note_refused(task, error)
    except Exception as another:  # noqa: BLE001 - as above
        write(logger, logging.ERROR, "cannot count it: %s", type(another).__name__)


def _log_refusal(task: Task, error: Exception) -> None:
    text = "a %s was not published after COMMIT: %s: %s"
    write(logger, logging.ERROR, text, type(task).__name__, type(error).__name__, error)
