"""Dead letters: the message after its last retry, with the same body, and headers about its death.

A dead letter must not expire in its queue, so the expiration becomes a header, as it does where
RabbitMQ itself dead-letters (its guide, *Dead Letter Exchanges*).

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlproducer._wire.amqp import LETTER_MAX, table_entries
from mlproducer.message import Envelope

EXPIRATION_HEADER = "x-original-expiration"

_MAY_BE_CUT = {"x-death-reason"}

_HEADERS, _EXPIRATION, _CLUSTER_ID = 13, 8, 2
_SIZES = {12: 1, 11: 1, 6: 8}  # delivery mode, priority, timestamp; all else are short strings


def dead_letter(
    envelope: Envelope,
    exchange: str,
    headers: Mapping[str, str | int],
    longest: int = LETTER_MAX,
) -> Envelope:
    """Return a message as a dead letter for an exchange, with its own routing key and id.

    :param headers: what happened, the most important first
    :param longest: bytes of properties that the connection accepts; headers beyond them are cut or
        left out, and nothing of the message itself
    """
    return Envelope(
        message_id=envelope.message_id,
        task_type=envelope.task_type,
        exchange=exchange,
        routing_key=envelope.routing_key,
        properties=_dead(envelope.properties, headers, longest),
        body=envelope.body,
    )


def _dead(properties: bytes, headers: Mapping[str, str | int], longest: int) -> bytes:
    """Add headers to an encoded property list, and remove its expiration."""
    values = _split(properties)
    expiration = values.pop(_EXPIRATION, None)
    if expiration is not None:
        headers = {EXPIRATION_HEADER: expiration[1:].decode(), **headers}
    own = values.get(_HEADERS, bytes(4))[4:]
    values[_HEADERS] = bytes(4)
    space = longest - 2 - sum(map(len, values.values())) - len(own)
    entries = own + _fitting(headers, space)
    values[_HEADERS] = len(entries).to_bytes(4, "big") + entries
    flags = sum(1 << bit for bit in values) | 1 << _CLUSTER_ID
    ordered = (values[bit] for bit in sorted(values, reverse=True))
    return b"".join((flags.to_bytes(2, "big"), *ordered))


def _fitting(headers: Mapping[str, str | int], space: int) -> bytes:
    """Encode the headers that fit; a reason that is too long is cut."""
    encoded = b""
    for name, value in headers.items():
        left = space - len(encoded)
        entry = table_entries("headers", {name: value})
        excess = len(entry) - left
        if excess > 0 and isinstance(value, str) and name in _MAY_BE_CUT:
            kept = value.encode()[: max(0, len(value.encode()) - excess)].decode(errors="ignore")
            entry = table_entries("headers", {name: kept})
        if len(entry) <= left:
            encoded += entry
    return encoded


def _split(properties: bytes) -> dict[int, bytes]:
    """Split a property list, without the value of cluster-id, into values by their flag's bit."""
    flags, at = int.from_bytes(properties[:2], "big"), 2
    values: dict[int, bytes] = {}
    for bit in range(15, _CLUSTER_ID, -1):
        if flags & 1 << bit:
            end = at + _size(bit, properties, at)
            values[bit] = properties[at:end]
            at = end
    return values


def _size(bit: int, properties: bytes, at: int) -> int:
    if bit in _SIZES:
        return _SIZES[bit]
    if bit == _HEADERS:
        return 4 + int.from_bytes(properties[at : at + 4], "big")
    return 1 + properties[at]
