"""Where messages wait for a retry, and which store a URL names.

Runs on: the publisher's thread that starts the producer.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from mlproducer.errors import ConfigurationError
from mlproducer.settings import Settings
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Store

_WHERE = "store_url (ML_STORE_URL)"
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def open_store(settings: Settings) -> Store:
    """Make the store that the settings name; nothing is opened or connected before its first use.

    :raises ConfigurationError: the URL does not parse, or its extra is not installed
    """
    scheme = settings.store_url.partition("://")[0]
    lease = settings.store_lease
    horizon = max(lease, settings.message_retry_max_delay) + 1.0
    if scheme == "memory":
        _read(settings.store_url, ())
        return MemoryStore()
    if scheme == "sqlite":
        from mlproducer.stores.sqlite import SQLiteStore  # noqa: PLC0415 - not needed otherwise

        path, write_ahead = _read(settings.store_url, ("write_ahead",))
        return SQLiteStore(path, lease=lease, write_ahead=write_ahead, horizon=horizon)
    from mlproducer.stores.redis import RedisStore  # noqa: PLC0415 - an extra

    return RedisStore(settings.store_url, lease=lease, horizon=horizon)


def _read(url: str, options: tuple[str, ...]) -> tuple[str, bool]:
    """Read the URL of a local store: its path, and whether it is written ahead."""
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = set(given) - set(options)
    path = unquote(parts.path[1:])
    if unknown or parts.fragment or parts.netloc or (parts.scheme == "sqlite") != bool(path):
        raise ConfigurationError(
            f"{_WHERE} does not parse; accepted are memory://, sqlite:///relative.db and "
            "sqlite:////absolute.db, the latter two also with ?write_ahead=1"
        )
    write_ahead = _FLAGS.get(given.get("write_ahead", "0").lower())
    if write_ahead is None:
        raise ConfigurationError(f"{_WHERE}: write_ahead must be 1 or 0")
    return path, write_ahead
