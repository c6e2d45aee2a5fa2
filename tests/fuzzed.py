"""What is given random input by `tests.fuzz`: each reader of what others write, with its seeds.

Runs on: the main thread.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import socket
import sqlite3
import weakref
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any
from unittest.mock import patch

from pika import frame, spec

from mlproducer import MLProducer, Settings
from mlproducer import _broker_url as broker_url
from mlproducer import _http_server as http_server
from mlproducer._core.interfaces import Confirm, Loss
from mlproducer._engine import connection as connections
from mlproducer._engine.connection import Connection, EventLoop, IOServices
from mlproducer._engine.dead_letter_reader import Letter, stored_letter
from mlproducer._engine.endpoints import Endpoints
from mlproducer._wire.encode import Encoder
from mlproducer.cli import task_lines
from mlproducer.errors import ConfigurationError, InvalidTaskError, PublishError
from mlproducer.message import Envelope, Message
from mlproducer.settings import RetryPolicy
from mlproducer.stores.postgres import rows as postgres
from mlproducer.stores.postgres.sql import DEAD
from mlproducer.stores.protocol import LATEST, Entry, Record, Row
from mlproducer.stores.redis import rows as redis
from mlproducer.stores.sqlite import rows as sqlite
from mlproducer.wsgi import make_app
from tests.fuzz import Target
from tests.pure.refusals import CANARY

REFUSED, ACCEPTED = "refused", "accepted"


# --- frames of a broker ------------------------------------------------------------------------


class _Transport:
    """What pika is given in place of a socket: it takes everything, and can be ended."""

    def __init__(self, protocol: Any) -> None:
        self.protocol = protocol
        self.written = 0
        self.ended = False
        self.lost: Callable[[], None] = self.eof

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def get_protocol(self) -> Any:
        return self.protocol

    def abort(self) -> None:
        if not self.ended:
            self.ended = True
            self.lost = partial(self.protocol.connection_lost, None)

    def eof(self) -> None:
        assert not self.protocol.eof_received()
        self.protocol.connection_lost(None)


class _Services(IOServices):
    """Connects at once, to no one."""

    transport: _Transport | None = None
    last: _Services

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        type(self).last = self

    def connect_socket(self, sock: socket.socket, resolved_addr: Any, on_done: Any) -> Any:
        return self.call_later(0, partial(on_done, None))

    def create_streaming_connection(
        self, protocol_factory: Any, sock: socket.socket, on_done: Any, **tls: Any
    ) -> Any:
        sock.close()
        return self.call_later(0, partial(self._made, protocol_factory(), on_done))

    def _made(self, protocol: Any, on_done: Any) -> None:
        self.transport = _Transport(protocol)
        protocol.connection_made(self.transport)
        on_done((self.transport, protocol))

    def sever(self) -> None:
        if self.transport is not None and not self.transport.ended:
            self.transport.ended = True  # as a socket that is shut down: `lost` comes next


class _Owner:
    """Holds what the connection says against what it may say."""

    def __init__(self) -> None:
        self.ready = False
        self.losses: list[Loss] = []

    def connection_ready(self, channel: Any) -> None:
        self.ready = True

    def connection_failed(self, loss: Loss) -> None:
        self.losses.append(loss)
        _clear(loss.text)

    def channel_lost(self, loss: Loss) -> None:
        assert not self.losses
        _clear(loss.text or "empty")

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        _clear(reason or "empty")

    def topology_fault(self, declaration: Any, loss: Loss) -> None:
        _clear(loss.text or "empty")

    def probe_refused(self, loss: Loss) -> None:
        _clear(loss.text or "empty")

    def acked(self, confirms: Sequence[Confirm]) -> None:
        assert self.ready
        assert not self.losses
        assert all(type(tag) is int for tag, _ in confirms)

    nacked = acked

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        assert not self.losses
        assert type(tag) is int
        _clear(reply_text or "empty")

    def letters_refused(self, tags: Sequence[int], loss: Loss) -> None:
        _clear(loss.text or "empty")


def _clear(text: str) -> None:
    """Expect an error's text that is there, and fits a line of a log."""
    assert text
    assert text.isprintable(), ascii(text)
    assert len(text) < 3000


