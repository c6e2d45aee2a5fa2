"""The publish fast path: the frames of ``Basic.Publish``, byte for byte as pika writes them.

What is constant for a route is encoded once; what is constant for a message was encoded by its
publisher. Here the two meet the delivery tag.

Runs on: the I/O thread.
"""

from __future__ import annotations

import struct

from mlproducer.message import Envelope
from mlproducer.wire.amqp import ATTEMPT_MAX, CONTENT_HEADER, FRAME_OVERHEAD, short_string

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = b"\xce"
_BASIC, _PUBLISH = 60, 40
_MANDATORY = b"\x01"
_MAX_ROUTES = 1024
"""Routes remembered; a producer with more distinct routing keys than this starts over."""

_LENGTHS = [bytes((length,)) for length in range(ATTEMPT_MAX)]

_pack_frame = struct.Struct(">BHI").pack
_pack_content = struct.Struct(">BHIHHQ").pack
_pack_ids = struct.Struct(">HHH").pack


class FrameWriter:
    """Turns envelopes into bytes for one channel.

    :param channel: the channel's number
    :param frame_max: the negotiated frame size in bytes (AMQP 0-9-1, section 2.3.5)
    """

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._fragment = frame_max - FRAME_OVERHEAD
        self._routes: dict[tuple[str, str], bytes] = {}

    def fits(self, envelope: Envelope) -> bool:
        """Whether the content header fits one frame; a body may span many, a header may not."""
        return len(envelope.properties) + ATTEMPT_MAX + CONTENT_HEADER <= self._fragment

    def properties(self, envelope: Envelope, tag: int) -> bytes:
        """Give the whole property list of one attempt."""
        return envelope.properties + _attempt(tag)

    def publish(self, envelope: Envelope, tag: int) -> tuple[bytes, ...]:
        """Encode one message: method frame, content header frame, body frames; in pieces.

        :param tag: the delivery tag, by which a return is matched to its attempt
        """
        body, properties, attempt = envelope.body, envelope.properties, _attempt(tag)
        payload = CONTENT_HEADER + len(properties) + len(attempt)
        size = len(body)
        header = _pack_content(_HEADER, self._channel, payload, _BASIC, 0, size)
        start = self._method(envelope), header, properties, attempt, _END
        if 0 < size <= self._fragment:
            return *start, _pack_frame(_BODY, self._channel, size), body, _END
        return *start, *self._fragments(body)

    def _method(self, envelope: Envelope) -> bytes:
        route = (envelope.exchange, envelope.routing_key)
        frame = self._routes.get(route)
        if frame is None:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            frame = self._routes[route] = self._encode_method(*route)
        return frame

    def _encode_method(self, exchange: str, routing_key: str) -> bytes:
        payload = b"".join(
            (
                _pack_ids(_BASIC, _PUBLISH, 0),
                short_string("exchange", exchange),
                short_string("routing_key", routing_key),
                _MANDATORY,
            )
        )
        return _pack_frame(_METHOD, self._channel, len(payload)) + payload + _END

    def _fragments(self, body: bytes) -> list[bytes]:
        frames: list[bytes] = []
        for start in range(0, len(body), self._fragment):
            fragment = body[start : start + self._fragment]
            frames += (_pack_frame(_BODY, self._channel, len(fragment)), fragment, _END)
        return frames


def _attempt(tag: int) -> bytes:
    digits = b"%d" % tag
    return _LENGTHS[len(digits)] + digits
