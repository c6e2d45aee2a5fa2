"""The table of the SQLite store: its statements, and how messages become rows and rows messages.

A statement does its work for many rows at once, and gives what it finds as one value. For each
step of a statement, and so for each row that it gives, ``sqlite3`` lets go of Python's lock, and
may wait 5 ms until a busy thread gives it back (``sys.getswitchinterval``).

What comes from the file is not trusted: each field has its type, and the message its checksum. Here
nothing knows of a connection.

Runs on: the retry thread.
"""

# ruff: noqa: S608 - statements are made of constants, and data comes as parameters
from __future__ import annotations

import enum
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from attrs import frozen

from mlproducer.message import Envelope
from mlproducer.stores.protocol import Change, Claim, Entry, Record, Row, RowFate

MICROSECONDS = 1_000_000

FIRST_TOKEN = 2
"""As long as all tokens up to 127, so that a claim writes a long row's first page only."""

MOST_ROWS = 512
FEW_ROWS = 64
"""So many are stored by one statement, however many of its lines are empty."""

MOST_BYTES = 16 * 1024 * 1024
"""What one statement stores at most; SQLite takes 32,766 parameters."""


class State(enum.IntEnum):
    """What a row is; AHEAD until its first claim ends."""

    AHEAD = 0
    WAITING = 1
    DEAD = 2


_DEAD = int(State.DEAD)  # comparing with an enum's member takes longer


SCHEMA = """
CREATE TABLE messages (
    key INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again
    token INTEGER NOT NULL,
    claimed INTEGER NOT NULL CHECK (claimed IN (0, 1)),
    due REAL NOT NULL,                      -- seconds of this file's clock; if claimed, the end
    state INTEGER NOT NULL CHECK (state IN (0, 1, 2)),  -- ahead, waiting, dead
    attempts INTEGER NOT NULL,
    doubtful INTEGER NOT NULL,
    reason TEXT NOT NULL,
    first_failed_at INTEGER NOT NULL,       -- microseconds since the epoch
    message_id TEXT NOT NULL,
    task_type TEXT NOT NULL,
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    properties BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX messages_by_state ON messages (state, key, due);
CREATE TABLE quarantine AS SELECT * FROM messages;
CREATE TABLE clock (boot TEXT NOT NULL, shift REAL NOT NULL, horizon REAL NOT NULL);
INSERT INTO clock VALUES ('', 0.0, 0.0);
"""
"""Counts and due rows are found in the index alone, without a look at the messages."""

_HEAD = (
    "claimed, due, state, attempts, doubtful, reason, first_failed_at, "
    "message_id, task_type, exchange, routing_key, checksum, properties, body"
)
_HEAD_WIDTH = len(_HEAD.split(","))

_DUE = "(due <= :now OR due > :now + (SELECT horizon FROM clock))"

_DUE_KEYS = " UNION ALL ".join(
    f"SELECT * FROM (SELECT key FROM messages INDEXED BY messages_by_state"
    f" WHERE state = {state:d} AND {_DUE} ORDER BY key LIMIT :limit)"
    for state in State
)

_SIZE = "coalesce(length(properties), 0) + coalesce(length(body), 0)"


def _within_room(keys: str) -> str:
    """Give the statement for a JSON array of the first of these keys, as many as ``room`` has."""
    return f"""
    SELECT json_group_array(key) FROM (
        SELECT key, size, sum(size) OVER (ORDER BY key) AS total
        FROM (SELECT key, {_SIZE} AS size FROM messages WHERE key IN ({keys}))
    ) WHERE total - size < :room
    """


DUE = _within_room(f"SELECT key FROM ({_DUE_KEYS}) ORDER BY key LIMIT :limit")
"""Keys of what is due, for ``now``, ``limit`` and ``room``."""

LETTERS = _within_room(
    f"SELECT key FROM messages INDEXED BY messages_by_state"
    f" WHERE state = {State.DEAD:d} AND key > :after ORDER BY key LIMIT :limit"
)
"""Keys of dead letters, for ``after``, ``limit`` and ``room``."""