def _deep(depth: int) -> bytes:
    """Return a field table in a field table in ..., which pika reads by recursion."""
    table = b""
    for _ in range(depth):
        table = b"\x01kF" + len(table).to_bytes(4, "big") + table
    return len(table).to_bytes(4, "big") + table


def _frames() -> Target:
    def method(channel: int, what: Any) -> bytes:
        return bytes(frame.Method(channel, what).marshal())

    properties = spec.BasicProperties(cluster_id="1", headers={"x": [1, {"y": None}]})
    header = bytes(frame.Header(1, 4, properties).marshal())
    nested = b"\x00\x3c\x00\x00" + (4).to_bytes(8, "big") + b"\x20\x00" + _deep(3000)
    start = spec.Connection.Start(
        0,
        9,
        {
            "product": "RabbitMQ",
            "capabilities": {"publisher_confirms": True, "basic.nack": True},
        },
        "PLAIN",
        "en_US",
    )
    handshake = [
        method(0, start),
        method(0, spec.Connection.Tune(10, 131072, 60)),
        method(0, spec.Connection.OpenOk()),
        method(1, spec.Channel.OpenOk()),
        method(1, spec.Confirm.SelectOk()),
    ]
    returned = method(1, spec.Basic.Return(312, "NO_ROUTE", "x", "k")) + header
    later = [
        method(1, spec.Basic.Ack(1, True)),
        method(1, spec.Basic.Nack(2**63, False)),
        returned + bytes(frame.Body(1, b"body").marshal()),
        method(0, spec.Connection.Blocked("low on memory")),
        method(0, spec.Connection.Unblocked()),
        method(1, spec.Channel.Close(404, "no exchange 'x'", 60, 40)),
        method(1, spec.Channel.OpenOk()),
        method(1, spec.Confirm.SelectOk()),
        method(0, spec.Connection.Close(320, "CONNECTION_FORCED", 0, 0)),
        method(0, spec.Connection.Secure(b"?")),
        method(0, spec.Connection.CloseOk()),
        method(1, spec.Channel.Flow(False)),
        method(1, spec.Basic.Cancel("c")),
        method(1, spec.Basic.Deliver("c", 1, False, "x", "k")),
        bytes(frame.Heartbeat().marshal()),
        b"\x02\x00\x01" + len(nested).to_bytes(4, "big") + nested + b"\xce",
        b"\x03\x00\x01\x00\x00\x00\x00\xce",
        b"AMQP\x00\x00\x09\x01",
    ]
    shaken = b"".join(handshake)
    seeds = [shaken, *later, b"".join(later[:8]), b"".join(later[:3]), returned + later[-2] * 3]
    [endpoint] = Endpoints(Settings(url="amqp://u:p@127.0.0.1/", declare_topology="off")).known
    resolved = endpoint.find()
    marks = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\xce", b"S", b"F", b"A", b"T", b"D", b"x")
    read = partial(_read_frames, resolved, shaken)
    return Target(seeds, [*handshake, *later, *later, *marks], read)


