"""pika's ``SelectConnection`` as its documentation shows it, with 1,000 messages in flight.

Everything runs on one thread: confirms come in on the loop, and each makes room for the next
messages, which are made there too. There is no blocking form.

Runs on: the contestant's main thread.
"""

from __future__ import annotations

from typing import Any

import pika

from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, message

WINDOW = 1000


class Client:
    """One channel in confirm mode."""

    def __init__(self, url: str, workers: int = 1) -> None:
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0
        self._failure: object = None
        self._sent = self._count = 0
        self._open: dict[int, None] = {}  # tags in flight, oldest first
        self._connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_failure,
            on_close_callback=self._on_failure,
        )
        self._loop = self._connection.ioloop
        self._run()

    def pipelined(self, count: int) -> None:
        """Publish many."""
        self._count = self._sent + count
        self._fill()
        self._run()

    def blocking(self, count: int, workers: int) -> list[float]:
        """Say that this client cannot."""
        raise NotImplementedError("pika's SelectConnection has no blocking publish")

    def close(self) -> None:
        """Let the end of the process close the connection."""

    def _run(self) -> None:
        self._loop.start()
        if self._failure is not None:
            raise ConnectionError(repr(self._failure))

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_return_callback(lambda *_: self._on_failure(channel, "returned"))
        channel.confirm_delivery(self._on_confirm, callback=lambda _frame: self._loop.stop())

    def _on_confirm(self, frame: Any) -> None:
        if not isinstance(frame.method, pika.spec.Basic.Ack):
            self._on_failure(self._connection, frame.method)
        self._settle(frame.method.delivery_tag, multiple=frame.method.multiple)
        self._fill()
        if not self._open:
            self._loop.stop()

    def _settle(self, tag: int, *, multiple: bool) -> None:
        if not multiple:
            self._open.pop(tag, None)
            return
        for each in list(self._open):
            if each > tag:
                break
            del self._open[each]

    def _fill(self) -> None:
        while self._sent < self._count and len(self._open) < WINDOW:
            task_id, headers, body = message(self._sent)
            self._sent += 1
            self._open[self._sent] = None
            self._channel.basic_publish(
                EXCHANGE,
                ROUTING_KEY,
                body,
                pika.BasicProperties(
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers=headers,
                    delivery_mode=2,
                    correlation_id=task_id,
                    message_id=task_id,
                ),
                mandatory=True,
            )

    def _on_failure(self, _where: object, reason: object) -> None:
        self._failure = reason
        self._loop.stop()
