"""The SQLite store's tables and statements; messages written as rows, and rows read back.

A statement handles many rows, and returns what it finds as one value. ``sqlite3`` releases the GIL
for each step of a statement, and so for each row that it returns, and getting the lock back from a
busy thread can take 5 ms (``sys.getswitchinterval``).

What comes from the file is not trusted: type and range of each field are checked, and the message
by its checksum.

Runs on: the retry thread.
"""

# ruff: noqa: S608 - statements are made of constants, and data comes as parameters
from __future__ import annotations

import enum
import json
import secrets
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from attrs import field, frozen

from mlproducer.message import Envelope
from mlproducer.stores.protocol import (
    FATES_LAST,
    MOST_ATTEMPTS,
    MOST_FATES,
    Change,
    Claim,
    Entry,
    Record,
    Row,
    RowFate,
    policy_text,
    read_policy,
)
from mlproducer.stores.sqlite.owners import UNKNOWN_OWNER

MICROSECONDS = 1_000_000

LATEST = 2**53
"""The latest time that is accepted, in microseconds since the epoch: in the year 2255."""

MOST_TOKEN = 2**62

_STEP_BITS = 40

MOST_ROWS = 512
FEW_ROWS = 64
"""Up to this number one statement stores all rows, even if many of its lines stay empty."""

MOST_BYTES = 16 * 1024 * 1024
"""Bytes that one statement stores at most; SQLite accepts 32,766 parameters."""


class State(enum.IntEnum):
    """The state of a row; AHEAD until its first claim ends."""

    AHEAD = 0
    WAITING = 1
    DEAD = 2


_DEAD = int(State.DEAD)  # an int, since comparing with an enum's member is slower

_TABLES = """
CREATE TABLE messages (
    key INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, nor in a later file
    token INTEGER NOT NULL,                 -- the fence; odd: its deletion leaves a fate
    owner INTEGER NOT NULL,                 -- of the claim; 0: not claimed
    due REAL NOT NULL,                      -- by this file's clock, in seconds; of a claim, its end
    state INTEGER NOT NULL CHECK (state IN (0, 1, 2)),  -- ahead, waiting, dead
    attempts INTEGER NOT NULL,
    doubtful INTEGER NOT NULL,
    reason TEXT NOT NULL,
    retry TEXT NOT NULL,                    -- the policy of a message that has its own
    first_failed_at INTEGER NOT NULL,       -- microseconds since the epoch
    accepted_at INTEGER NOT NULL,           -- likewise
    origin INTEGER NOT NULL,                -- the owner that stored it
    message_id TEXT NOT NULL,
    task_type TEXT NOT NULL,
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    properties BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX messages_by_state ON messages (state, key, due, owner);
CREATE TABLE quarantine AS SELECT * FROM messages;
CREATE TABLE owners (
    number INTEGER PRIMARY KEY,
    place INTEGER NOT NULL                  -- the file that its lock is in
);
CREATE TABLE fates (                        -- of rows that another than their origin deleted
    key INTEGER PRIMARY KEY,
    dead INTEGER NOT NULL,
    since REAL NOT NULL                     -- seconds of this file's clock
);
"""
"""The index alone is enough to count rows and to find those that are due."""

SCHEMA = f"""
{_TABLES}
CREATE TABLE clock (boot TEXT NOT NULL, shift REAL NOT NULL, horizon REAL NOT NULL);
INSERT INTO clock VALUES ('', 0.0, 0.0);
INSERT INTO sqlite_sequence VALUES ('messages', 0);
"""

_OLD = (
    "key, token * 2, claimed, due, state, attempts, doubtful, reason, '', first_failed_at, 0,"
    f" {UNKNOWN_OWNER}, message_id, task_type, exchange, routing_key, checksum, properties, body"
)
MIGRATION = f"""
DROP INDEX messages_by_state;
ALTER TABLE messages RENAME TO old_messages;
ALTER TABLE quarantine RENAME TO old_quarantine;
{_TABLES}
INSERT INTO messages SELECT {_OLD} FROM old_messages;
INSERT INTO quarantine SELECT {_OLD} FROM old_quarantine;
DELETE FROM sqlite_sequence WHERE name = 'messages';
INSERT INTO sqlite_sequence SELECT 'messages', seq FROM sqlite_sequence WHERE name = 'old_messages';
INSERT INTO sqlite_sequence SELECT 'messages', 0 WHERE NOT EXISTS
    (SELECT * FROM sqlite_sequence WHERE name = 'messages');
DROP TABLE old_messages;
DROP TABLE old_quarantine;
"""
"""From schema 1, whose claims were 0 or 1."""

