"""Declares the topology, on a channel of its own, and goes on past what cannot be declared.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from mlproducer.core.ports import Loss
from mlproducer.core.trial import NO_PERMISSION
from mlproducer.topology import Declaration

OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]


class Setup:
    """One round of declarations.

    :param open_channel: opens a channel, given who is told that it is open, or closed by the broker
    :param fault: told what could not be declared
    :param done: told when all has been tried
    """

    def __init__(
        self,
        declarations: Iterable[Declaration],
        open_channel: OpenChannel,
        fault: Callable[[Declaration, Loss], None],
        done: Callable[[], None],
    ) -> None:
        self._left = deque(declarations)
        self._open_channel = open_channel
        self._fault = fault
        self._done = done
        self._channel: Any = None

    def start(self) -> None:
        """Begin, or go on with what is left."""
        if self._left:
            self._open_channel(self._on_open, self._on_closed)
        else:
            self._done()

    def _on_open(self, channel: Any) -> None:
        self._channel = channel
        self._declare()

    def _declare(self) -> None:
        declaration = self._left[0]
        if not self._channel.is_open:
            return  # the connection is closing
        declare = getattr(self._channel, declaration.method)
        declare(**declaration.arguments, callback=self._on_declared)

    def _on_declared(self, _frame: object) -> None:
        self._left.popleft()
        if self._left:
            self._declare()
        else:
            self._channel.close()
            self._done()

    def _on_closed(self, loss: Loss) -> None:
        self._fault(self._left.popleft(), loss)
        if loss.reply_code == NO_PERMISSION:
            self._left.clear()  # the rest would be refused likewise
        self.start()
