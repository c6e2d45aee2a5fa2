"""Declares the topology on a new channel, and goes on past what cannot be declared.

The channel is then the one for publishing. It takes only one channel at a time, so a broker or user
that is limited to one will do, and saves two round trips on each connect.

Runs on: the I/O thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from mlproducer._core.interfaces import NO_PERMISSION, Loss
from mlproducer.topology import Declaration


class TopologyDeclarer:
    """One round of declarations, over as many channels as the broker closes meanwhile.

    :param fault: told what could not be declared
    :param answered: told after each answer of the broker
    :param done: told when all has been tried, with the open channel
    :ivar asked: the declaration that the broker has not answered yet
    """

    def __init__(
        self,
        declarations: Iterable[Declaration],
        fault: Callable[[Declaration, Loss], None],
        answered: Callable[[], None],
        done: Callable[[Any], None],
    ) -> None:
        self._left = deque(declarations)
        self._fault = fault
        self._answered = answered
        self._done = done
        self._channel: Any = None
        self.asked: Declaration | None = None

    def run(self, channel: Any) -> None:
        """Begin, or go on with what is left, on a channel that has just been opened."""
        self._channel = channel
        self._declare()

    def closed(self, loss: Loss) -> bool:
        """Note that the broker closed the channel; false if that was no answer to a declaration."""
        refused, self.asked = self.asked, None
        if refused is None:
            return False
        self._left.popleft()
        self._answered()
        self._fault(refused, loss)
        if loss.reply_code == NO_PERMISSION:
            self._left.clear()  # the rest would be refused likewise
        return True

    def _declare(self) -> None:
        if not self._channel.is_open:
            return  # the connection is closing
        if not self._left:
            self._done(self._channel)
            return
        self.asked = self._left[0]
        declare = getattr(self._channel, self.asked.method)
        declare(**self.asked.arguments, callback=self._on_declared)

    def _on_declared(self, _frame: object) -> None:
        self.asked = None
        self._left.popleft()
        self._answered()
        self._declare()