_HEAD = (
    "owner, due, state, attempts, doubtful, reason, retry, first_failed_at, "
    "message_id, task_type, exchange, routing_key, checksum, properties, body"
)
_HEAD_WIDTH = len(_HEAD.split(","))

_DUE = "(due <= :now OR due > :now + (SELECT horizon FROM clock))"

_STATES = (*(f"state = {state:d}" for state in State), "state < 0", f"state > {State.DEAD:d}")
_DUE_KEYS = " UNION ALL ".join(
    f"SELECT * FROM (SELECT key FROM messages INDEXED BY messages_by_state"
    f" WHERE {states} AND {_DUE} ORDER BY key LIMIT :limit)"
    for states in _STATES
)
"""For each state, and for numbers that are none: a damaged row must not wait for ever."""

_SIZE = "coalesce(length(properties), 0) + coalesce(length(body), 0)"


def _within_room(keys: str) -> str:
    """Return the statement for a JSON array of the first of these keys, up to ``room`` bytes."""
    return f"""
    SELECT json_group_array(key) FROM (
        SELECT key, size, sum(size) OVER (ORDER BY key) AS total
        FROM (SELECT key, {_SIZE} AS size FROM messages WHERE key IN ({keys}))
    ) WHERE total - size < :room
    """


DUE = _within_room(f"SELECT key FROM ({_DUE_KEYS}) ORDER BY key LIMIT :limit")
"""Selects the keys of due rows, for ``now``, ``limit`` and ``room``."""

LETTERS = _within_room(
    f"SELECT key FROM messages INDEXED BY messages_by_state"
    f" WHERE state = {State.DEAD:d} AND key > :after ORDER BY key LIMIT :limit"
)
"""Selects the keys of dead letters, for ``after``, ``limit`` and ``room``."""

LETTER = (
    f"SELECT count(*) FROM messages WHERE key = :key AND token = :token AND state = {State.DEAD:d}"
    f" AND (owner = 0 OR {_DUE})"
)
"""Selects whether a dead letter can be claimed, for ``key``, ``token`` and ``now``."""

_NUMBERS = ("token", "state", "attempts", "doubtful", "first_failed_at", "accepted_at", "checksum")
_PIECES = (
    *("reason", "retry", "message_id", "task_type", "exchange", "routing_key", "properties"),
    "body",
)
_FIRST_LENGTH = 1 + len(_NUMBERS)

READ = (
    "SELECT json_group_array(json_array(key, "
    + ", ".join(f"CAST({number} AS INTEGER)" for number in _NUMBERS)
    + ", "
    + ", ".join(f"length(CAST({piece} AS BLOB))" for piece in _PIECES)
    + ")), CAST(group_concat("
    + " || ".join(f"CAST({piece} AS TEXT)" for piece in _PIECES)
    + ", '') AS BLOB) FROM messages WHERE key IN (SELECT value FROM json_each(?))"
)
"""Selects rows, for a JSON array of keys: numbers and lengths, and one blob of all texts."""

CLAIM = (
    "UPDATE messages SET token = (token | 1) + :step"
    " + (origin <> :me AND origin IN (SELECT number FROM owners)),"
    " doubtful = max(doubtful, owner <> 0), owner = :me, due = :due,"
    f" state = CASE state WHEN {State.DEAD:d} THEN {State.DEAD:d} ELSE {State.WAITING:d} END"
    " WHERE key IN (SELECT value FROM json_each(:keys))"
)
"""Claims rows. The step is odd: the token becomes odd where another owner stored the row."""

