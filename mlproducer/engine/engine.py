"""Everything of one producer that has threads: gate, keeper, I/O thread; how they start and end.

An engine is made at the first publish, ends with `Engine.close`, and is not used again. A forked
child makes its own and only lets go of the descriptors of its parent's.

Runs on: any thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from mlproducer.core.backoff import Backoff
from mlproducer.core.delivery import Delivery
from mlproducer.core.failure import silent_store
from mlproducer.core.farewell import CLOSED
from mlproducer.core.states import ConnectionState
from mlproducer.engine import threads
from mlproducer.engine.directory import Directory
from mlproducer.engine.gate import Gate
from mlproducer.engine.io_thread import IOThread
from mlproducer.engine.keeper import Keeper
from mlproducer.engine.resolver import Resolver
from mlproducer.errors import CircuitOpenError, ProducerClosedError, PublishError
from mlproducer.latch import Latch
from mlproducer.observe.callbacks import Callbacks, CallbackSink, Dispatcher
from mlproducer.observe.events import Fanout
from mlproducer.observe.log import LogSink
from mlproducer.observe.meter import Meter
from mlproducer.observe.recent import Recorder
from mlproducer.observe.spans import Spans
from mlproducer.settings import Settings
from mlproducer.status import CloseReport, Status
from mlproducer.stores.protocol import Depth, Store

logger = logging.getLogger(__name__)

SHELVE_LIMIT = 0.2
"""Seconds of a close's grace that a durable store has for what could not be delivered."""

CLOSE_MARGIN = 0.4
"""Seconds of a close's grace that ending the link and the threads may take."""


