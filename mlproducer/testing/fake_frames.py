"""Frames from a publisher, cut out of its bytes and put together to contents.

Owns: what is read and not yet a frame, and what is received and not yet a whole content. Must not
know sockets, nor answer anything.

Runs on: ``mlproducer-fake-broker``.
"""

from __future__ import annotations

import struct

from attrs import define, field
from pika import exceptions, frame, spec

__all__ = ["FRAME_HEADER", "Channel", "take_frame"]

FRAME_HEADER = struct.Struct(">BHI")
_UPDATE_SECRET = struct.pack(">I", spec.Connection.UpdateSecret.INDEX)


@define
class Channel:
    """A channel's confirm counter, and the content that is being assembled on it."""

    confirms: bool = False
    tag: int = 0
    closing: bool = False
    publish: spec.Basic.Publish | None = None
    header: frame.Header | None = None
    body: bytearray = field(factory=bytearray)

    def begin(self, publish: spec.Basic.Publish) -> None:
        """Expect a content.

        :raises UnexpectedFrameError: the one before is not whole
        """
        if self.publish is not None:
            raise exceptions.UnexpectedFrameError("Basic.Publish within a content")
        self.publish = publish

    def add(self, part: frame.Header | frame.Body) -> bool:
        """Whether the content is whole now.

        :raises UnexpectedFrameError: the frame is out of sequence, or the body too long
        """
        if isinstance(part, frame.Header):
            if self.publish is None or self.header is not None:
                raise exceptions.UnexpectedFrameError("content header out of sequence")
            self.header = part
        elif self.header is None:
            raise exceptions.UnexpectedFrameError("content body out of sequence")
        else:
            self.body += part.fragment
        if len(self.body) > self.header.body_size:
            raise exceptions.UnexpectedFrameError("content body too long")
        return len(self.body) == int(self.header.body_size)

    def take(self) -> tuple[spec.Basic.Publish, spec.BasicProperties, bytes]:
        """The whole content, counted; ready for the next."""
        assert self.publish is not None
        assert self.header is not None
        if self.confirms:
            self.tag += 1
        content = self.publish, self.header.properties, bytes(self.body)
        self.publish, self.header, self.body = None, None, bytearray()
        return content


def take_frame(inbox: bytearray, frame_max: int) -> frame.Frame | None:
    """The first frame of `inbox`, and out of it; ``None`` until it is there whole.

    :raises InvalidFrameError: it is longer than `frame_max` bytes, or does not end as it must
    """
    if len(inbox) < FRAME_HEADER.size:
        return None
    size = FRAME_HEADER.unpack_from(inbox)[2] + FRAME_HEADER.size + 1
    if size > frame_max:
        raise exceptions.InvalidFrameError("frame_too_large")
    if len(inbox) < size:
        return None
    data = bytes(inbox[:size])
    del inbox[:size]
    if data[0] == spec.FRAME_METHOD and data[7:11] == _UPDATE_SECRET:
        return frame.Method(0, _update_secret(data))
    return frame.decode_frame(data)[1]


def _update_secret(data: bytes) -> spec.Connection.UpdateSecret:
    """Decode what pika, being a client, only encodes."""
    (length,) = struct.unpack_from(">I", data, 11)
    return spec.Connection.UpdateSecret(data[15 : 15 + length].decode(), "")
