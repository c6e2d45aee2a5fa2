"""Events as calls: the engine calls one sink; logs, callbacks, metrics and spans are sinks.

Runs on: mostly the I/O thread, so no sink may block or raise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from typing import Any

from mlproducer._core.interfaces import Events, Loss
from mlproducer._core.states import ConnectionState
from mlproducer._guard import stopped
from mlproducer.errors import PublishError, StoreError
from mlproducer.observe.lines import Lines

logger = logging.getLogger(__name__)


class EventSink(Events):
    """Accepts every event, and does nothing; subclasses override the events that they need."""

    def wants(self, name: str) -> Sized | None:
        """Return what is empty while it does not want an event; ``None``: it always does."""
        return None

    def store_failed(self, error: StoreError) -> None:
        """The store could not be used; called on the retry thread."""

    def health_checked(self, *, alive: bool) -> None:
        """The broker answered a health check, or did not."""

    def health_fault(self, target: str, loss: Loss) -> None:
        """The broker is alive, but an exchange or queue is missing or forbidden."""

    def queue_depth(self, queue: str, messages: int) -> None:
        """A health check has read how many messages a queue has."""

    def state_changed(self, state: ConnectionState) -> None:
        """The connection changed its state."""

    def connected(self, address: str) -> None:
        """The connection is ready for messages."""

    def disconnected(self, loss: Loss) -> None:
        """The connection was lost, or closed."""

    def connection_error(self, loss: Loss) -> None:
        """An attempt to connect failed."""

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """The attempts to connect are used up."""

    def channel_lost(self, loss: Loss) -> None:
        """The broker closed the channel."""

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """The broker has blocked publishers, or unblocked them."""

    def topology_fault(self, target: str, loss: Loss) -> None:
        """An exchange, queue or binding could not be declared."""

    def crashed(self, error: BaseException) -> None:
        """The I/O loop failed."""

    def refused(self, message_id: str, error: PublishError) -> None:
        """A task could not be published after a COMMIT, or from the outbox."""

    def events_dropped(self) -> None:
        """A call of a user's callback was dropped."""


class Fanout(EventSink):
    """Passes each event to the sinks that override it.

    A sink that raises is logged, and affects neither the others nor the calling thread.
    """

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        lines = Lines(logger)
        for name in dir(EventSink):
            if not name.startswith("_") and name != "wants":
                methods = [
                    (getattr(sink, name), sink.wants(name))
                    for sink in sinks
                    if _overrides(sink, name)
                ]
                setattr(self, name, _caller_of(methods, lines))


def _overrides(sink: EventSink, name: str) -> bool:
    return getattr(type(sink), name) is not getattr(EventSink, name)


def _caller_of(methods: list[tuple[Any, Sized | None]], lines: Lines) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        for method, wanted in methods:
            if wanted is not None and not wanted:
                continue
            try:
                method(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - not even SystemExit may end the thread
                lines.log(logging.ERROR, "an observer failed", error=stopped(error))

    return call