HELD = (
    "SELECT json_group_array(m.key) FROM json_each(?) AS c CROSS JOIN messages AS m"
    " ON m.key = json_extract(c.value, '$[0]') AND m.token = json_extract(c.value, '$[1]')"
    " WHERE m.owner <> 0"
)
"""Selects the keys of the claims that hold, for a JSON array of keys and tokens."""

RENEW = "UPDATE messages SET due = ? WHERE key IN (SELECT value FROM json_each(?))"

_OWNED = "SELECT key FROM messages INDEXED BY messages_by_state WHERE owner"

GIVE_BACK = (
    f"UPDATE messages SET due = :now, owner = 0, doubtful = 1 WHERE key IN ({_OWNED} = :me)",
    "DELETE FROM owners WHERE number = :me",
)
"""Make one owner's claims due, and delete the owner."""

_DEAD_ONES = "(SELECT value FROM json_each(:dead))"
TAKE_OVER = (
    f"UPDATE messages SET due = :now WHERE key IN ({_OWNED} IN {_DEAD_ONES})",
    f"DELETE FROM owners WHERE number IN {_DEAD_ONES}",
)
"""Make the claims of dead owners due. They remain claims, so that the next one makes the rows
doubtful."""

OWNERS = "SELECT json_group_array(json_array(number, place)) FROM owners"

ENTER = (
    "INSERT OR REPLACE INTO owners VALUES (:me, :place)",
    "UPDATE sqlite_sequence SET seq = seq + :step WHERE name = 'messages'",
)
"""Record an owner, and skip keys, which may have been used in an earlier state of this file."""

DONE = "DELETE FROM messages WHERE token = ? AND key IN (SELECT value FROM json_each(?))"

LEAVE_FATES = (
    f"INSERT OR REPLACE INTO fates SELECT key, state = {State.DEAD:d}, ? FROM messages"
    " WHERE token = ? AND key IN (SELECT value FROM json_each(?))"
)

FORGET_FATES = (
    f"DELETE FROM fates WHERE since NOT BETWEEN :now - {FATES_LAST} AND :now"
    f" OR key <= (SELECT key FROM fates ORDER BY key DESC LIMIT 1 OFFSET {MOST_FATES})"
)

TRACE = (
    "SELECT (SELECT json_group_array(json_array(key, token)) FROM messages"
    " WHERE key IN (SELECT value FROM json_each(:keys))),"
    " (SELECT json_group_array(json_array(key, dead)) FROM fates"
    " WHERE key IN (SELECT value FROM json_each(:keys)))"
)
"""Selects tokens of the rows that exist, and fates of those that do not, each with its key."""

DEPTH = (
    "SELECT (SELECT count(*) FROM messages),"
    f" (SELECT count(*) FROM messages WHERE state = {State.DEAD:d}),"
    f" (SELECT count(*) FROM messages WHERE state = {State.AHEAD:d} AND NOT {_DUE}"
    " AND owner NOT IN (SELECT value FROM json_each(:gone)))"
)
"""Counts all rows, dead letters, and rows stored ahead whose claim holds."""

_BY_KEYS = "FROM messages WHERE key IN (SELECT value FROM json_each(?))"
QUARANTINE = (f"INSERT INTO quarantine SELECT * {_BY_KEYS}", f"DELETE {_BY_KEYS}")


@lru_cache
def insert(rows: int) -> str:
    """Return the statement that stores this many rows, except those that are all NULL.

    Its first two parameters are token and origin.
    """
    values = _values(rows, _HEAD_WIDTH + 1)
    return (
        f"INSERT INTO messages (token, origin, accepted_at, {_HEAD})"
        f" SELECT ?, ?, * FROM ({values}) WHERE column1 IS NOT NULL"
    )