def _read_frames(resolved: Any, shaken: bytes, data: bytes, dice: random.Random) -> str:
    if not data.startswith(shaken[:11]):
        data = shaken + data
    loop, owner = EventLoop(), _Owner()
    with patch.object(connections, "IOServices", _Services):
        Connection(loop, resolved, resolved.addresses[0], (10.0, 20.0), owner)
    for _ in range(10):  # its steps until there is a stream
        loop.process_timeouts()
    transport = _Services.last.transport
    assert transport is not None, "pika has other steps between socket and stream now"
    while data and not transport.ended:
        # A frame at a time, mostly, since a broker answers; sometimes all at once.
        size = int.from_bytes(data[3:7], "big") + 8 if dice.random() < 0.95 else len(data)
        piece, data = data[:size], data[size:]
        try:
            transport.protocol.data_received(piece)
        except Exception as error:  # noqa: BLE001 - pika's transport ends the connection by it
            transport.ended = True
            transport.lost = partial(transport.protocol.connection_lost, error)
        loop.process_timeouts()
    transport.lost()
    loop.process_timeouts()
    loop.close()
    assert len(owner.losses) == 1, owner.losses
    return "opened" if owner.ready else owner.losses[0].kind.value


# --- rows of the stores ------------------------------------------------------------------------


def _record(**given: Any) -> Record:
    envelope = Envelope("id-1", "raw", "x", "ml.embed", b"\x10\x00", b'{"text": 1}')
    retry = RetryPolicy(3, 1.0, 10.0)
    return Record(envelope, 2, False, False, "NackError: no", 1.7e9, 1.7e9, retry, **given)


def _check(row: Row) -> str:
    """Expect only what the rest of the library can work with."""
    record, envelope = row.record, row.record.envelope
    assert 0 < row.claim.key <= 2**63 and 0 < row.claim.token <= 2**63  # noqa: PT018
    assert 0 <= record.attempts < 2**31
    assert 0.0 <= record.first_failed_at <= LATEST
    assert 0.0 <= record.accepted_at <= LATEST
    for text in (envelope.message_id, envelope.task_type, envelope.exchange, record.reason):
        assert isinstance(text, str)
    assert isinstance(envelope.body, bytes)
    stored_letter(envelope)
    return ACCEPTED


_SPLIT = b"\x1e"
"""Stands between the fields of a row in an input."""


def _redis_rows() -> Target:
    fields = redis.entry_fields(Entry(_record()))
    message_id, route, properties, body, checksum = fields[2:7]
    numbers = f"1 2 0 {checksum} 1700000000000000".encode()
    seed = [numbers, message_id, route, properties, body, fields[1]]
    words = [_SPLIT, b"null", b"true", b"-1", b"1e999", b"9" * 5000, b"[" * 100_000, b"{}", b'"']
    return Target([_joined(seed)], words, _read_redis_row)


def _joined(fields: Sequence[Any]) -> bytes:
    return _SPLIT.join(each if isinstance(each, bytes) else str(each).encode() for each in fields)


def _read_redis_row(data: bytes, dice: random.Random) -> str:
    fields = data.split(_SPLIT)
    if len(fields) == 6 and dice.random() < 0.7:  # a checksum that fits: what follows is read
        numbers = fields[0].split(b" ")
        if len(numbers) == 5:
            crc = 0
            for piece in fields[1:5]:
                crc = zlib.crc32(piece, crc)
            numbers[3] = str(crc).encode()
            fields[0] = b" ".join(numbers)
    try:
        return _check(redis.read_row(fields))
    except redis.UnreadableRowError:
        return REFUSED


def _values(data: bytes, dice: random.Random) -> list[Any]:
    """Return the fields of an input as values of any of SQL's types."""
    values: list[Any] = []
    for piece in data.split(_SPLIT):
        made: Any = piece.decode("utf-8", "replace").replace("\0", "")
        if dice.random() < 0.95 and re.fullmatch("-?[0-9]+", made):
            made = max(-(2**63), min(2**63 - 1, int(made[:25])))
        elif dice.random() < 0.05:
            made = dice.choice((None, 1.5, -1, 2**62, float("inf"), piece, ""))
        values.append(made)
    return values


_SQL_WORDS = (_SPLIT, b"-1", b"0", b"9" * 18, b"\\", b"\\x", b"\\N{", b"\\ud800", b"\xff", b"inf")