LETTER = (
    f"SELECT count(*) FROM messages WHERE key = :key AND token = :token AND state = {State.DEAD:d}"
    f" AND (claimed = 0 OR {_DUE})"
)
"""Whether a letter can be claimed: for ``key``, ``token`` and ``now``."""

_NUMBERS = ("attempts", "doubtful", "first_failed_at", "checksum")
_PIECES = ("reason", "message_id", "task_type", "exchange", "routing_key", "properties", "body")

READ = (
    "SELECT json_group_array(json_array(key, token, state, "
    + ", ".join(f"CAST({number} AS INTEGER)" for number in _NUMBERS)
    + ", "
    + ", ".join(f"length(CAST({piece} AS BLOB))" for piece in _PIECES)
    + ")), CAST(group_concat("
    + " || ".join(f"CAST({piece} AS TEXT)" for piece in _PIECES)
    + ", '') AS BLOB) FROM messages WHERE key IN (SELECT value FROM json_each(?))"
)
"""Rows, for a JSON array of keys: numbers and lengths, and then all texts and bytes in one."""

CLAIM = (
    "UPDATE messages SET token = token + 1, doubtful = max(doubtful, claimed), claimed = 1,"
    " due = ?, state = max(state, 1) WHERE key IN (SELECT value FROM json_each(?))"
)

HELD = (
    "SELECT json_group_array(m.key) FROM json_each(?) AS c CROSS JOIN messages AS m"
    " ON m.key = json_extract(c.value, '$[0]') AND m.token = json_extract(c.value, '$[1]')"
    " WHERE m.claimed = 1"
)
"""Keys of the claims that hold, for a JSON array of keys and tokens."""

RENEW = "UPDATE messages SET due = ? WHERE key IN (SELECT value FROM json_each(?))"

GIVE_BACK = (
    "UPDATE messages SET due = ?, claimed = 0, doubtful = 1"
    " WHERE key IN (SELECT value FROM json_each(?))"
)

DONE = "DELETE FROM messages WHERE token = ? AND key IN (SELECT value FROM json_each(?))"

TRACE = (
    "SELECT json_group_array(json_array(key, token)) FROM messages"
    " WHERE key IN (SELECT value FROM json_each(?))"
)
"""Keys and tokens of those of these rows that are there."""

DEPTH = (
    "SELECT (SELECT count(*) FROM messages),"
    f" (SELECT count(*) FROM messages WHERE state = {State.DEAD:d}),"
    f" (SELECT count(*) FROM messages WHERE state = {State.AHEAD:d} AND NOT {_DUE})"
)
"""All, the dead, and those stored ahead that are still claimed, for ``now``."""

_BY_KEYS = "FROM messages WHERE key IN (SELECT value FROM json_each(?))"
QUARANTINE = (f"INSERT INTO quarantine SELECT * {_BY_KEYS}", f"DELETE {_BY_KEYS}")


@lru_cache
def insert(rows: int) -> str:
    """Give the statement that stores this many rows, without those that are all NULL."""
    values = _values(rows, _HEAD_WIDTH)
    return (
        f"INSERT INTO messages (token, {_HEAD}) SELECT {FIRST_TOKEN}, * FROM ({values})"
        " WHERE column1 IS NOT NULL"
    )


@lru_cache
def change(rows: int) -> str:
    """Give the statement that changes this many rows; NULL changes nothing of the message."""
    names = _HEAD.split(", ")
    kept = names[names.index("message_id") :]
    sets = [
        f"{name} = coalesce(new.column{place}, {name})"
        if name in kept
        else f"{name} = new.column{place}"
        for place, name in enumerate(names, 2)
    ]
    values = _values(rows, _HEAD_WIDTH + 1)
    return f"UPDATE messages SET {', '.join(sets)} FROM ({values}) AS new WHERE key = new.column1"


def _values(rows: int, width: int) -> str:
    row = f"({', '.join('?' * width)})"
    return f"VALUES {', '.join([row] * rows)}"


