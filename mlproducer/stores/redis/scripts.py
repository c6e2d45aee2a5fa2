"""The scripts that a Redis store runs, one for each call of the protocol, from the ``.lua`` files.

Redis runs a script as a whole, with nothing else in between, so each is a transaction. No script
is built from data: what it works on comes as an argument. The first argument is the owner's name,
the second the number of the call, or 0. Every script returns the server's time first.

All keys begin with the store's prefix and share one hash tag, so that in a cluster they are on one
node:

- ``row:KEY``: a hash, one message. ``id``, ``route`` (JSON), ``properties`` and ``body`` (raw
  bytes) are the message, ``sum`` their CRC-32, ``state`` (JSON) what is known of its attempts.
  ``owner`` is who claims it, and ends with the length of its leases; it begins with ``-`` once
  that owner has released it. ``origin`` is who put it, once another has claimed it. ``token`` is
  the fence, odd where the claim is not its origin's; ``accepted`` is in microseconds.
- ``due``: a sorted set, when each row is due, or its claim ends. ``ready``: those that are due,
  by key. A row is in one of the two.
- ``dead``: dead letters, by key. ``ahead``: rows stored ahead, until their claim ends.
- ``own:OWNER``: the rows that one process claims, by the number of the call that claimed them.
  ``floor:OWNER``: calls up to this number were given up, and change nothing any more.
- ``fates``: a sorted set, rows that another than their origin deleted, by twice the time of their
  end, plus one for a dead letter.
- ``clock``: the time of a claim, at most a second ago, which shows that a clock was set back.
- ``last``: the last key. ``quarantine``: a set, the keys of rows that could not be read; such a row
  stays where it is, to be looked at.

Time is the server's, in microseconds. Keys and first tokens are made of it, so that neither is
used again after a FLUSHALL. Redis 7.0 is needed, where a script declares what it does: one that
frees memory, or takes hardly any, runs also where memory is full.

Runs on: Redis's own thread, which serves all clients, so that no script may run for long.
"""

from __future__ import annotations

from importlib import resources

from mlproducer.stores.protocol import FATES_LAST, MOST_FATES
from mlproducer.stores.redis.rows import MICROSECONDS

TAG = "{store}:"
"""What follows the prefix in the name of every key; the braces make it a cluster's hash tag."""

_FILES = resources.files(__package__)


def _source(name: str) -> str:
    return _FILES.joinpath(f"{name}.lua").read_text(encoding="utf-8")


COMMON = _source("common")

_CONSTANTS = f"local FATES_LAST, MOST_FATES = {int(FATES_LAST * MICROSECONDS)}, {MOST_FATES}\n"


def _script(name: str) -> str:
    """Return a script with what all have in common; Redis wants its flags in the first line."""
    flags, _, body = _source(name).partition("\n")
    return f"{flags}\n{_CONSTANTS}{COMMON}{body}"


OPEN = _script("open")
PUT = _script("put")
FREE = _script("free")
UNDO = _script("undo")
CLAIM = _script("claim")
RELEASE = _script("release")
RENEW = _script("renew")
DONE = _script("done")
TRACE = _script("trace")
LETTERS = _script("letters")
SEIZE = _script("seize")
DEPTH = _script("depth")
QUARANTINE = _script("quarantine")
CLOSE = _script("close")
