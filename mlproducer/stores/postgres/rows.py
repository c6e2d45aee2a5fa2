"""Write records as rows of the PostgreSQL store, and read rows back.

PostgreSQL's text cannot hold NUL, and a database may have another encoding than UTF-8. So texts are
stored as ASCII, with Python's escapes for all other characters; usual ids and names are unchanged.

What comes from the table is not trusted: the range of each field is checked, and the message by its
checksum.

Runs on: the retry thread; `message_values` on the thread that adds to an outbox too.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

from mlproducer.message import Envelope
from mlproducer.stores.postgres.sql import DEAD, GIVEN, WAITING
from mlproducer.stores.protocol import (
    MOST_ATTEMPTS,
    Claim,
    Record,
    Row,
    policy_text,
    read_policy,
)

MICROSECONDS = 1_000_000
LATEST = 2**53
"""The latest time that is accepted, in microseconds since the epoch: in the year 2255."""

_ESCAPED = re.compile(r"(?:[^\\]|\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}))*", re.DOTALL)


class UnreadableRowError(Exception):
    """A row that this library did not write, or that was changed since."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(str(claim.key))
        self.claim = claim


def text(raw: str) -> str:
    """Return a text as it is stored in the table."""
    if raw.isascii() and raw.isprintable() and "\\" not in raw:
        return raw
    return raw.encode("unicode_escape").decode("ascii")


def read_text(stored: str) -> str:
    """Return the text that `text` was given.

    :raises ValueError: it cannot be a result of `text`
    """
    if "\\" not in stored:
        return stored
    if _ESCAPED.fullmatch(stored) is None:  # Python only warns of escapes that it does not know
        raise ValueError("it has other escapes than Python's")
    return stored.encode("ascii").decode("unicode_escape")


def message_values(envelope: Envelope) -> tuple[Any, ...]:
    """Return the values of `COLUMNS`, in their order."""
    route = (
        text(envelope.message_id),
        text(envelope.task_type),
        text(envelope.exchange),
        text(envelope.routing_key),
    )
    return (*route, _checksum(route, envelope.properties, envelope.body), *_bytes(envelope))


def _bytes(envelope: Envelope) -> tuple[bytes, bytes]:
    return bytes(envelope.properties), bytes(envelope.body)


def microseconds(seconds: float) -> int:
    """Return a time of a record as it is stored in the table."""
    return round(seconds * MICROSECONDS)


def given(
    records: Sequence[Record], delays: Sequence[float | None], ahead: Sequence[int | None]
) -> dict[str, list[Any]]:
    """Return the arrays of `GIVEN` for rows to be stored or changed.

    :param ahead: states that replace those of the records; ``None`` keeps the record's
    """
    rows = [
        (
            delay,
            (DEAD if record.dead else WAITING) if state is None else state,
            record.attempts,
            record.doubtful,
            text(record.reason),
            policy_text(record.retry),
            microseconds(record.first_failed_at),
            microseconds(record.accepted_at),
            *message_values(record.envelope),
        )
        for record, delay, state in zip(records, delays, ahead, strict=True)
    ]
    return dict(zip(GIVEN, map(list, zip(*rows, strict=True)), strict=True))


def read_row(fields: Sequence[Any]) -> Row:
    """Read a row.

    :raises UnreadableRowError: it was not written by this library, or changed since
    """
    key, token, state, attempts, doubtful, reason, retry, since, accepted, *message = fields
    *route, checksum, properties, body = message
    claim = Claim(key, token)
    try:
        times = 0 <= since <= LATEST and 0 <= accepted <= LATEST
        if not times or not 0 <= attempts <= MOST_ATTEMPTS:
            raise UnreadableRowError(claim)
        if checksum != _checksum(route, properties, body):
            raise UnreadableRowError(claim)
        message_id, task_type, exchange, routing_key = map(read_text, route)
        envelope = Envelope(message_id, task_type, exchange, routing_key, properties, body)
        record = Record(
            envelope,
            attempts,
            doubtful,
            state == DEAD,
            read_text(reason),
            since / MICROSECONDS,
            accepted / MICROSECONDS,
            read_policy(retry),
        )
    except (ValueError, TypeError, AttributeError):  # where an outbox is in SQLite, types too
        raise UnreadableRowError(claim) from None
    return Row(claim, record)


def _checksum(route: Sequence[str], properties: bytes, body: bytes) -> int:
    head = "\0".join(route).encode("ascii", errors="replace")
    return zlib.crc32(body, zlib.crc32(properties, zlib.crc32(head)))
