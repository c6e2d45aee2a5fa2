"""AMQP encoding: byte for byte what pika writes, and nothing that pika or a broker chokes on."""

from __future__ import annotations

import itertools
import struct
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.serialization import loads
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import frame, spec
from pika.exceptions import ShortStringTooLong, UnsupportedAMQPFieldException

from mlproducer._wire import amqp, raw
from mlproducer._wire.frames import ConfirmReader, FrameWriter
from mlproducer.errors import (
    InvalidMessageError,
    InvalidTaskError,
    MessageTooLargeError,
    MLProducerError,
)
from mlproducer.message import Message

from .refusals import CANARY, refused
from .tables import each_row

CHANNEL = 1
PIKA_REFUSES = (
    struct.error,
    ShortStringTooLong,
    UnsupportedAMQPFieldException,
    UnicodeEncodeError,
    AssertionError,
)


class Level(IntEnum):
    """An int that is more than an int."""

    HIGH = 9


def by_pika(message: Any, tag: int, frame_max: int) -> bytes:
    """Encode as pika's ``Connection._send_message`` does."""
    milliseconds = None if message.expiration is None else str(round(message.expiration * 1000))
    method = spec.Basic.Publish(
        exchange=message.exchange, routing_key=message.routing_key, mandatory=message.mandatory
    )
    timestamp = message.timestamp
    if isinstance(timestamp, datetime):
        timestamp = int(timestamp.timestamp())
    header = spec.BasicProperties(
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=message.headers,
        delivery_mode=2 if message.persistent else 1,
        priority=message.priority,
        correlation_id=message.correlation_id,
        expiration=milliseconds,
        message_id=message.message_id,
        type=message.type,
        reply_to=message.reply_to,
        timestamp=timestamp,
        app_id=message.app_id,
        user_id=message.user_id,
        cluster_id=str(tag),
    )
    size = frame_max - spec.FRAME_HEADER_SIZE - spec.FRAME_END_SIZE
    fragments = [message.body[n : n + size] for n in range(0, len(message.body), size)]
    frames = [frame.Method(CHANNEL, method), frame.Header(CHANNEL, len(message.body), header)]
    frames += [frame.Body(CHANNEL, fragment) for fragment in fragments]
    return b"".join(each.marshal() for each in frames)


def by_us(drawn: Any, tag: int, frame_max: int) -> bytes:
    """Encode as a publisher and the I/O thread do together."""
    message = drawn if isinstance(drawn, Message) else Message(**vars(drawn))
    envelope = raw.encode(message, exchange="unused")
    return FrameWriter(CHANNEL, frame_max).publish([(envelope, tag)])


# A small alphabet reaches every class of character sooner than all of Unicode does.
plain = st.text("ab.é\u20ac\U0001f600", max_size=70)
wild = plain | st.text("a\0\r\n\x7f\ud800é", max_size=6) | st.just("é" * 128)
EDGES = [0, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, -(2**63)]
numbers = st.sampled_from(EDGES)
moments = st.datetimes(
    datetime(1970, 1, 2, tzinfo=None),  # noqa: DTZ001 - Hypothesis wants naive limits
    timezones=st.sampled_from([timezone.utc, timezone(timedelta(hours=-9, minutes=-30))]),
)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | moments
    | plain
    | st.binary(max_size=20)
    | st.just(Level.HIGH)
)
oddities = (
    st.sampled_from([2**63, -(2**63) - 1, (1,), {1}, Decimal(1), object(), b"\xff", "\ud800"])
    | scalars
)


