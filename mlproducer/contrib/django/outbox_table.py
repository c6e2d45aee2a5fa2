"""Make the table of the outbox, for migrations.

Runs on: the main thread.
"""

from __future__ import annotations

from typing import Any

from mlproducer import outbox
from mlproducer._store_url import TABLE, read_postgresql
from mlproducer.contrib.django.process import one
from mlproducer.errors import ConfigurationError


def make(_apps: Any, editor: Any) -> None:
    """Make it, with the name that ``STORE_URL`` gives it, or what one that is there lacks."""
    if editor.connection.vendor == "postgresql":
        with editor.connection.cursor() as cursor:
            cursor.execute(outbox.schema(_table()))


def _table() -> str:
    try:
        store_url = one.current().settings.store_url
    except ConfigurationError:  # which the checks tell
        return TABLE
    return read_postgresql(store_url).table if store_url.startswith("postgresql:") else TABLE
