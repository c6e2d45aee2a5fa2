"""A store in PostgreSQL, for the producers of many machines, and for outboxes.

It imports nothing, so that an outbox can name the table without psycopg.

Runs on: the retry thread.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlproducer.stores.postgres.store import PostgreSQLStore

__all__ = ["PostgreSQLStore"]


def __getattr__(name: str) -> Any:
    if name == "PostgreSQLStore":
        from mlproducer.stores.postgres.store import PostgreSQLStore  # noqa: PLC0415 - psycopg

        return PostgreSQLStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
