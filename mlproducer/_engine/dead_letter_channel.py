"""The channel on which dead letters go, beside the one for all other messages.

A broker answers a letter whose exchange is missing or forbidden by closing the channel under all
that is in flight on it. On a channel of their own letters hit no other message, however often they
are tried again.

The sender counts one sequence of tags for both channels: what the broker says is translated.

Runs on: the I/O thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from pika import spec

from mlproducer._core.interfaces import NO_PERMISSION, NOT_FOUND, Loss
from mlproducer._engine.connection_owner import ConnectionOwner
from mlproducer.message import Envelope

Batch = Sequence[tuple[Envelope, int]]
OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]


class Tags:
    """Turns a channel's tags into the sender's, which count what went over another channel too."""

    def __init__(self) -> None:
        self.skipped: list[int] = []  # for each that is left out: how many came here before, plus 1

    def skip(self, tag: int) -> None:
        """Leave out a tag of the sender's; they come in ascending order."""
        self.skipped.append(tag - len(self.skipped))

    def sender(self, tag: int) -> int:
        """Return the sender's tag for one of the channel's."""
        return tag + bisect_right(self.skipped, tag) if self.skipped else tag


class DeadLetterChannel:
    """Opens with the first letter, and again with the next one after the broker has closed it.

    :param exchange: where dead letters go
    :param open_channel: opens a channel, given who is told that it is open, or closed
    :param write: writes messages on a channel
    :ivar usable: whether the broker allows another channel; it does until it has refused one
    """

    def __init__(
        self,
        exchange: str,
        open_channel: OpenChannel,
        write: Callable[[Any, Batch], None],
        owner: ConnectionOwner,
    ) -> None:
        self.exchange = exchange
        self.usable = True
        self._open_channel = open_channel
        self._write = write
        self._owner: ConnectionOwner | None = owner
        self._channel: Any = None
        self._opening = False
        self._singly = False
        self._waiting: list[tuple[Envelope, int]] = []
        self._sent: dict[int, tuple[Envelope, int]] = {}
        self._last = 0

    def send(self, batch: Batch) -> None:
        """Send letters, each with its tag of the sender's."""
        self._waiting += batch
        self._go_on()

    def mute(self) -> None:
        """Tell nothing any more: the sender has lost all its tags."""
        self._owner = None

    def end(self) -> None:
        """Tell nothing any more, and close the channel."""
        self.mute()
        channel, self._channel = self._channel, None
        if channel is not None and channel.is_open:
            channel.close()

    def is_of(self, channel: Any) -> bool:
        """Whether that is the channel in use."""
        return channel is self._channel

    def _go_on(self) -> None:
        if self._opening or not self._waiting or self._owner is None:
            return
        if self._channel is None:
            self._opening = True
            self._open_channel(self._on_open, self._on_closed)
            return
        if self._singly and self._sent:
            return
        count = 1 if self._singly else len(self._waiting)
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        for each in batch:
            self._last += 1
            self._sent[self._last] = each
        self._write(self._channel, batch)

    def _on_open(self, channel: Any) -> None:
        if self._owner is None:
            channel.close()
            return
        self._channel, self._last = channel, 0
        channel.confirm_delivery(self._on_confirm, callback=self._on_ready)

    def _on_ready(self, _frame: object) -> None:
        self._opening = False
        self._go_on()

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        last = method.delivery_tag or self._last  # 0 stands for all
        settled = [n for n in self._sent if n <= last] if method.multiple else [last]
        if last > self._last:
            settled = []  # a confirm of what was never sent must not settle what was
        for number in settled:
            _, tag = self._sent.pop(number, (None, 0))
            if tag and self._owner is not None:
                if isinstance(method, spec.Basic.Ack):
                    self._owner.acked([(tag, False)])
                else:
                    self._owner.nacked([(tag, False)])
        self._singly = self._singly and bool(self._sent or self._waiting)
        self._go_on()

    def _on_closed(self, loss: Loss) -> None:
        """Find out which letters were refused; what is wrong with the exchange concerns all."""
        sent = list(self._sent.values())
        self._sent.clear()
        self._channel, self._opening = None, False
        self.usable = loss.reply_code != 0
        if loss.reply_code in (0, NO_PERMISSION, NOT_FOUND):
            refused, self._waiting = [*sent, *self._waiting], []
        elif len(sent) <= 1:
            refused = sent or self._waiting[:1]
            self._waiting = self._waiting if sent else self._waiting[1:]
        else:
            refused, self._waiting, self._singly = [], [*sent, *self._waiting], True
        if self._owner is not None and refused:
            self._owner.letters_refused([tag for _, tag in refused], loss)
        self._go_on()
