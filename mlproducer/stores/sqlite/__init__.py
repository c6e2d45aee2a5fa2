"""A store in an SQLite file, for all the processes of one machine.

Runs on: the retry thread.
"""

from mlproducer.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
