"""From events to observers: logs, metrics, callbacks, spans and the status page are sinks.

Each sink has a table: by what it takes an event of each kind that it wants.

Runs on: mostly the I/O thread, so no sink may block or raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, get_args

from mlproducer._core.events import Event
from mlproducer._foreign_calls import stopped
from mlproducer.observe.limited_logger import LimitedLogger

logger = logging.getLogger(__name__)

EVENTS: tuple[type[Event], ...] = get_args(Event)

Table = Mapping[type[Event], Callable[[Any], None]]
"""What takes the events of each kind."""


class Sink:
    """Makes something of events; this one of none."""

    def table(self) -> Table:
        """Return what takes the events that it wants."""
        return {}

    def wants(self, kind: type[Event]) -> Sized | None:
        """Return what is empty while it does not want these events; ``None``: it always does."""
        return None

    def take(self, event: Event) -> None:
        """Take one event."""
        take = self.table().get(type(event))
        if take is not None:
            take(event)


class Fanout:
    """Passes each event to the sinks that want it.

    A sink that raises is logged, and affects neither the others nor the calling thread.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._lines = LimitedLogger(logger)
        tables = [(sink, sink.table()) for sink in sinks]
        self._takers = {
            kind: [(table[kind], sink.wants(kind)) for sink, table in tables if kind in table]
            for kind in EVENTS
        }

    def emit(self, event: Event) -> None:
        """Tell the sinks of an event."""
        for take, wanted in self._takers[type(event)]:
            if wanted is not None and not wanted:
                continue
            try:
                take(event)
            except BaseException as error:  # noqa: BLE001 - not even SystemExit may end the thread
                self._lines.log(logging.ERROR, "an observer failed", error=stopped(error))
