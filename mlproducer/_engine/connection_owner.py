"""What a connection tells its owner: `IOThread`, or a test that feeds it broken frames.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlproducer._core.interfaces import Channel, Confirm, Loss
from mlproducer.topology import Declaration


class ConnectionOwner(Protocol):
    """Who is told what happens on a connection."""

    def connection_ready(self, channel: Channel) -> None:
        """A channel in confirm mode is open, the first one or the next."""

    def connection_failed(self, loss: Loss) -> None:
        """The connection ended, or never came to be; the connection is of no more use."""

    def channel_lost(self, loss: Loss) -> None:
        """The broker closed the channel; another one is being opened."""

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """The broker's alarm came or went."""

    def topology_fault(self, declaration: Declaration, loss: Loss) -> None:
        """Something could not be declared; publishing goes on without it."""

    def probe_refused(self, loss: Loss) -> None:
        """The broker has no channel for questions, or ends the connection over one."""

    def acked(self, confirms: Sequence[Confirm]) -> None:
        """The broker has taken messages."""

    def nacked(self, confirms: Sequence[Confirm]) -> None:
        """The broker has refused messages."""

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        """A message has no queue."""

    def letters_refused(self, tags: Sequence[int], loss: Loss) -> None:
        """The broker does not take dead letters, over which it has closed their own channel."""
