"""An AMQP 0-9-1 broker in this process, for what RabbitMQ will not do on demand.

Owns: the listener, the connections, and the record of what was received. Every exchange exists,
every publish is routed and acked at once, any password is right; what shall differ is said in a
:class:`Behaviour` or done through a :class:`FakeConnection`. Must not know the publisher, nor
store or deliver a message.

Runs on: ``mlproducer-fake-broker``; public methods on any other thread.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import final

from mlproducer.testing.fake_connection import Behaviour, FakeConnection, ReceivedMessage
from mlproducer.testing.socket_loop import Listener, Loop

__all__ = ["Behaviour", "FakeBroker", "FakeConnection", "ReceivedMessage"]


class _Journal:
    """What has happened so far; tests read it and wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: everything below
        self.connections: tuple[FakeConnection, ...] = ()
        self.accepted = 0
        self.messages: list[ReceivedMessage] = []
        self.failures: list[Exception] = []

    def connected(self, connection: FakeConnection) -> None:
        with self._changed:
            self.connections = (*self.connections, connection)
            self.accepted += 1
            self._changed.notify_all()

    def disconnected(self, connection: FakeConnection) -> None:
        with self._changed:
            self.connections = tuple(c for c in self.connections if c is not connection)
            self._changed.notify_all()

    def received(self, message: ReceivedMessage) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        with self._changed:
            self.failures.append(error)

    def wait(self, come_about: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(come_about, timeout):
                raise TimeoutError(
                    f"{len(self.connections)} connected, {self.accepted} accepted, "
                    f"{len(self.messages)} messages so far"
                )


@final
class FakeBroker:
    """A broker on a port of 127.0.0.1 that behaves as its `behaviour` says.

    ::

        class Silent(Behaviour):
            def on_publish(self, connection, channel, tag, message):
                "Never confirmed."

        with FakeBroker(Silent()) as broker:
            connection = pika.BlockingConnection(pika.URLParameters(broker.url))
            ...
            [message] = broker.wait_for_messages(1, timeout=5)
            message.connection.ack(message.channel, message.tag)
    """

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self._behaviour = behaviour or Behaviour()
        self._journal = _Journal()
        self._loop = Loop("mlproducer-fake-broker")
        self._listener = Listener(self._loop, self._admit)
        self._loop.call(self._listener.listen)

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop()
        if kind is None:
            self.close()

    @property
    def port(self) -> int:
        """The port, the same after :meth:`stop_listening` and :meth:`listen_again`."""
        return self._listener.address[1]

    @property
    def url(self) -> str:
        """A URL to connect to; any other user, password and virtual host works too."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    @property
    def connections(self) -> tuple[FakeConnection, ...]:
        """The live connections, oldest first."""
        return self._journal.connections

    @property
    def accepted(self) -> int:
        """How many clients have connected so far."""
        return self._journal.accepted

    @property
    def messages(self) -> list[ReceivedMessage]:
        """All messages received so far, in order."""
        return list(self._journal.messages)

    def wait_for_connections(self, n: int, timeout: float) -> tuple[FakeConnection, ...]:
        """The live connections, once there are at least `n`; with 0, once there are none.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._journal.wait(
            lambda: len(self.connections) >= n if n else not self.connections, timeout
        )
        return self.connections

    def wait_for_messages(self, n: int, timeout: float) -> list[ReceivedMessage]:
        """All messages received so far, once there are at least `n`.

        :raises TimeoutError: it did not come about within `timeout` seconds
        """
        self._journal.wait(lambda: len(self._journal.messages) >= n, timeout)
        return self.messages

    def stop_listening(self) -> None:
        """Have new connections refused; live ones stay."""
        self._loop.call(self._listener.refuse)

    def listen_again(self) -> None:
        """Accept connections on the same port again."""
        self._loop.call(self._listener.listen)

    def close(self) -> None:
        """End every connection and the thread, and release the port. Idempotent.

        :raises RuntimeError: the thread did not end within 2 s
        :raises Exception: what a hook of the behaviour had raised first, once
        """
        self._stop()
        failures, self._journal.failures = self._journal.failures, []
        if failures:
            raise failures[0]

    def _stop(self) -> None:
        if self._loop.is_open:
            self._loop.call(self._shut)
        self._loop.close()

    def _shut(self) -> None:
        self._listener.close()
        for connection in self.connections:
            connection.drop()

    def _admit(self, sock: socket.socket) -> None:
        journal = self._journal
        connection = FakeConnection(
            self._loop,
            sock,
            self._behaviour,
            on_message=journal.received,
            on_failure=journal.failed,
            on_end=journal.disconnected,
        )
        journal.connected(connection)
        connection.begin()
