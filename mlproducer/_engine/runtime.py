"""The running part of one producer: what belongs to it, and its connections; mostly there is one.

The store and its thread, the in-flight window, the resolver, callbacks and spans are the producer's
and hang on no connection. A message is handed to the connection with the fewest messages of those
that can send now; messages of one thread keep their order on one connection, and so not across
several.

A runtime is made at the first publish, ends with `Runtime.close`, and is not used again. A forked
child makes its own and only closes the descriptors of its parent's.

Runs on: any thread.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
from collections.abc import Callable, Sequence

from attrs import evolve

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.backoff import Backoff
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_errors import failure
from mlproducer._core.delivery_states import WAS_SENT, AnswerState, AttemptState
from mlproducer._core.events import Emit
from mlproducer._core.shutdown import CLOSED
from mlproducer._engine import threads
from mlproducer._engine.endpoints import Endpoints
from mlproducer._engine.engine import Engine, Shared
from mlproducer._engine.gate import Gate
from mlproducer._engine.io_thread import Standing
from mlproducer._engine.pika_logging import quieten_pika
from mlproducer._engine.resolver import Resolver
from mlproducer._engine.retry_worker import RetryWorker
from mlproducer._engine.threads import CLOSE_MARGIN, REST_LIMIT
from mlproducer._synchronization import Latch, Watch
from mlproducer.errors import ProducerClosedError
from mlproducer.observe.callbacks import Callbacks, CallbackSink, Dispatcher
from mlproducer.observe.log import LogSink
from mlproducer.observe.producer_metrics import ProducerMetrics
from mlproducer.observe.recent_history import Recorder
from mlproducer.observe.sinks import Fanout
from mlproducer.observe.spans import Spans
from mlproducer.settings import Settings
from mlproducer.status import CloseReport, Status
from mlproducer.stores import guarded_store, open_store
from mlproducer.stores.protocol import Claim, Depth, Store
from mlproducer.topology import Declaration


class Runtime:
    """Connections that are started, used and closed together, and what they share.

    :param store: ``None`` is what the settings name
    :param tend: is called at each sweep, on the retry thread
    :param added: what is to be declared beside the topology; others may append to it
    :raises ConfigurationError: the settings do not fit together
    :ivar engines: the connections, at least one
    :ivar only: the connection where there is one
    :ivar dispatcher: makes users' calls
    """

    def __init__(
        self,
        settings: Settings,
        store: Store | None,
        callbacks: Callbacks,
        meter: ProducerMetrics,
        recorder: Recorder,
        tend: Callable[[], None],
        added: Sequence[Declaration],
    ) -> None:
        quieten_pika()
        store = open_store(settings) if store is None else guarded_store(store)
        self.gate = Gate(settings.max_in_flight)
        self.dispatcher = Dispatcher(self._spawn, self._event_dropped)
        self.durable = store.durable
        self._callbacks = callbacks
        self._meter = meter
        self._recorder = recorder
        self._spans = Spans(self.dispatcher, durable=store.durable)
        self._log = LogSink()
        self._connected = Watch()
        numbers = range(settings.connections)
        emitters = [self._emitter(self.gate.inside if number == 0 else tuple) for number in numbers]
        self._emit = emitters[0]
        backoff = Backoff(settings.message_retry_base_delay, settings.message_retry_max_delay)
        interval = settings.retry_sweep_interval
        self._redials = Backoff(
            settings.reconnect_initial_delay,
            settings.reconnect_max_delay,
            settings.reconnect_jitter,
        )
        self._retry_worker = RetryWorker(store, self.gate, backoff, interval, self._emit)
        self._resolver = Resolver(Endpoints(settings, added), self._spawn)
        shared = Shared(
            self.gate,
            self._retry_worker,
            self.dispatcher,
            self._spans,
            self._connected,
            self._resolver,
        )
        self.engines: Sequence[Engine] = [
            Engine(settings, shared, each, number) for number, each in enumerate(emitters)
        ]
        self.only = self.engines[0] if len(self.engines) == 1 else None
        ios = [engine.io for engine in self.engines]
        for io in ios:
            io.peers = [each for each in ios if each is not io]
        self._retry_worker.serve(ios, self._sweep)
        listener = getattr(store, "listener", None)
        self._listener = None if listener is None else listener(self._retry_worker.wake)
        self._tend = tend
        self._ordinal = 0
        self._threads: list[threading.Thread] = []
        # Noted by each who closes, before the next step; the first counts, the others come late.
        self._confirmed_before: list[int] = []
        self._abandoned: list[Delivery] = []
        self._stored_rest: list[Latch] = []
        self._ended = False

    def _emitter(self, inside: Callable[[], Sequence[Delivery]]) -> Emit:
        """Return what passes one connection's events to the sinks.

        They count without a lock, each on its own thread.

        Callbacks are last, so that they find counted and logged what they are told.

        :param inside: the messages under way, which one connection counts for all
        """
        return Fanout(
            [
                self._log,
                self._meter.sink(),
                self._recorder.sink(inside),
                self._spans,
                CallbackSink(self._callbacks, self.dispatcher),
            ]
        ).emit

    def choose(self) -> Engine:
        """Return the connection for the next message.

        One whose breaker is half-open is chosen by one thread only, for the message that probes it.
        """
        if self.only is not None:
            return self.only
        engines = self.engines
        ranks = [engine.rank() for engine in engines]
        for engine, (standing, _) in zip(engines, ranks, strict=True):
            if standing is Standing.PROBES and engine.takes_probe():
                return engine
        return engines[ranks.index(min(ranks))]

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads.

        :raises RuntimeError: the interpreter is shutting down
        """
        try:
            self._ordinal = self.engines[0].take_ordinal()
            self.dispatcher.start()
            self._resolver.start()
            for engine in self.engines:
                engine.start(self)
            self._threads.append(self._spawn("retry", self._retry_worker.thread.run))
            if self._listener is not None:
                self._threads.append(self._spawn("listen", self._listener.run))
        except RuntimeError:
            self.close(0.0)
            raise

    def close(self, timeout: float) -> CloseReport:
        """Drain, then end connections and threads, all within ``timeout`` and a margin."""
        deadline = time.monotonic() + timeout
        self.drain(deadline, deadline)
        self.end(deadline + REST_LIMIT)
        return self.join(deadline + CLOSE_MARGIN)

    # The steps of a close. Each may be cut by an interrupt, taken again, and taken by several
    # threads at once. One who closes several fleets takes each step with all of them before the
    # next, so that they share one deadline.

    def drain(self, deadline: float, in_vain: float) -> None:
        """Deliver what is inside, until a monotonic deadline; then have the store take the rest.

        :param in_vain: monotonic time after which this ends where there is no broker
        """
        self._confirmed_before.append(self._confirmed())
        self._watch()
        self._wait_until_quiet(min(deadline, in_vain))
        if not self._is_away():
            self._wait_until_quiet(deadline)
        self._store_rest()

    def end(self, deadline: float) -> None:
        """Have connections and threads end, and every publisher answered.

        :param deadline: monotonic time until which a durable store may take what is left
        """
        self._confirmed_before.append(self._confirmed())
        for stored in self._stored_rest or self._store_rest():
            if stored.wait(deadline - time.monotonic()):
                stored.open()  # for another thread that closes at the same time
        for engine in self.engines:
            engine.end()
        self._ended = True  # before they are woken, and look
        self.gate.emptied.changed()  # for those in flush() and wait_connected()
        self._connected.changed()

    def _store_rest(self) -> list[Latch]:
        self._stored_rest = [engine.store_rest() for engine in self.engines]
        return self._stored_rest

    def join(self, deadline: float) -> CloseReport:
        """Wait for the threads, until a monotonic deadline, and give what became of messages."""
        ended = [engine.join(deadline) for engine in self.engines]
        if all(ended):
            self._retry_worker.thread.order(
                self._settle_rest
            )  # by one thread, which no signal cuts
        self._retry_worker.stop()
        if self._listener is not None:
            self._listener.stop()
        self._resolver.stop()
        self._spans.close()
        self.dispatcher.stop()
        self._resolver.join(deadline)
        threads.join_all([*self._threads, *self.dispatcher.threads], deadline)
        for engine in self.engines:
            engine.join_timers(deadline)
        stored = self._depth().stored if self.durable else 0
        confirmed = self._confirmed() - self._confirmed_before[0]
        return CloseReport(confirmed, stored, self._abandoned_ids(ended=all(ended)))

    def _abandoned_ids(self, *, ended: bool) -> tuple[str, ...]:
        """Return the ids of what has failed, and of what has no answer, since a thread hangs.

        What is confirmed, or handed in, while the threads end makes a difference: so it is counted
        after they have.

        :param ended: all I/O threads have
        """
        told = [each for engine in self.engines for each in engine.abandoned]
        told += [*self._retry_worker.abandoned, *self._abandoned]
        unsettled = [each for each in self._unsettled() if not (ended and _is_refused(each))]
        left = dict.fromkeys([*told, *unsettled])
        return tuple(each.envelope.message_id for each in left)

    def _confirmed(self) -> int:
        return sum(engine.confirmed for engine in self.engines)

    def _settle_rest(self) -> None:
        """Tell those whose message no I/O thread had any more, now that all have ended."""
        now = time.monotonic()
        unread = {each for engine in self.engines for each in engine.unread()}
        for delivery in dict.fromkeys([*unread, *self._still_open()]):
            refused = _is_refused(delivery) and delivery not in unread
            if refused or not (delivery.open and delivery.is_ours):
                continue  # its publisher is told by its own call, or has taken it back
            if self.durable and delivery.in_store:
                delivery.release(now)
            else:
                error = failure(ProducerClosedError, delivery, CLOSED)
                error.possibly_sent |= delivery.attempt in WAS_SENT
                self._abandoned.append(delivery)
                self._emit(events.Failed(delivery, error))
                delivery.fail(error)

    def disown(self) -> None:
        """Close, in a forked child, the parent's descriptors; touch nothing they lead to.

        Each number is pointed at ``/dev/null``, so that the objects that still hold it can do no
        harm whenever they are collected. What runs here are greenlets, if anything: gevent's go on
        in a child, and must not answer, deliver or connect in their parent's stead.
        """
        left = [each for engine in self.engines for each in engine.descriptors()]
        for engine in self.engines:
            engine.io.leave()
        self._retry_worker.thread.leave()
        self._resolver.leave()
        if not left:
            return
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
        except OSError:  # no descriptor is to be had: one of these makes room
            os.close(left[0])
            nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in left:
            if descriptor != nothing:
                os.dup2(nothing, descriptor, inheritable=False)
        if nothing not in left:
            os.close(nothing)

    def _spawn(self, role: str, target: Callable[[], None]) -> threading.Thread:
        return threads.spawn(role, self._ordinal, target, self)

    def _event_dropped(self) -> None:
        self._emit(events.EventDropped())

    def _sweep(self) -> None:
        self._watch()
        self._tend()

    def _watch(self) -> None:
        """Write the gauges down, and see that the I/O threads are alive."""
        self._meter.refresh()
        self._recorder.sample()
        for engine in self.engines:
            engine.watch()

    # --- the whole -----------------------------------------------------------------------------

    def wait_connected(self, timeout: float | None) -> bool:
        """Wait until a connection carries messages; one will do, as it does for ``is_healthy``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._connected.wait_for(lambda: self._ended or self._is_connected(), deadline)
        return self._is_connected()

    def _is_connected(self) -> bool:
        return any(engine.connected for engine in self.engines)

    def _is_away(self) -> bool:
        """Whether it is known that there is no broker, on any connection."""
        return all(engine.away for engine in self.engines)

    def declare(self, deadline: float) -> bool:
        """Have declared what was added, on each connection or when it comes to be.

        :returns: false where a broker has not answered by a monotonic deadline
        """
        asked = [engine.declare() for engine in self.engines]
        return all(each.wait(deadline - time.monotonic()) for each in asked)

    def reconnect(self) -> None:
        """Connect now where there is no connection."""
        for engine in self.engines:
            engine.reconnect()

    def flush(self, deadline: float | None) -> int:
        """Wait until nothing is in flight or waiting, and give how many are left.

        This is about the whole store, whatever process wrote a row or has claimed it; while it
        cannot be read, at least one is left.

        :raises WouldDeadlockError: it is called by a signal handler amid another call
        """
        self.gate.check()
        self._wait_until(self._quiet, deadline)
        left = self._inside() + self._depth().total
        return left if self._retry_worker.known else max(1, left)

    def _wait_until_quiet(self, deadline: float | None) -> None:
        self._wait_until(self._quiet_here, deadline)

    def _wait_until(self, quiet: Callable[[], bool], deadline: float | None) -> None:
        """Wait; each time that the attempts to connect are used up, start them over after a delay.

        The last of them may be under way when this is called, or be the only one.
        """
        limit = math.inf if deadline is None else deadline
        for number in itertools.count():
            for engine in self.engines:
                if engine.idle:
                    engine.reconnect()
            again = time.monotonic() + self._redials.delay(number, random.random())
            ended = self.gate.emptied.wait_for(lambda: self._ended or quiet(), min(again, limit))
            if ended or again >= limit:
                return

    def _quiet(self) -> bool:
        return not self.gate and self._retry_worker.known and not self._depth().total

    def _quiet_here(self) -> bool:
        """Whether there is nothing to close for: no wait for other processes, or a broken store."""
        worker = self._retry_worker
        hopes = worker.expects or not self.durable  # in memory they would be lost
        waits = hopes and self._depth().stored and not worker.rests
        return not self.gate and worker.asked and not waits

    def is_idle(self) -> bool:
        """Whether nothing is in flight, and nothing waits that is lost with this process."""
        depth = self._depth()
        left = depth.waiting if self.durable else depth.stored
        return not self.gate and self._retry_worker.asked and not left

    def _depth(self) -> Depth:
        """Return how many messages are in the store, of all processes."""
        return self._retry_worker.depth

    def _inside(self) -> int:
        """Count the messages inside that the store does not count."""
        has_row = self._retry_worker.stored_rows.has_row
        ahead = self._retry_worker.stored_rows.ahead
        inside = [each for each in self.gate.inside() if each.open]
        return sum(each in ahead or not (each.in_store and has_row(each)) for each in inside)

    def _still_open(self) -> list[Delivery]:
        """Return those whose publishers have not been told their fate, or may still learn it."""
        held = dict.fromkeys([*self.gate.inside(), *self._retry_worker.stored_rows.deliveries()])
        return [each for each in held if each.open]

    def _unsettled(self) -> list[Delivery]:
        """Return those that would be lost with this process."""
        if not self.durable:
            return self._still_open()
        stored_rows = self._retry_worker.stored_rows
        held = dict.fromkeys([*self.gate.inside(), *stored_rows.rowless])
        stored = stored_rows.has_row, stored_rows.lost_rows.__contains__
        return [each for each in held if each.open and not any(has(each) for has in stored)]

    def rest(self) -> None:
        """Take no more rows from the store; a close does not wait for those that are in it."""
        self._retry_worker.rest()

    def expect(self, delivery: Delivery, claim: Claim) -> None:
        """Follow a row of an outbox, whose transaction is not over."""
        self._retry_worker.expect(delivery, claim)

    def status(self) -> Status:
        """Say how things stand: with the connection that is best off, and with the sizes of all."""
        statuses = [engine.status() for engine in self.engines]
        best = max(statuses, key=lambda each: (each.healthy, each.connection_state))
        depth = self._depth()
        due, oldest = self._retry_worker.backlog
        return evolve(
            best,
            outbox_rows=due,
            outbox_oldest=oldest,
            pending_confirms=sum(each.pending_confirms for each in statuses),
            retry_queue_size=depth.waiting,
            dead_letters=depth.dead,
            store=self._retry_worker.name if self.durable else "",
        )


def _is_refused(delivery: Delivery) -> bool:
    """Whether its publisher is about to hand it in, which fails once all I/O threads have ended."""
    in_hand = delivery.attempt is AttemptState.MAILBOX
    return in_hand and delivery.answer is AnswerState.WITHDRAWABLE
