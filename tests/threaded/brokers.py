"""Brokers with a will of their own.

Runs on: the fake broker's thread.
"""

from __future__ import annotations

import threading
from typing import Any

from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage


class Silent(Behaviour):
    """Never confirms by itself; the test does."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Say nothing."""


class SlowOpen(Behaviour):
    """Takes its time to open a connection."""

    def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
        """Connection.OpenOk, after half a second."""
        connection.later(0.5, super().on_open, connection, virtual_host)


class SlowToDeclare(Behaviour):
    """Takes its time for each exchange, queue and binding."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer a declaration after so many seconds, anything else at once."""
        if method.NAME.startswith(("Exchange.", "Queue.")):
            connection.later(self._delay, super().on_method, connection, channel, method)
        else:
            super().on_method(connection, channel, method)


class FirstIsLost(Behaviour):
    """Never confirms what comes on the first connection."""

    def __init__(self) -> None:
        self._first: FakeConnection | None = None

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Confirm, but not there."""
        self._first = self._first or connection
        if connection is not self._first:
            connection.ack(channel, tag)


class Holding(Behaviour):
    """Stops answering at one step of the handshake, as often as it is told."""

    def __init__(self, step: str, times: int = 1) -> None:
        self._step = step
        self._times = times
        self.reached = threading.Event()

    def hold_no_more(self) -> None:
        """Answer at every step from now on."""
        self._times = 0

    def _holds(self, step: str) -> bool:
        if step != self._step or not self._times:
            return False
        self._times -= 1
        self.reached.set()
        return True

    def on_connect(self, connection: FakeConnection) -> None:
        """Connection.Start, or not."""
        if not self._holds("start"):
            super().on_connect(connection)

    def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
        """Connection.Tune, or not."""
        if not self._holds("tune"):
            super().on_start_ok(connection, start_ok)

    def on_open(self, connection: FakeConnection, virtual_host: str) -> None:
        """Connection.OpenOk, or not."""
        if not self._holds("open"):
            super().on_open(connection, virtual_host)

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Whatever was asked for, or not."""
        if not self._holds(method.NAME):
            super().on_method(connection, channel, method)


def ack(message: ReceivedMessage, *, multiple: bool = False) -> None:
    """Confirm a message on the channel on which it came."""
    message.connection.ack(message.channel, message.tag, multiple=multiple)


def nack(message: ReceivedMessage, *, multiple: bool = False) -> None:
    """Refuse a message on the channel on which it came."""
    message.connection.nack(message.channel, message.tag, multiple=multiple)


def give_back(message: ReceivedMessage) -> None:
    """Return a message: nothing is bound for it."""
    message.connection.return_(message.channel, message)
