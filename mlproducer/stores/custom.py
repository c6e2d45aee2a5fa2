"""A user's own store, whose failures are turned into `StoreError`.

It is a user's code on a thread of the library: an exception that a `Store` should not raise, even
SystemExit, would end the step that called it, and leave publishers without an answer.

Runs on: the retry thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from mlproducer.errors import BufferFullError, StoreError
from mlproducer.stores.protocol import Store


class ForeignStore:
    """Forwards all calls, and raises only what a `Store` may raise."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except (StoreError, BufferFullError):
            raise
        except BaseException as error:
            kind = type(error).__name__
            raise StoreError(f"the store {self._store.name} failed: {kind}") from error


def custom(store: Store) -> Store:
    """Wrap a user's store."""
    return cast("Store", ForeignStore(store))
