"""A health check's questions, on a channel of its own: is the exchange there, what do queues hold?

Any answer means that the broker is alive, also that something is missing or forbidden, which closes
this channel and no other.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from mlproducer.core.ports import Loss


class Probe:
    """One check; it is over when its channel is closed."""

    def __init__(
        self,
        exchange: str,
        queues: Iterable[str],
        alive: Callable[[], None],
        depth: Callable[[str, int], None],
        fault: Callable[[str, Loss], None],
    ) -> None:
        self._targets = deque([exchange, *queues])
        self._exchange = exchange
        self._alive = alive
        self._depth = depth
        self._fault = fault
        self._channel: Any = None

    def on_open(self, channel: Any) -> None:
        """Ask the first question."""
        self._channel = channel
        self._ask()

    def on_closed(self, loss: Loss) -> None:
        """Take the broker's refusal for an answer."""
        if self._targets:
            self._fault(self._targets[0], loss)
        self._alive()

    def _ask(self) -> None:
        target = self._targets[0]
        if target == self._exchange:
            self._channel.exchange_declare(target, passive=True, callback=self._on_answer)
        else:
            self._channel.queue_declare(target, passive=True, callback=self._on_answer)

    def _on_answer(self, frame: Any) -> None:
        self._alive()
        target = self._targets.popleft()
        if target != self._exchange:
            self._depth(target, frame.method.message_count)
        if self._targets:
            self._ask()
        else:
            self._channel.close()