def _postgres_rows() -> Target:
    record = _record()
    known = (1, 2, DEAD, 2, 0, record.reason, "3 1.0 10.0", 1_700_000_000, 1_700_000_000)
    seed = _joined([*known, *postgres.message_values(record.envelope)])
    return Target([seed], _SQL_WORDS, _read_postgres_row)


def _read_postgres_row(data: bytes, dice: random.Random) -> str:
    values = _values(data, dice)
    values += [None] * (16 - len(values))
    del values[16:]
    values[-2:] = [each.encode() if isinstance(each, str) else each for each in values[-2:]]
    # PostgreSQL has types: these two, which name the row, are numbers.
    values[:2] = [each if isinstance(each, int) and each > 0 else 7 for each in values[:2]]
    if dice.random() < 0.7 and all(isinstance(each, str) for each in values[9:13]):
        crc = zlib.crc32("\0".join(values[9:13]).encode("ascii", errors="replace"))
        for piece in values[-2:]:
            crc = zlib.crc32(piece, crc) if isinstance(piece, bytes) else crc
        values[13] = crc
    try:
        return _check(postgres.read_row(values))
    except postgres.UnreadableRowError:
        return REFUSED


_SQLITE_FIELDS = (
    *("accepted_at", "owner", "due", "state", "attempts", "doubtful", "reason", "retry"),
    *("first_failed_at", "message_id", "task_type", "exchange", "routing_key", "checksum"),
    *("properties", "body"),
)
"""Those of `sqlite.entry_row`, in its order."""


def _sqlite_rows() -> Target:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(sqlite.SCHEMA)
    connection.execute(
        "CREATE TEMP TABLE columns AS SELECT name FROM pragma_table_info('messages')"
    )
    names = [name for (name,) in connection.execute("SELECT name FROM columns")]
    # The same columns without the constraints, which a damaged file does not keep.
    connection.executescript(f"DROP TABLE messages; CREATE TABLE messages ({', '.join(names)});")
    row = dict.fromkeys(names, 0) | dict(
        zip(
            [
                "accepted_at",
                "owner",
                "due",
                "state",
                "attempts",
                "doubtful",
                "reason",
                "retry",
                "first_failed_at",
                "message_id",
                "task_type",
                "exchange",
                "routing_key",
                "checksum",
                "properties",
                "body",
            ],
            sqlite.entry_row(Entry(_record()), 0.0, 1),
            strict=True,
        )
    )
    row |= {"key": 1, "token": 2}
    insert = f"INSERT INTO messages VALUES ({', '.join('?' * len(names))})"
    read = partial(_read_sqlite_row, connection, insert, names)
    target = Target([_joined([row[name] for name in names])], _SQL_WORDS, read)
    weakref.finalize(target, connection.close)
    return target


def _read_sqlite_row(
    connection: sqlite3.Connection,
    insert: str,
    names: list[str],
    data: bytes,
    dice: random.Random,
) -> str:
    values = _values(data, dice)
    values += [None] * (len(names) - len(values))
    del values[len(names) :]
    row = dict(zip(names, values, strict=True)) | {"key": 1}
    if dice.random() < 0.7:
        texts = [_bytes_of(row[name]) for name in names[-7:-3]]
        content = zlib.crc32(_bytes_of(row["properties"]), zlib.crc32(b"\0".join(texts)))
        row["checksum"] = zlib.crc32(_bytes_of(row["body"]), content)
    connection.execute("DELETE FROM messages")
    connection.execute(insert, list(row.values()))
    numbers, content = connection.execute(sqlite.READ, ("[1]",)).fetchone()
    found = sqlite.read(numbers, content)
    assert len(found.rows) + len(found.damaged) == 1
    return _check(found.rows[0]) if found.rows else REFUSED


def _bytes_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b"" if value is None else str(value).encode()


# --- URLs and the environment ------------------------------------------------------------------