def tables(keys: st.SearchStrategy[str], leaves: st.SearchStrategy[Any]) -> Any:
    """Draw header tables, nested."""
    inner = st.recursive(
        leaves,
        lambda more: st.lists(more, max_size=3) | st.dictionaries(keys, more, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(keys, inner, max_size=4)


def messages(text: st.SearchStrategy[str], headers: st.SearchStrategy[Any], octet: Any) -> Any:
    """Draw the fields of messages of every shape."""
    maybe = st.none() | text
    return fields(
        body=st.binary(max_size=300),
        routing_key=text,
        exchange=text,
        headers=st.none() | headers,
        content_type=maybe,
        content_encoding=maybe,
        priority=st.none() | octet,
        expiration=st.none() | st.floats(0, 4_294_967) | st.integers(0, 4_294_967),
        message_id=text,
        correlation_id=maybe,
        type=maybe,
        persistent=st.booleans(),
        mandatory=st.booleans(),
        reply_to=maybe,
        timestamp=st.none() | st.integers(0, 2**63 - 1) | moments,
        app_id=maybe,
        user_id=maybe,
    )


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[SimpleNamespace]:
    """Draw an object with these attributes, which need not make a message."""
    return st.fixed_dictionaries(strategies).map(lambda drawn: SimpleNamespace(**drawn))


@settings(max_examples=70, deadline=None)
@given(
    messages(plain, tables(plain, scalars), st.integers(0, 255)),
    st.integers(1, 2**64 - 1),
    st.integers(9, 200),
)
def test_is_what_pika_writes(message: Any, tag: int, frame_max: int) -> None:
    """Every message that AMQP can carry is byte for byte pika's, over any number of frames."""
    assert by_us(message, tag, frame_max) == by_pika(message, tag, frame_max)


@settings(max_examples=70, deadline=None)
@given(messages(wild, tables(wild, oddities), st.integers(-1, 300)))
def test_accepts_only_what_pika_can_write(message: Any) -> None:
    """What pika cannot encode is refused; what is accepted is pika's, byte for byte."""
    try:
        theirs: bytes | None = by_pika(message, 1, 4096)
    except PIKA_REFUSES:
        theirs = None
    try:
        ours: bytes | None = by_us(message, 1, 4096)
    except (InvalidTaskError, InvalidMessageError):
        ours = None
    assert ours is None or ours == theirs


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_what_workers_read(number: float) -> None:
    """Pika writes none, and cuts those that it reads; the library of Celery's workers has them."""
    (read,), _ = loads("F", amqp.table("headers", {"a": number}), 0)
    assert read == {"a": number}


@pytest.mark.parametrize("number", EDGES)
def test_encodes_each_int_as_pika_does(number: int) -> None:
    """32 bits where they are enough, 64 beyond."""
    message = Message(body=b"", routing_key="q", exchange="", message_id="1", headers={"n": number})
    assert by_us(message, 1, 4096) == by_pika(message, 1, 4096)


@pytest.mark.parametrize("size", [0, 1, 91, 92, 93, 184, 185, 500])
def test_splits_a_body_as_pika_does(size: int) -> None:
    """Bodies at and around the frame's edge; an empty one has no body frame at all."""
    message = Message(body=b"x" * size, routing_key="q", exchange="", message_id="1")
    assert by_us(message, 1, 100) == by_pika(message, 1, 100)


def marshalled(method: Any, channel: int = CHANNEL) -> bytes:
    """Encode a frame as a broker does."""
    return bytes(frame.Method(channel, method).marshal())


tags = st.integers(0, 2**64 - 1)
settled = st.lists(st.tuples(st.booleans(), tags, st.booleans()), max_size=5)
others = st.sampled_from(
    [
        b"",
        marshalled(spec.Basic.Reject(1)),
        marshalled(spec.Basic.Ack(1), CHANNEL + 1),
        marshalled(spec.Channel.Close(404, "no", 60, 40)),
        bytes(frame.Heartbeat().marshal()),
        marshalled(spec.Basic.Ack(1))[:-1],
        marshalled(spec.Basic.Ack(1))[:-1] + b"\0",
        b"\x01",
    ]
)


@given(settled, others, settled)
def test_reads_the_confirms_that_come_first(
    first: list[tuple[bool, int, bool]], other: bytes, later: list[tuple[bool, int, bool]]
) -> None:
    """Up to the first frame that is another, or not all there; what follows is left to pika."""
    before, behind = (
        b"".join(
            marshalled((spec.Basic.Ack if is_ack else spec.Basic.Nack)(tag, multiple))
            for is_ack, tag, multiple in confirms
        )
        for confirms in (first, later)
    )
    expected = (first, other + behind) if other else (first + later, b"")
    runs, rest = ConfirmReader(CHANNEL).read(before + other + behind)
    read = [(is_ack, *confirm) for is_ack, confirms in runs for confirm in confirms]
    assert (read, rest) == expected
    kinds = [is_ack for is_ack, _ in runs]
    assert kinds == [kind for kind, _ in itertools.groupby(is_ack for is_ack, _, _ in read)]


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc"), b"abc"])
def test_body_is_fixed(value: Any) -> None:
    """Fault 71: a buffer that the caller may change later is copied."""
    envelope = raw.encode(Message(body=value, routing_key="q"), exchange="x")
    assert (type(envelope.body), envelope.body) == (bytes, b"abc")


def test_fills_in_what_is_missing() -> None:
    """A message without an exchange goes to the settings' one; without an id it gets one."""
    first, second = (raw.encode(Message(body=b"", routing_key="q"), exchange="x") for _ in "12")
    assert (first.exchange, first.task_type) == ("x", "raw")
    assert len(first.message_id) == 36
    assert first.message_id != second.message_id


DEEP_LIST: list[Any] = []
DEEP_DICT: dict[str, Any] = {}
for _ in range(2_000):
    DEEP_LIST, DEEP_DICT = [DEEP_LIST], {"a": DEEP_DICT}
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP

NO_HISTORIES: list[Any] = [
    *([CANARY], [1], [[{}]], [{"count": CANARY}], [{"count": 1.5}], [{"count": True}]),
    *([{"count": None}], [{}, {"count": 1, "queue": CANARY}, None]),
]
HISTORIES: list[Any] = [
    *([], [{}], [{"count": 2**40, "queue": "q", "reason": "expired"}], CANARY, None, {"a": 1}, 5),
]

BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"body": CANARY}, ("body", "str", "bytes")),
    ({"body": None}, ("body", "missing")),
    ({"body": [1]}, ("body", "list")),
    ({"routing_key": None}, ("routing_key", "missing", "str")),
    ({"routing_key": b"q"}, ("routing_key", "bytes")),
    ({"routing_key": "é" * 128}, ("routing_key", "256 bytes", "255")),
    ({"routing_key": f"{CANARY}\0"}, ("routing_key", "control")),
    ({"routing_key": f"{CANARY}\nERROR forged"}, ("routing_key", "control")),
    ({"routing_key": f"{CANARY}\x1b[2J"}, ("routing_key", "control")),
    ({"routing_key": f"{CANARY}\ud800"}, ("routing_key", "surrogate")),
    ({"exchange": "e" * 256}, ("exchange", "256 bytes")),
    ({"exchange": 1}, ("exchange", "int")),
    ({"message_id": "é" * 128}, ("message_id", "256 bytes")),
    ({"message_id": 1}, ("message_id", "int")),
    ({"correlation_id": f"{CANARY}\r\n"}, ("correlation_id", "control")),
    ({"content_type": b"x"}, ("content_type", "bytes")),
    ({"content_encoding": "\x7f"}, ("content_encoding", "control")),
    ({"type": "t" * 256}, ("type", "256 bytes")),
    ({"headers": [CANARY]}, ("headers", "list", "mapping")),
    ({"headers": {"a": float("inf")}}, ("headers.a", "finite")),
    ({"headers": {"a": datetime(1969, 1, 1, tzinfo=timezone.utc)}}, ("headers.a", "1970")),
    ({"headers": {"a": (CANARY,)}}, ("headers", "tuple")),
    ({"headers": {"a": {CANARY}}}, ("headers", "set")),
    ({"headers": {"a": [{"b": Decimal(1)}]}}, ("headers.a[0].b", "Decimal")),
    ({"headers": {"a": 2**63}}, ("headers", "64 bits")),
    ({"headers": {"a": -(2**63) - 1}}, ("headers", "64 bits")),
    ({"headers": {"a": f"{CANARY}\ud800"}}, ("headers", "surrogate")),
    ({"headers": {"a": DEEP_LIST}}, ("headers", "32 levels")),
    ({"headers": DEEP_DICT}, ("headers", "32 levels")),
    ({"headers": LOOP}, ("headers", "32 levels")),
    ({"headers": {1: CANARY}}, ("headers", "key of type int")),
    ({"headers": {None: CANARY}}, ("headers", "key of type NoneType")),
    ({"headers": {f"{CANARY}\n": 1}}, ("headers", "key", "control")),
    ({"headers": {"a": {"é" * 128: 1}}}, ("headers.a", "key of 256 bytes")),
    ({"headers": {"CC": [CANARY]}}, ("headers", "CC")),
    ({"headers": {"BCC": [CANARY]}}, ("headers", "BCC")),
    *(({"headers": {"x-death": deaths}}, ("headers.x-death", "count")) for deaths in NO_HISTORIES),
    ({"priority": 300}, ("priority", "0 to 255")),
    ({"priority": -1}, ("priority", "0 to 255")),
    ({"priority": "1"}, ("priority", "str")),
    ({"priority": True}, ("priority", "bool")),
    ({"priority": 10**10_000}, ("priority", "int")),
    ({"expiration": -1}, ("expiration", "seconds")),
    ({"expiration": float("nan")}, ("expiration", "seconds")),
    ({"expiration": float("inf")}, ("expiration", "seconds")),
    ({"expiration": 4_294_968}, ("expiration", "4294967")),
    ({"expiration": "1000"}, ("expiration", "str")),
    ({"expiration": True}, ("expiration", "bool")),
    ({"expiration": 10**10_000}, ("expiration", "seconds")),
    ({"persistent": None}, ("persistent", "bool")),
    ({"mandatory": 1}, ("mandatory", "int", "bool")),
    ({"reply_to": 5}, ("reply_to", "int")),
    ({"timestamp": -1}, ("timestamp", "range")),
    ({"timestamp": 1.5}, ("timestamp", "float")),
    ({"timestamp": datetime(2024, 1, 1, tzinfo=None)}, ("timestamp", "zone")),  # noqa: DTZ001 - the fault
    ({"timestamp": datetime(1969, 1, 1, tzinfo=timezone.utc)}, ("timestamp", "1970")),
    ({"app_id": "a" * 256}, ("app_id", "256 bytes")),
    ({"user_id": f"{CANARY}\n"}, ("user_id", "control")),
]


