"""Where messages wait for a retry, and which store a URL names.

Runs on: the retry thread; `open_store` on the publisher's thread that starts the producer.
"""

from __future__ import annotations

from mlproducer.errors import ConfigurationError
from mlproducer.settings import Settings
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Store


def open_store(settings: Settings) -> Store:
    """Make the store that the settings name.

    :raises ConfigurationError: this version has no such store
    """
    scheme = settings.store_url.partition("://")[0]
    if scheme != "memory":
        raise ConfigurationError(
            f"store_url (ML_STORE_URL): {scheme}:// is not available yet; accepted is memory://"
        )
    return MemoryStore()
