"""A store of the user's own, whose every failure becomes a `StoreError` here.

It is a user's code on a thread of ours: what it raises that a `Store` should not, SystemExit
included, would end the step that called it, and leave publishers without an answer.

Runs on: the retry thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from mlproducer.errors import BufferFullError, StoreError
from mlproducer.stores.protocol import Store


class ForeignStore:
    """Passes all calls on, and raises what a `Store` may."""

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


def foreign(store: Store) -> Store:
    """Return a user's store behind this fence."""
    return cast("Store", ForeignStore(store))