_URL_WORDS = [
    *b"@ : / , ; ? # [ ] % & = %2F %40 %00 %ff %zz :// ::1 :99999 \x00 \n \xff \xed\xa0\x80".split(
        b" "
    ),
    *(b"amqps://", b"redis+sentinel://", b"heartbeat=", b"verify=verify_none", b"db=", b"\xc2\xb2"),
    *(b"xn--", b"a." * 200, b"9" * 30, "é".encode(), "\u0661".encode(), b"timeout=nan"),
]


def _text(data: bytes, dice: random.Random) -> str:
    return data.decode("utf-8", dice.choice(("replace", "surrogateescape", "surrogatepass")[:2]))


def _urls() -> Target:
    seeds = [
        f"amqp://user:{CANARY}@host:5672/%2F?heartbeat=30&connection_timeout=500",
        f"amqps://user:{CANARY}@[::1]/v?verify=verify_none,amqp://u:{CANARY}@h2/",
        "amqps://host?auth_mechanism=external&certfile=/c&keyfile=/k&cacertfile=/a",
    ]
    return Target([each.encode() for each in seeds], _URL_WORDS, _read_url)


def _read_url(data: bytes, dice: random.Random) -> str:
    url = _text(data, dice)
    list(broker_url.ignored_parameters(url))
    broker_url.redact_one(url)
    broker_url.redact(url)
    try:
        settings = Settings(url=url)
        shown = f"{settings!r}{settings.brokers!r}"
        answer = ACCEPTED
    except ConfigurationError as error:
        shown, answer = str(error), REFUSED
    assert CANARY not in shown or not _is_password(url), shown
    return answer


def _store_urls() -> Target:
    seeds = [
        "memory://",
        "sqlite:////var/lib/app/store.db?write_ahead=1",
        "sqlite:///relative%20path.db",
        f"redis://user:{CANARY}@host:6379/3?write_ahead=true&timeout=2.5&prefix=p",
        f"rediss://:{CANARY}@[::1]:6380/0?ca_certs=/a&verify=none",
        f"redis+sentinel://u:{CANARY}@a:1,b:2,c/service/1?sentinel_password={CANARY}",
        f"unix://u:{CANARY}@/run/redis.sock?db=2",
        f"postgresql://u:{CANARY}@h1:5432,h2/db?sslmode=require&table=s.t&target_session_attrs=any",
        f"valkeys://:{CANARY}@h",
    ]
    return Target([each.encode() for each in seeds], _URL_WORDS, _read_store_url)


def _read_store_url(data: bytes, dice: random.Random) -> str:
    url = _text(data, dice)
    try:
        shown, answer = repr(Settings(store_url=url)), ACCEPTED
    except ConfigurationError as error:
        shown, answer = str(error), REFUSED
    assert CANARY not in shown or not _is_password(url), shown
    return answer


def _is_password(url: str) -> bool:
    """Return whether the canary is in a URL as a password, and nowhere else."""
    before, found, after = url.partition(f":{CANARY}@")
    return bool(found and re.fullmatch(r"[a-z+]+://[^/?#,;]*", before) and CANARY not in after)


def _environments() -> Target:
    usual = {
        "RABBITMQ_URL": f"amqp://user:{CANARY}@host/",
        "RABBITMQ_AUTH_MECHANISM": "PLAIN",
        "RABBITMQ_HEARTBEAT": "60",
        "RABBITMQ_CONNECTION_TIMEOUT": "10000",
        "RABBITMQ_USE_SSL": "true",
        "RABBITMQ_SSL_SERVER_NAME": "broker",
        "RABBITMQ_SSL_KEY_PASSWORD": CANARY,
        "RABBITMQ_SSL_KEYFILE": "/k",
        "RABBITMQ_SSL_CERTFILE": "/c",
        "RABBITMQ_VERIFY_PEER": "false",
        "RABBITMQ_PREFETCH": "100",
        "PREFERRED_STT": "local",
        "ML_PUBLISH_TIMEOUT": "5000",
        "ML_RECONNECT_JITTER": "0.3",
        "ML_CIRCUIT_BREAKER_MODE": "adaptive",
        "ML_STORE_URL": f"redis://:{CANARY}@h/0",
        "ML_EXCHANGE": "bookmarkai.ml",
        "ML_QUEUE_PREFIX": "p.",
        "ML_DECLARE_TOPOLOGY": "passive",
        "ML_ROLLOUT": "0.5",
    }
    pairs = [f"{name}={value}".encode() for name, value in usual.items()]
    seeds = [b"\n".join(pairs), *pairs]
    words = [*_URL_WORDS, b"nan", b"inf", b"-0", b"1e400", b"0x10", b"1_000", b" ", b"\n", b"yes"]
    return Target(seeds, [*words, *(b"\n" + pair for pair in pairs)], _read_environment)


