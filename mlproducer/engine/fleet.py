"""The engines of one producer, one for each connection; mostly there is one.

Each has its own connection and threads, its own part of the in-flight window and its own circuit
breaker. A message is carried by the engine that has the fewest inside, of those that can send now.
Messages of one thread keep their order on one connection, and so not across several.

Runs on: any thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from attrs import evolve, frozen

from mlproducer.engine.engine import CLOSE_MARGIN, SHELVE_LIMIT, Engine
from mlproducer.errors import ConfigurationError
from mlproducer.observe.callbacks import Callbacks
from mlproducer.observe.meter import Meter
from mlproducer.observe.recent import Recorder
from mlproducer.settings import Settings
from mlproducer.status import CloseReport, Status
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Store


@frozen
class Fleet:
    """Engines that are started, used and closed together.

    :ivar engines: at least one
    """

    engines: Sequence[Engine]

    def choose(self) -> Engine:
        """Give the engine for the next message."""
        engines = self.engines
        return engines[0] if len(engines) == 1 else min(engines, key=_burden)

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads.

        :raises RuntimeError: the interpreter is shutting down
        """
        for number, engine in enumerate(self.engines):
            try:
                engine.start()
            except RuntimeError:
                Fleet(self.engines[:number]).close(0.0)
                raise

    def listen(self) -> None:
        """Start calling back."""
        for engine in self.engines:
            engine.dispatcher.start()

    def close(self, timeout: float) -> CloseReport:
        """Drain, then end links and threads, all within ``timeout`` and a margin."""
        deadline = time.monotonic() + timeout
        for engine in self.engines:
            engine.drain(deadline)
        for shelved in [engine.shelve() for engine in self.engines]:
            shelved.wait(deadline + SHELVE_LIMIT)
        for engine in self.engines:
            engine.end()
        reports = [engine.join(deadline + CLOSE_MARGIN) for engine in self.engines]
        return CloseReport(
            confirmed=sum(report.confirmed for report in reports),
            stored=max(report.stored for report in reports) if reports else 0,
            abandoned=tuple(each for report in reports for each in report.abandoned),
        )

    def disown(self) -> None:
        """Let go, in a forked child, of the parent's descriptors."""
        for engine in self.engines:
            engine.disown()

    # --- the whole -----------------------------------------------------------------------------

    def wait_connected(self, timeout: float | None) -> bool:
        """Wait until every link carries messages."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return all(engine.wait_connected(deadline) for engine in self.engines)

    def reconnect(self) -> None:
        """Connect now where there is no connection."""
        for engine in self.engines:
            engine.reconnect()

    def flush(self, deadline: float | None) -> int:
        """Wait until nothing is in flight or waiting, and give how many are left."""
        for engine in self.engines:
            engine.flush(deadline)
        return sum(engine.inside() for engine in self.engines) + self._stored("stored")

    def status(self) -> Status:
        """Say how things stand: with the link that is best off, and with the sizes of all."""
        statuses = [engine.status() for engine in self.engines]
        if len(statuses) == 1:
            return statuses[0]
        best = max(statuses, key=lambda each: (each.healthy, each.connection_state))
        return evolve(
            best,
            pending_confirms=sum(each.pending_confirms for each in statuses),
            retry_queue_size=self._stored("waiting"),
            dead_letters=self._stored("dead"),
        )

    def _stored(self, kind: str) -> int:
        """Count rows: a durable store is the same one for all, a memory store is each one's own."""
        counts = [getattr(engine.rows(), kind) for engine in self.engines]
        return max(counts) if self.engines[0].durable else sum(counts)


def assemble(
    settings: Settings, store: Store | None, callbacks: Callbacks, meter: Meter, recorder: Recorder
) -> Fleet:
    """Make the engines that the settings ask for, not started.

    :param store: ``None`` is what the settings name, for each engine one of its own
    :raises ConfigurationError: the settings do not fit together
    """
    count = settings.connections
    if store is not None and count > 1:
        raise ConfigurationError("a store of your own can serve only one connection")
    share = evolve(settings, max_in_flight=max(1, settings.max_in_flight // count))
    stores = [open_store(settings, count) for _ in range(count)] if store is None else [store]
    return Fleet([Engine(share, each, callbacks, meter, recorder) for each in stores])


def _burden(engine: Engine) -> tuple[bool, int]:
    return not engine.able(), len(engine.gate)
