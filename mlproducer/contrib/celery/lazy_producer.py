"""A stand-in for a producer of kombu's, which takes one from Celery's pool only when it must.

Runs on: the threads that send tasks.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from mlproducer.errors import MLProducerError


def real_producer(producer: Any) -> Any:
    """Return a producer of kombu's, taken from the pool where that was put off."""
    return producer.real() if isinstance(producer, LazyProducer) else producer


def given_producer(producer: Any) -> Any:
    """Return the kombu producer that the sender chose; ``None`` where it leaves that to Celery."""
    return producer.given if isinstance(producer, LazyProducer) else producer


class LazyProducer:
    """Stands for a pooled kombu producer until something needs a real one.

    :ivar given: what the sender handed in, instead of one from the pool
    """

    serializer = None

    def __init__(self, app: Celery, given: Any) -> None:
        self._app = app
        self.given = given
        self._pooled: Any = None
        self.connection = _LazyConnection(self)

    def real(self) -> Any:
        """Return the kombu producer: the one that was handed in, or one from the app's pool."""
        if self.given is not None:
            return self.given
        if self._pooled is None:
            self._pooled = type(self._app).producer_or_acquire(self._app).__enter__()
        return self._pooled

    def __enter__(self) -> LazyProducer:
        return self

    def __exit__(self, *raised: object) -> None:
        pooled, self._pooled = self._pooled, None
        if pooled is not None:
            pooled.__exit__(*raised)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real(), name)


class _LazyConnection:
    """The connection of a `LazyProducer`; only what Celery asks of it around each task is here."""

    def __init__(self, producer: LazyProducer) -> None:
        self._producer = producer

    def _reraise_as_library_errors(self, *args: Any, **kwargs: Any) -> Any:
        return _Errors(self._producer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer.real().connection, name)


class _Errors:
    """Turns connection errors into kombu's own, as stock Celery does."""

    def __init__(self, producer: LazyProducer, args: Any, kwargs: Any) -> None:
        self._producer, self._args, self._kwargs = producer, args, kwargs

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None or isinstance(error, (OperationalError, MLProducerError)):
            return
        connection = self._producer.real().connection
        with connection._reraise_as_library_errors(*self._args, **self._kwargs):  # noqa: SLF001 - as Celery calls it
            raise error
