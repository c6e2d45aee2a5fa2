"""What a message becomes after its last retry: the same body, with headers that say what happened.

Runs on: the I/O thread.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from mlproducer.message import Envelope
from mlproducer.wire.amqp import table_entries

_HAS_TYPE, _HAS_ENCODING, _HAS_HEADERS = 1 << 15, 1 << 14, 1 << 13
_LENGTH = struct.Struct(">I")


def dead_letter(envelope: Envelope, exchange: str, headers: Mapping[str, str | int]) -> Envelope:
    """Address a message to the dead-letter exchange, under its own routing key and id."""
    return Envelope(
        message_id=envelope.message_id,
        task_type=envelope.task_type,
        exchange=exchange,
        routing_key=envelope.routing_key,
        properties=_with_headers(envelope.properties, table_entries("headers", headers)),
        body=envelope.body,
    )


def _with_headers(properties: bytes, entries: bytes) -> bytes:
    """Add entries to the header table of an encoded property list, which may have none yet."""
    flags = int.from_bytes(properties[:2], "big")
    at = 2
    for flag in (_HAS_TYPE, _HAS_ENCODING):  # short strings that stand before the headers
        if flags & flag:
            at += 1 + properties[at]
    old = b""
    rest = at
    if flags & _HAS_HEADERS:
        rest = at + 4 + _LENGTH.unpack_from(properties, at)[0]
        old = properties[at + 4 : rest]
    table = _LENGTH.pack(len(old) + len(entries)) + old + entries
    return b"".join(
        ((flags | _HAS_HEADERS).to_bytes(2, "big"), properties[2:at], table, properties[rest:])
    )
