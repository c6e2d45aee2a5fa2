"""Write records, changes and claims as arguments of a script, and read rows back.

What comes from Redis is not trusted: the type of each field is checked, and the message by its
checksum.

Runs on: the retry thread.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from mlproducer.message import Envelope
from mlproducer.settings import RetryPolicy
from mlproducer.stores.protocol import Change, Claim, Entry, Record, Row, policy_text, read_policy

Field = bytes | str | int

MICROSECONDS = 1_000_000

WHOLE = 2**53
"""Up to here Lua's numbers, which are doubles, are exact; in microseconds, the year 2255."""


class UnreadableRowError(Exception):
    """A row that this library did not write, or that was changed since."""


def entry_fields(entry: Entry) -> tuple[Field, ...]:
    """Return flags, state, message and time of acceptance of an entry to be stored."""
    record = entry.record
    accepted = int(record.accepted_at * MICROSECONDS + 0.5)
    return _flags(record, entry.ahead), _state(record), *_message(record.envelope), accepted


def change_fields(change: Change) -> tuple[Field, ...]:
    """Return the new fields of a row; the message only where it is replaced by its dead letter."""
    claim, record = change.claim, change.record
    delay = -1 if change.delay is None else int(change.delay * MICROSECONDS)
    message = _message(record.envelope) if record.dead else ("",) * 5
    return claim.key, claim.token, delay, _flags(record), _state(record), *message


def claim_fields(claims: Iterable[Claim]) -> list[Field]:
    """Return keys and tokens, in turn."""
    return [each for claim in claims for each in (claim.key, claim.token)]


def read_row(fields: Sequence[bytes]) -> Row:
    """Read a row as the scripts return it.

    :raises UnreadableRowError: it is not one that this library wrote
    """
    try:
        numbers, message_id, route, properties, body, state = fields
        key, token, doubtful, checksum, accepted = map(int, numbers.split(b" "))
        if not 0 < key < WHOLE or not 0 < token < WHOLE or not 0 <= accepted < WHOLE:
            raise UnreadableRowError
        if checksum != _checksum(message_id, route, properties, body):
            raise UnreadableRowError
        name = message_id.decode(errors="surrogatepass")
        envelope = Envelope(name, *_read_route(route), properties, body)
        attempts, dead, reason, first_failed_at, retry = _read_state(state)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UnreadableRowError from None
    accepted_at = accepted / MICROSECONDS
    record = Record(
        envelope, attempts, doubtful != 0, dead, reason, first_failed_at, accepted_at, retry
    )
    return Row(Claim(key, token), record)


def name_of(fields: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return key and token of a row that cannot be read; the script has checked these two."""
    key, token, _ = fields[0].split(b" ", 2)
    return key, token


def _message(envelope: Envelope) -> tuple[Field, ...]:
    message_id = envelope.message_id.encode(errors="surrogatepass")
    route = _route(envelope.task_type, envelope.exchange, envelope.routing_key)
    checksum = _checksum(message_id, route, envelope.properties, envelope.body)
    return message_id, route, envelope.properties, envelope.body, checksum


def _flags(record: Record, ahead: bool = False) -> Field:
    """Return what a script has to know of a record, as letters: u (doubtful), d(ead), a(head)."""
    return "u" * record.doubtful + "d" * record.dead + "a" * ahead


def _checksum(message_id: bytes, route: bytes, properties: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(properties, zlib.crc32(route, zlib.crc32(message_id))))


def _state(record: Record) -> bytes:
    retry = policy_text(record.retry)
    before, after = _around_time(record.attempts, record.dead, record.reason, retry)
    return b"%b%b%b" % (before, repr(record.first_failed_at).encode(), after)


# Cached, since most rows have one of a few routes, and have failed for one of a few reasons.


@lru_cache(maxsize=256)
def _route(*texts: str) -> bytes:
    return json.dumps(texts).encode()


@lru_cache(maxsize=256)
def _around_time(attempts: int, dead: bool, reason: str, retry: str) -> tuple[bytes, bytes]:
    """Return the state, as JSON, before and after the time of the first failure."""
    state = {"attempts": attempts, "dead": dead, "reason": reason}
    before = json.dumps(state).removesuffix("}") + ', "first_failed_at": '
    after = f', "retry": {json.dumps(retry)}}}' if retry else "}"
    return before.encode(), after.encode()


@lru_cache(maxsize=256)
def _read_route(route: bytes) -> tuple[str, str, str]:
    task_type, exchange, routing_key = texts = json.loads(route)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return task_type, exchange, routing_key


@lru_cache(maxsize=256)
def _read_state(state: bytes) -> tuple[int, bool, str, float, RetryPolicy | None]:
    known = json.loads(state)
    attempts, dead = known["attempts"], known["dead"]
    reason, since = known["reason"], known["first_failed_at"]
    if type(attempts) is not int or not 0 <= attempts < 2**31:
        raise TypeError
    if type(dead) is not bool or not isinstance(reason, str):
        raise TypeError
    if type(since) not in (int, float) or not 0 <= since < WHOLE / MICROSECONDS:
        raise TypeError
    retry = known.get("retry", "")
    if not isinstance(retry, str):
        raise TypeError
    return attempts, dead, reason, float(since), read_policy(retry)