def test_refuses_what_amqp_cannot_carry() -> None:
    """Faults 66 to 69: refused by name and type on the caller's thread, and fast."""
    each_row(BAD, is_refused)


def is_refused(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """Try to make and encode one bad message; a wrong type is seen when it is made."""
    refused(lambda: encode(fields), MLProducerError, *words, inside=True)


def encode(fields: dict[str, Any]) -> Any:
    """Make a message with these fields, and encode it."""
    return raw.encode(Message(**{"body": b"", "routing_key": "q", **fields}), exchange="x")


def test_a_history_of_deaths_is_such_as_the_broker_reads() -> None:
    """A queue's process would crash over any other when it dead-letters the message."""
    for deaths in HISTORIES:
        encode({"headers": {"x-death": deaths, "a": {"x-death": NO_HISTORIES[0]}}})
    for deaths in NO_HISTORIES:  # as a hook may add it, which no constructor has seen
        refused(
            lambda deaths=deaths: amqp.table("headers", {"x-death": deaths}),
            InvalidMessageError,
            "x-death",
            inside=True,
        )


@pytest.mark.parametrize("fields", [{"body": "text"}, {"routing_key": 5}, {"headers": []}])
def test_types_are_checked_when_a_message_is_made(fields: dict[str, Any]) -> None:
    """The wrong type is found where it was written, not where it is published."""
    refused(
        lambda: Message(**{"body": b"", "routing_key": "q", **fields}), InvalidTaskError, *fields
    )


@pytest.mark.parametrize("field", ["delivery_mode", "cluster_id"])
def test_offers_no_property_that_can_only_do_harm(field: str) -> None:
    """Fault 68: these are not the user's to set."""
    with pytest.raises(TypeError, match=field):
        Message(**{"body": b"", "routing_key": "q", field: 1})


def test_refuses_headers_over_the_frame() -> None:
    """Fault 67: 200 kB of headers pass pika, and cost the connection of every other message."""
    message = Message(body=b"", routing_key="q", headers={"a": CANARY * 20_000})
    refused(lambda: raw.encode(message, exchange="x"), MessageTooLargeError, "headers", inside=True)


def test_the_largest_headers_fit_a_frame_with_any_attempt() -> None:
    """The limit leaves room for the longest delivery tag and for the headers of a dead letter."""
    shell = len(raw.encode(with_header(0), exchange="x").properties)
    largest = raw.encode(with_header(amqp.PROPERTIES_MAX - shell), exchange="x")
    whole = FrameWriter(CHANNEL, amqp.FRAME_MAX).publish([(largest, 2**64 - 1)])
    method = len(whole) - (amqp.FRAME_MAX - amqp.DEATH_HEADERS)
    assert whole[method : method + 3] == bytes((spec.FRAME_HEADER, 0, CHANNEL))
    assert FrameWriter(CHANNEL, amqp.FRAME_MAX).longest_properties == amqp.LETTER_MAX
    assert len(largest.properties) == amqp.LETTER_MAX - amqp.DEATH_HEADERS
    with pytest.raises(MessageTooLargeError):
        raw.encode(with_header(amqp.PROPERTIES_MAX - shell + 1), exchange="x")


def with_header(length: int) -> Message:
    """Make a message with one header of that length."""
    return Message(body=b"", routing_key="q", message_id="1", headers={"a": "x" * length})