def _read_environment(data: bytes, dice: random.Random) -> str:
    text = _text(data, dice)
    environ = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
    try:
        shown, answer = repr(Settings.from_env(environ)), ACCEPTED
    except ConfigurationError as error:
        shown, answer = str(error), REFUSED
    told = [name for name, value in environ.items() if CANARY in value and not _secret(name, value)]
    assert CANARY not in shown or told, shown
    return answer


def _secret(name: str, value: str) -> bool:
    url = name in ("RABBITMQ_URL", "ML_STORE_URL")  # in others it is a part of a name
    return name == "RABBITMQ_SSL_KEY_PASSWORD" or (url and _is_password(value))


# --- lines, dead letters, requests -------------------------------------------------------------


def _lines() -> Target:
    moment = "2030-01-31T12:00:00Z"
    share = {"share_id": "s", "content": {"text": "t", "url": "u"}, "priority": 3}
    objects: list[dict[str, Any]] = [
        {"task": "summarization", **share, "options": {"style": "short"}},
        {"task": "transcription", "share_id": "s", "media_url": "https://h/a.mp3"},
        {"task": "embedding", "share_id": "s", "content": {"text": "t", "type": "caption"}},
        {"task": "embedding_batch", "items": [["s", {"text": "t"}], ["s2", {"text": "u"}]]},
        {
            "task": "celery",
            "name": "app.add",
            "args": [1, 2.5, None],
            "kwargs": {"a": {}},
            "routing_key": "k",
            "eta": moment,
            "expires": moment,
            "headers": {"h": [1]},
        },
    ]
    words = [b"NaN", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 2000, b"\\ud800", b"\xff"]
    more = [b"null", b"true", b"[]", b"{}", b"-1", b'""', b"\\u0000", b"\n", b"\xef\xbb\xbf"]
    seeds = [json.dumps(each).encode() for each in objects]
    encoder = Encoder(Settings(max_message_bytes=100_000))
    return Target(seeds, words + more, partial(_read_line, encoder))


def _read_line(encoder: Encoder, data: bytes, dice: random.Random) -> str:
    answer = "empty"
    for line in task_lines.read_lines(io.BytesIO(data), 90_000):
        try:
            encoder.encode(task_lines.parse(line, 90_000))
            answer = ACCEPTED
        except (InvalidTaskError, PublishError) as error:
            _clear(str(error))
            answer = REFUSED
    return answer


