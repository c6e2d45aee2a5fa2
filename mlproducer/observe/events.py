"""What happens, as calls. The engine calls one sink; logs, callbacks and metrics are sinks.

Runs on: mostly the I/O thread, so that nothing here may block or raise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mlproducer._core.interfaces import Events, Loss
from mlproducer._core.states import ConnectionState
from mlproducer._guard import stopped
from mlproducer.errors import PublishError, StoreError
from mlproducer.observe.lines import Lines

logger = logging.getLogger(__name__)


class EventSink(Events):
    """Takes every event, also the sender's, and does nothing; subclasses take what they want."""

    def store_failed(self, error: StoreError) -> None:
        """The store could not be used; told on the retry thread."""

    def health_checked(self, *, alive: bool) -> None:
        """The broker answered a health check, or did not."""

    def health_fault(self, target: str, loss: Loss) -> None:
        """The broker is alive, but something on it is missing or forbidden."""

    def queue_depth(self, queue: str, messages: int) -> None:
        """A health check has read how many messages wait in a queue."""

    def state_changed(self, state: ConnectionState) -> None:
        """The link moved."""

    def connected(self, address: str) -> None:
        """The link carries messages."""

    def disconnected(self, loss: Loss) -> None:
        """It does no longer."""

    def connection_error(self, loss: Loss) -> None:
        """An attempt to connect failed."""

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """No further attempt is made."""

    def channel_lost(self, loss: Loss) -> None:
        """The broker closed the channel."""

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """The broker blocks publishers, or does no longer."""

    def topology_fault(self, target: str, loss: Loss) -> None:
        """Something could not be declared."""

    def crashed(self, error: BaseException) -> None:
        """The I/O loop failed."""

    def refused(self, message_id: str, error: PublishError) -> None:
        """What was to be published after a COMMIT, or from the outbox, could not be handed over."""

    def events_dropped(self) -> None:
        """A call of a user's callback was left out."""


class Fanout(EventSink):
    """Passes each event to those sinks that take it, and to no other.

    A sink that fails is logged and harms neither the others nor the thread that tells it.
    """

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        lines = Lines(logger)
        for name in dir(EventSink):
            if not name.startswith("_"):
                takers = [getattr(sink, name) for sink in sinks if _takes(sink, name)]
                setattr(self, name, _all_of(takers, lines))


def _takes(sink: EventSink, name: str) -> bool:
    return getattr(type(sink), name) is not getattr(EventSink, name)


def _all_of(takers: list[Any], lines: Lines) -> Any:
    def tell(*args: object, **kwargs: object) -> None:
        for taker in takers:
            try:
                taker(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - even SystemExit ends no thread of ours
                lines.log(logging.ERROR, "an observer failed", error=stopped(error))

    return tell