def in_pieces(rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, list[Any]]]:
    """Split rows for statements whose numbers of rows are few, and so stay prepared.

    :returns: the number of rows of a statement, and its parameters
    """
    largest = max((len(row[-1] or b"") + len(row[-2] or b"") for row in rows), default=0)
    most = max(1, min(MOST_ROWS, MOST_BYTES // (largest + 1)))
    start = 0
    while start < len(rows):
        left = min(most, len(rows) - start)
        size = 1 << (left - 1).bit_length()
        if size > most or (size > FEW_ROWS and size - left > size // 4):
            size //= 2
        piece = rows[start : start + size]
        values = [value for row in piece for value in row]
        yield size, values + [None] * (len(rows[0]) * (size - len(piece)))
        start += size


def entry_row(entry: Entry, due: float) -> tuple[Any, ...]:
    """Give the fields of what is to be stored."""
    state = State.AHEAD if entry.ahead and entry.delay is None else _state(entry.record)
    return (*_known(entry.record, entry.delay, due, state), *_message(entry.record.envelope))


def change_row(change: Change, due: float) -> tuple[Any, ...]:
    """Give key and fields of what has changed: a message only where it is a dead letter now."""
    record = change.record
    message = _message(record.envelope) if record.dead else (None,) * 7
    return (change.claim.key, *_known(record, change.delay, due, _state(record)), *message)


def _known(record: Record, delay: float | None, due: float, state: int) -> tuple[Any, ...]:
    return (
        int(delay is None),
        due,
        state,
        record.attempts,
        int(record.doubtful),
        record.reason.encode(errors="replace").decode(),
        round(record.first_failed_at * MICROSECONDS),
    )


def _state(record: Record) -> int:
    return State.DEAD if record.dead else State.WAITING


def _message(envelope: Envelope) -> tuple[Any, ...]:
    route = envelope.message_id, envelope.task_type, envelope.exchange, envelope.routing_key
    checksum = _checksum("\0".join(route).encode(), envelope.properties, envelope.body)
    return (*route, checksum, envelope.properties, envelope.body)


def _checksum(route: bytes, properties: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(properties, zlib.crc32(route)))


@frozen
class Found:
    """What was read: rows by key, and the keys of those that are damaged."""

    rows: list[Row]
    damaged: list[int]


def found(numbers: str, content: bytes | None) -> Found:
    """Read what `READ` gives."""
    rows = []
    damaged = []
    whole = content or b""
    start = 0
    for each in json.loads(numbers):
        pieces = []
        for length in each[7:]:
            end = start + (length or 0)
            pieces.append(whole[start:end])
            start = end
        row = _row(each, pieces)
        if row is None:
            damaged.append(each[0])
        else:
            rows.append(row)
    rows.sort(key=lambda row: row.claim.key)
    return Found(rows, damaged)


def _row(numbers: Sequence[Any], pieces: Sequence[bytes]) -> Row | None:
    key, token, state, attempts, doubtful, first_failed_at, checksum, *_ = numbers
    reason, *route, properties, body = pieces
    try:
        if checksum != _checksum(b"\0".join(route), properties, body) or attempts < 0:
            return None
        texts = [text.decode() for text in route]
        envelope = Envelope(texts[0], texts[1], texts[2], texts[3], properties, body)
        since = first_failed_at / MICROSECONDS
        record = Record(envelope, attempts, doubtful == 1, state == _DEAD, reason.decode(), since)
    except (UnicodeDecodeError, TypeError):
        return None
    return Row(Claim(key, token), record)


def fate(claim: Claim, token: int | None) -> RowFate:
    """Say what became of a row that has this token now."""
    if token is None:
        return RowFate.MISSING
    return RowFate.HELD if token == claim.token else RowFate.TAKEN


def pairs(claims: Iterable[Claim]) -> str:
    """Write claims for a statement."""
    return json.dumps([[claim.key, claim.token] for claim in claims])