def _letters() -> Target:
    death = {
        "reason": "delivery_limit",
        "count": 3,
        "exchange": "x",
        "routing-keys": ["ml.embed"],
        "queue": "q",
        "time": datetime(2026, 1, 1, tzinfo=timezone.utc),
        "original-expiration": "60000",
    }
    ours = {
        "x-death-reason": "NackError: no",
        "x-attempts": 4,
        "x-original-exchange": "x",
        "x-original-routing-key": "k",
        "x-first-failed-at": "2026-01-01T00:00:00Z",
        "x-original-expiration": "60000",
        "task": "app.add",
    }
    level = {**death, "queue": "mlproducer.delay.3"}
    tables = [{"x-death": [death]}, {"x-death": [level, death]}, ours, {**ours, "x-death": []}]
    seeds = [
        b"".join(
            spec.BasicProperties(
                content_type="application/json",
                headers=table,
                delivery_mode=2,
                priority=3,
                message_id="id",
                timestamp=1_700_000_000,
                expiration="60000",
                reply_to="r",
                user_id="u",
                cluster_id="1",
            ).encode()
        )
        for table in tables
    ]
    kinds = [bytes((each,)) for each in b"tbBUuIilLfdDSsATFVx"]
    names = [b"\x07x-death", b"\x05count", b"\x0crouting-keys", b"\x04time", b"\x05queue"]
    return Target(seeds, [*kinds, *names, _deep(50), _deep(5000), b"\xff" * 8], _read_letter)


def _read_letter(data: bytes, dice: random.Random) -> str:
    letter = stored_letter(Envelope("id", "raw", "x", "k", data, b"body"))
    assert isinstance(letter, Letter)
    json.dumps(letter.to_json())
    repr((letter.since, letter.headers, letter.task, letter.content, letter.type))
    for text in (letter.reason, letter.exchange, letter.routing_key, letter.first_failed_at):
        assert isinstance(text, str)
    assert type(letter.attempts) is int
    if letter.message is None:
        assert letter.problem
        return REFUSED
    assert isinstance(letter.message, Message)
    try:
        Encoder(_SETTINGS).encode(letter.message)
    except PublishError as error:
        return "not sent again" if str(error) else "without a word"
    return ACCEPTED


_SETTINGS = Settings(url="amqp://guest:guest@localhost/")


def _requests() -> Target:
    paths = (b"/", b"/health", b"/metrics", b"/metrics/json", b"/page.json", b"/nothing")
    ends = b"\r\nHost: h\r\nAccept: */*\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc"
    seeds = [
        *(b"GET " + path + b" HTTP/1.1" + ends for path in paths),
        b"HEAD http://h:80/health?x=1 HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1" + ends,
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
    ]
    words = [b"\r\n", b"\n", b"\r", b" ", b":", b"//", b"http://[", b"HTTP/9.9", b"HTTP/1.", b"%00"]
    more = [
        b"a" * 70_000,
        b"X: y\r\n" * 300,
        b"\xff",
        b"\x00",
        b"PUT",
        b"%",
        b"Expect: 100-continue",
    ]
    producer = MLProducer(_SETTINGS)
    return Target(seeds, words + more, partial(_read_request, make_app(producer)))


class _Told(logging.Handler):
    """Fails where the server says that a request failed."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]


_TOLD = _Told(logging.ERROR)


def _read_request(app: Any, data: bytes, dice: random.Random) -> str:
    environ = {
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "GATEWAY_INTERFACE": "CGI/1.1",
        "REMOTE_HOST": "",
        "CONTENT_LENGTH": "",
        "SCRIPT_NAME": "",
    }
    head, found, _ = http_server._cut(data)
    if not found and len(data) <= http_server.MAX_HEAD:
        return "waits for more"
    request = http_server._Request(app, environ, ("127.0.0.1", 1), head, complete=found)
    http_server.logger.addHandler(_TOLD)
    try:
        answer = request.answer()
    finally:
        http_server.logger.removeHandler(_TOLD)
    if not answer:
        return "no answer"
    line = answer.split(b"\r\n", 1)[0]
    assert line.startswith(b"HTTP/1."), line
    return line.split(b" ")[1].decode()


TARGETS: dict[str, Callable[[], Target]] = {
    "frames": _frames,
    "sqlite": _sqlite_rows,
    "redis": _redis_rows,
    "postgresql": _postgres_rows,
    "urls": _urls,
    "store-urls": _store_urls,
    "environment": _environments,
    "lines": _lines,
    "letters": _letters,
    "requests": _requests,
}