@lru_cache
def change(rows: int) -> str:
    """Return the statement that changes this many rows; NULL keeps a field of the message."""
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
    """Split rows into statements of few different sizes, so that these stay prepared.

    :returns: the number of rows of each statement, and its parameters
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


@frozen
class Fence:
    """What makes the tokens of one user of one file unlike all others, earlier files' included.

    All rows of one `put` have the same token, so that few statements name many rows.

    :ivar first: the token of rows that are stored
    :ivar step: by how much a token grows when its row is claimed; odd
    """

    first: int = field(factory=lambda: (1 << 51) + 2 * secrets.randbits(50))
    step: int = field(factory=lambda: 1 + 2 * secrets.randbits(_STEP_BITS))


def entry_row(entry: Entry, due: float, owner: int) -> tuple[Any, ...]:
    """Return the fields of an entry to be stored; without a delay it is claimed by ``owner``."""
    record = entry.record
    holder = owner if entry.delay is None else 0
    state = State.AHEAD if entry.ahead and holder else _state(record)
    accepted = round(record.accepted_at * MICROSECONDS)
    return (accepted, *_known(record, holder, due, state), *_message(record.envelope))


def change_row(change: Change, due: float, owner: int) -> tuple[Any, ...]:
    """Return key and new fields of a row; the message only where a dead letter replaces it."""
    record = change.record
    holder = owner if change.delay is None else 0
    message = _message(record.envelope) if record.dead else (None,) * 7
    return (change.claim.key, *_known(record, holder, due, _state(record)), *message)


def _known(record: Record, owner: int, due: float, state: int) -> tuple[Any, ...]:
    return (
        owner,
        due,
        state,
        record.attempts,
        int(record.doubtful),
        record.reason.encode(errors="replace").decode(),
        policy_text(record.retry),
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
    """Rows that were read, by key, and the keys of damaged ones."""

    rows: list[Row]
    damaged: list[int]


def read(numbers: str, content: bytes | None) -> Found:
    """Return the rows of a result of `READ`."""
    rows = []
    damaged = []
    whole = content or b""
    routes: dict[Sequence[bytes], tuple[str, str, str]] = {}
    start = 0
    for each in json.loads(numbers):
        pieces = []
        for length in each[_FIRST_LENGTH:]:
            end = start + (length or 0)
            pieces.append(whole[start:end])
            start = end
        row = _row(each, pieces, routes)
        if row is None:
            damaged.append(each[0])
        else:
            rows.append(row)
    rows.sort(key=lambda row: row.claim.key)
    return Found(rows, damaged)


def _row(
    numbers: Sequence[Any],
    pieces: Sequence[bytes],
    routes: dict[Sequence[bytes], tuple[str, str, str]],
) -> Row | None:
    """Read one row.

    :param routes: decoded names, which most rows share
    """
    key, token, state, attempts, doubtful, first_failed_at, accepted_at, checksum, *_ = numbers
    reason, retry, message_id, task_type, exchange, routing_key, properties, body = pieces
    try:
        times = 0 <= first_failed_at <= LATEST and 0 <= accepted_at <= LATEST
        if not times or not 0 < token <= MOST_TOKEN or not 0 <= attempts <= MOST_ATTEMPTS:
            return None
        route = (task_type, exchange, routing_key)
        if checksum != _checksum(b"\0".join((message_id, *route)), properties, body):
            return None
        names = routes.get(route)
        if names is None:
            names = routes[route] = task_type.decode(), exchange.decode(), routing_key.decode()
        envelope = Envelope(message_id.decode(), *names, properties, body)
        record = Record(
            envelope,
            attempts,
            doubtful != 0,
            state == _DEAD,
            reason.decode(),
            first_failed_at / MICROSECONDS,
            accepted_at / MICROSECONDS,
            read_policy(retry.decode()) if retry else None,
        )
    except (ValueError, TypeError):
        return None
    return Row(Claim(key, token), record)


def fates(claims: Sequence[Claim], tokens: str, ends: str) -> list[RowFate]:
    """Return the fates in a result of `TRACE`."""
    there: dict[int, int] = dict(json.loads(tokens))
    gone: dict[int, int] = dict(json.loads(ends))
    found = []
    for claim in claims:
        if claim.key in there:
            held = there[claim.key] == claim.token
            found.append(RowFate.HELD if held else RowFate.TAKEN)
        elif claim.key in gone:
            found.append(RowFate.DEAD_LETTERED if gone[claim.key] else RowFate.CONFIRMED)
        else:
            found.append(RowFate.MISSING)
    return found


def pairs(claims: Iterable[Claim]) -> str:
    """Return claims as a JSON array of keys and tokens."""
    return json.dumps([[claim.key, claim.token] for claim in claims])
