"""The frames of ``Basic.Publish``, byte for byte as pika encodes them, and of confirms.

The part that is constant for a route is encoded once, and that of a message was encoded on its
publisher's thread. What is left for the I/O thread is to join them with the delivery tag.

Runs on: the I/O thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from mlproducer._wire.amqp import (
    ATTEMPT_MAX,
    CONTENT_HEADER,
    FRAME_OVERHEAD,
    NOT_MANDATORY,
    short_string,
)
from mlproducer.message import Envelope

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = b"\xce"
_BASIC, _PUBLISH, _ACK, _NACK = 60, 40, 80, 120
_BITS = {False: b"\x00", True: b"\x01"}  # mandatory
_MAX_ROUTES = 1024
"""Routes whose frames are kept; with more distinct routes than this, the cache is cleared."""

_LENGTHS = [bytes((length,)) for length in range(ATTEMPT_MAX)]

_pack_frame = struct.Struct(">BHI").pack
_pack_content = struct.Struct(">BHIHHQ").pack
_pack_method = struct.Struct(">HH").pack
_pack_ids = struct.Struct(">HHH").pack

_CONFIRM = struct.Struct(">11sQB1s")  # up to the method's number; tag, bits, end
_CONFIRM_PAYLOAD = 13


def _sent(properties: bytes) -> bytes:
    """Return a property list without `NOT_MANDATORY`, which is not AMQP's."""
    if properties[1] & NOT_MANDATORY:
        return properties[:1] + bytes((properties[1] & ~NOT_MANDATORY,)) + properties[2:]
    return properties


class ConfirmReader:
    """Reads the frames of ``Basic.Ack`` and ``Basic.Nack`` on one channel.

    :param channel: the channel's number
    """

    def __init__(self, channel: int) -> None:
        start = _pack_frame(_METHOD, channel, _CONFIRM_PAYLOAD)
        self._kinds = {start + _pack_method(_BASIC, kind): kind == _ACK for kind in (_ACK, _NACK)}

    def read(self, data: bytes) -> tuple[Sequence[tuple[bool, Sequence[tuple[int, bool]]]], bytes]:
        """Return the confirms that come first, and what follows them.

        :returns: tags that follow each other, each with ``multiple``, and whether they are acked
        """
        runs: list[tuple[bool, list[tuple[int, bool]]]] = []
        run: list[tuple[int, bool]] = []
        kind: bool | None = None
        at, last = 0, len(data) - _CONFIRM.size
        while at <= last:
            start, tag, bits, end = _CONFIRM.unpack_from(data, at)
            is_ack = self._kinds.get(start)
            if is_ack is None or end != _END:
                break
            if is_ack is not kind:
                kind, run = is_ack, []
                runs.append((is_ack, run))
            run.append((tag, bits & 1 == 1))
            at += _CONFIRM.size
        return runs, data[at:]


class FrameWriter:
    """Encodes envelopes for one channel.

    :param channel: the channel's number
    :param frame_max: the negotiated frame size in bytes (AMQP 0-9-1, section 2.3.5)
    :ivar longest_properties: bytes of an envelope's properties that fit one frame; a body may be
        split over several frames, a content header may not
    """

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._fragment = frame_max - FRAME_OVERHEAD
        self.longest_properties = self._fragment - CONTENT_HEADER - ATTEMPT_MAX
        self._routes: dict[tuple[str, str], bytes] = {}
        self._optional: dict[tuple[str, str], bytes] = {}

    def properties(self, envelope: Envelope, tag: int) -> bytes:
        """Return the whole property list of one attempt."""
        digits = b"%d" % tag
        return b"".join((_sent(envelope.properties), _LENGTHS[len(digits)], digits))

    def publish(self, batch: Iterable[tuple[Envelope, int]]) -> bytes:
        """Encode messages: a method frame, a content header frame and body frames for each.

        :param batch: messages with their delivery tags, by which returns are matched
        """
        channel, routes = self._channel, self._routes
        pieces: list[bytes] = []
        for envelope, tag in batch:
            properties, body, digits = envelope.properties, envelope.body, b"%d" % tag
            size, payload = len(body), CONTENT_HEADER + len(properties) + 1 + len(digits)
            route = (envelope.exchange, envelope.routing_key)
            if properties[1] & NOT_MANDATORY:
                method = self._optional.get(route) or self._method(route, self._optional)
                properties = _sent(properties)
            else:
                method = routes.get(route) or self._method(route, routes)
            pieces += (
                method,
                _pack_content(_HEADER, channel, payload, _BASIC, 0, size),
                properties,
                _LENGTHS[len(digits)],
                digits,
                _END,
            )
            if 0 < size <= self._fragment:
                pieces += (_pack_frame(_BODY, channel, size), body, _END)
            else:
                pieces += self._fragments(body)
        return b"".join(pieces)

    def _method(self, route: tuple[str, str], routes: dict[tuple[str, str], bytes]) -> bytes:
        if len(routes) >= _MAX_ROUTES:
            routes.clear()
        exchange, routing_key = route
        payload = b"".join(
            (
                _pack_ids(_BASIC, _PUBLISH, 0),
                short_string("exchange", exchange),
                short_string("routing_key", routing_key),
                _BITS[routes is self._routes],
            )
        )
        frame = _pack_frame(_METHOD, self._channel, len(payload)) + payload + _END
        routes[route] = frame
        return frame

    def _fragments(self, body: bytes) -> list[bytes]:
        frames: list[bytes] = []
        for start in range(0, len(body), self._fragment):
            fragment = body[start : start + self._fragment]
            frames += (_pack_frame(_BODY, self._channel, len(fragment)), fragment, _END)
        return frames