class Engine:
    """The running part of a producer."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        callbacks: Callbacks,
        meter: Meter,
        recorder: Recorder,
    ) -> None:
        self.gate = Gate(settings.max_in_flight)
        self.dispatcher = Dispatcher(self._spawn)
        self._callbacks = callbacks
        self._meter = meter
        self._recorder = recorder
        self.spans = Spans(self.dispatcher)
        events = Fanout(
            [
                LogSink(),
                CallbackSink(callbacks, self.dispatcher),
                meter.sink(),
                recorder.sink(self.gate.inside),
                self.spans,
            ]
        )
        self._events = events
        backoff = Backoff(settings.message_retry_base_delay, settings.message_retry_max_delay)
        self._keeper = Keeper(store, self.gate, backoff, settings.retry_sweep_interval, events)
        self._resolver = Resolver(Directory(settings), self._spawn)
        self._io = IOThread(settings, self._resolver, self.gate, self._keeper, events)
        self._keeper.serve(self._io, self._watch)
        self.relay = self._io.relay
        self.durable = store.durable
        self._ordinal = 0
        self._threads: dict[str, threading.Thread] = {}
        self._closing = False
        self._confirmed_before = 0
        self._abandoned: tuple[str, ...] = ()

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads.

        :raises RuntimeError: the interpreter is shutting down
        """
        self._ordinal = threads.take_ordinal(self)
        try:
            self._start_threads()
        except RuntimeError:
            if "io" in self._threads:
                self.end()
                self.join(time.monotonic() + CLOSE_MARGIN)
            else:
                self._resolver.stop()
                self._io.reactor.discard()
            raise

    def _start_threads(self) -> None:
        self._resolver.start()
        self._threads["io"] = self._spawn("io", self._io.reactor.run)
        for role, timer in self._io.timers().items():
            self._threads[role] = self._spawn(role, timer.run)
        if self._callbacks:
            self.dispatcher.start()

    def _spawn(self, role: str, target: Callable[[], None]) -> threading.Thread:
        return threads.spawn(role, self._ordinal, target, self)

    def _watch(self) -> None:
        """Write the gauges down, and replace an I/O thread that died in spite of everything."""
        self._meter.refresh()
        self._recorder.sample()
        if not self._closing and not self._threads["io"].is_alive():
            logger.critical("the I/O thread died; starting another")
            self._threads["io"] = self._spawn("io", self._io.reactor.run)

    def drain(self, deadline: float) -> None:
        """Begin to close: deliver what is inside, until a monotonic deadline."""
        self._confirmed_before = self._io.courier.confirmed
        self._watch()
        self.flush(deadline)
        self._closing = True

    def shelve(self) -> Latch:
        """Have a durable store take what is left; the latch is opened once it has."""
        done = Latch()
        if not (self.durable and self._io.order(partial(self._io.shelve, done))):
            done.open()
        return done

    def end(self) -> None:
        """Have link and threads end, and everybody told how it stands."""
        self._abandoned = tuple(each.envelope.message_id for each in self._unsettled())
        self._io.order(self._io.close)

    def join(self, deadline: float) -> CloseReport:
        """Wait for the threads, until a monotonic deadline, and give what became of messages."""
        threads.join_all([self._threads["io"]], deadline)
        self._io.stop_timers()
        self._resolver.stop()
        self.dispatcher.stop()
        every = [*self._threads.values(), *self._resolver.threads, *self.dispatcher.threads]
        threads.join_all(every, deadline)
        threads.return_ordinal(self._ordinal)
        confirmed = self._io.courier.confirmed - self._confirmed_before
        return CloseReport(confirmed, self.rows().stored if self.durable else 0, self._abandoned)

    def disown(self) -> None:
        """Let go, in a forked child, of the parent's descriptors; touch nothing they lead to.

        Each number is pointed at ``/dev/null``, so that the objects that still hold it can do no
        harm whenever they are collected.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._io.reactor.descriptors():
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)

    # --- messages ------------------------------------------------------------------------------

    def post(self, delivery: Delivery) -> None:
        """Hand over a delivery that has passed the gate.

        :raises ProducerClosedError: the producer was closed meanwhile
        """
        if self._keeper.writes_ahead and not self._closing:
            self._keeper.write_ahead(delivery)
        elif not self._io.reactor.mailbox.put(delivery):
            self._refuse_closed(delivery)

    def post_stored(self, delivery: Delivery) -> None:
        """Hand over a delivery; where messages are written ahead, once it is stored.

        :raises ProducerClosedError: the producer was closed meanwhile
        :raises StoreError: it was not stored by the delivery's deadline, and will not be
        """
        if self._closing or not self._keeper.writes_ahead:
            self.post(delivery)
            return
        done = Latch()
        put = self._keeper.write_ahead(delivery, done)
        if done.wait(delivery.deadline - time.monotonic()):
            if put.refusal is not None:
                raise put.refusal
            return
        error = silent_store(delivery, self._keeper.name)
        self.withdraw(delivery, error)
        delivery.open = False  # it may be in the middle of being stored, and is then deleted
        raise error

    def refuse(self, delivery: Delivery) -> CircuitOpenError | None:
        """Give the error with which an open breaker fails a message on the spot.

        None is given where the message can be stored instead, which the courier decides.
        """
        breaker = self._io.courier.breaker
        if not breaker.refuses() or (self._keeper.durable and delivery.retry):
            return None
        error = CircuitOpenError(
            "the circuit breaker is open",
            retry_after=max(0.0, breaker.reopens_at - time.monotonic()),
            message_id=delivery.envelope.message_id,
        )
        self._events.given_back(delivery, error)
        return error

    def turn_away(self, delivery: Delivery) -> None:
        """Hand over a delivery for which the gate had no room in time.

        :raises ProducerClosedError: the producer was closed meanwhile
        """
        if not self._io.order(partial(self._io.turn_away, delivery)):
            self._refuse_closed(delivery)

    def _refuse_closed(self, delivery: Delivery) -> NoReturn:
        error = ProducerClosedError(CLOSED, message_id=delivery.envelope.message_id)
        self.withdraw(delivery, error)
        raise error

    def expire(self, delivery: Delivery) -> None:
        """Say that a publisher's time is up."""
        self._io.order(partial(self._io.expire, delivery))

    def withdraw(self, delivery: Delivery, error: BaseException | None = None) -> None:
        """Take back a delivery whose publisher was interrupted: it arrives once or not at all."""
        delivery.retry = False
        if delivery.open and delivery.answer.cancel():
            delivery.open = False
            self.gate.leave((delivery,))
            told = error if isinstance(error, PublishError) else PublishError("interrupted")
            self._events.given_back(delivery, told)
        self._io.reactor.mailbox.ring()

    # --- the whole -----------------------------------------------------------------------------

    def able(self) -> bool:
        """Whether a message handed over now would be written."""
        return self._io.courier.able

    def wait_connected(self, deadline: float | None) -> bool:
        """Wait until the link carries messages."""
        return self._io.connected.wait_for(lambda: self._io.is_connected, deadline)

    def reconnect(self) -> None:
        """Connect now, if there is no connection."""
        self._io.order(self._io.dial)

    def flush(self, deadline: float | None) -> None:
        """Wait until nothing is in flight or waiting."""
        if self._io.dialer.idle:
            self.reconnect()
        self.gate.emptied.wait_for(self._quiet, deadline)

    def _quiet(self) -> bool:
        return not self.gate and self._keeper.asked and not self.rows().stored

    def rows(self) -> Depth:
        """Count the messages in the store, whoever wrote them there."""
        return self._keeper.depth

    def inside(self) -> int:
        """Count the messages inside that the store does not count."""
        has_row = self._keeper.shelf.has_row
        inside = [each for each in self.gate.inside() if each.open]
        return sum(not (each.kept and has_row(each)) for each in inside)

    def _unsettled(self) -> list[Delivery]:
        """Give those that would be lost with this process."""
        shelf, inside = self._keeper.shelf, self.gate.inside()
        if self.durable:
            return [each for each in inside if each.open and not shelf.has_row(each)]
        return [each for each in dict.fromkeys([*inside, *shelf.deliveries()]) if each.open]

    def status(self) -> Status:
        """Say how things stand."""
        dialer = self._io.dialer
        return Status(
            connection_state=ConnectionState(dialer.state),
            reconnect_attempts=dialer.failures,
            consecutive_failures=self._io.courier.breaker.failures,
            circuit_state=self._io.courier.breaker.state,
            retry_queue_size=self.rows().waiting,
            dead_letters=self.rows().dead,
            pending_confirms=self._io.courier.in_flight,
            blocked=self._io.courier.blocked,
            broker=dialer.route.broker.address,
            store=self._keeper.name if self.durable else "",
        )
