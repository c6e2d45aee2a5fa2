"""A store in Redis, for the producers of many machines.

Runs on: the retry thread.
"""

from mlproducer.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
