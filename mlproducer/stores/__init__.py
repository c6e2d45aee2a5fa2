"""The stores in which messages wait for a retry; open the one that a URL names.

Runs on: the publisher's thread that starts the producer; `ForeignStore` on the retry thread.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from mlproducer.errors import BufferFullError, ConfigurationError, StoreError, frameless
from mlproducer.settings import Settings

if TYPE_CHECKING:
    from mlproducer.stores.protocol import Store


@frameless
def anchored(settings: Settings) -> Settings:
    """Return settings in which an SQLite store's relative path is made absolute.

    :raises ConfigurationError: the current directory does not exist
    """
    if not settings.store_url.startswith("sqlite:///"):
        return settings
    scheme, path = settings.store_url[:10], settings.store_url[10:]
    if path.startswith("/"):
        return settings
    from mlproducer._store_url import NAME  # noqa: PLC0415 - not needed otherwise

    try:
        here = os.getcwd()  # noqa: PTH109 - as text
    except OSError:
        raise ConfigurationError(
            f"{NAME} has a relative path, and the current directory was removed: use an absolute "
            "path, sqlite:////path"
        ) from None
    made = copy.copy(settings)  # evolve() would check, and warn, once more
    object.__setattr__(made, "store_url", f"{scheme}{quote(here)}/{path}")
    return made


@frameless
def open_store(settings: Settings) -> Store:
    """Return the store that the settings name; it opens and connects to nothing until it is used.

    :raises ConfigurationError: the URL does not parse, or its extra is not installed
    """
    scheme = settings.store_url.partition("://")[0]
    lease = settings.store_lease
    horizon = max(lease, settings.message_retry_max_delay) + 1.0
    if scheme == "memory":
        from mlproducer.stores.memory import MemoryStore  # noqa: PLC0415 - not needed before

        return MemoryStore()
    if scheme == "sqlite":
        from mlproducer._store_url import read_local  # noqa: PLC0415 - not needed otherwise
        from mlproducer.stores.sqlite import SQLiteStore  # noqa: PLC0415 - not needed otherwise

        address = read_local(settings.store_url)
        ahead = address.write_ahead
        return SQLiteStore(address.path, lease=lease, write_ahead=ahead, horizon=horizon)
    if scheme == "postgresql":
        from mlproducer.stores.postgres import PostgreSQLStore  # noqa: PLC0415 - an extra

        return PostgreSQLStore(settings.store_url, lease=lease, horizon=horizon)
    from mlproducer.stores.redis import RedisStore  # noqa: PLC0415 - an extra

    return RedisStore(settings.store_url, lease=lease, horizon=horizon)


class ForeignStore:
    """A user's own store, which raises only what a `Store` may raise.

    It is a user's code on a thread of the library: any other exception, even SystemExit, would end
    the step that called it, and leave publishers without an answer.
    """

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


def guarded_store(store: Store) -> Store:
    """Wrap a user's own store."""
    return cast("Store", ForeignStore(store))
