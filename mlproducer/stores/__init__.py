"""The stores in which messages wait for a retry; open the one that a URL names.

Runs on: the publisher's thread that starts the producer.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlproducer.errors import ConfigurationError, frameless
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
