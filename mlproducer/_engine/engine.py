"""One connection of a producer: its I/O thread, its health checks and its circuit breaker.

What belongs to the producer is made once, by the `Runtime`, and only used here: the in-flight
window, the store with its thread, the callbacks' thread, the spans.

Runs on: any thread.
"""

from __future__ import annotations

import logging
import threading
import weakref
from functools import partial
from typing import NoReturn

from attrs import frozen

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._core.delivery_errors import silent_store
from mlproducer._core.events import Emit
from mlproducer._core.shutdown import CLOSED
from mlproducer._core.states import ConnectionState
from mlproducer._engine import threads
from mlproducer._engine.gate import Gate
from mlproducer._engine.io_thread import IOThread
from mlproducer._engine.resolver import Resolver
from mlproducer._engine.retry_worker import RetryWorker
from mlproducer._foreign_calls import write
from mlproducer._synchronization import Latch, Watch
from mlproducer.errors import CircuitOpenError, ProducerClosedError, PublishError
from mlproducer.observe.callbacks import Dispatcher
from mlproducer.observe.spans import Spans
from mlproducer.settings import Settings
from mlproducer.status import Status

logger = logging.getLogger(__name__)


@frozen(eq=False)
class Shared:
    """What belongs to a producer, whichever of its connections carries a message.

    :ivar connected: changes whenever a connection has come to carry messages
    """

    gate: Gate
    retry_worker: RetryWorker
    dispatcher: Dispatcher
    spans: Spans
    connected: Watch
    resolver: Resolver


class Question:
    """What another thread asks the I/O thread, which answers it once."""

    def __init__(self) -> None:
        self._answered = Latch()
        self._good = False

    def answer(self, *, good: bool) -> None:
        """Say yes or no."""
        self._good = good
        self._answered.open()

    def wait(self, timeout: float) -> bool:
        """Wait for the answer; false where it is no, or did not come within ``timeout``."""
        return self._answered.wait(timeout) and self._good


class Engine:
    """One connection, and its part of what publishers ask for.

    :param shared: what all connections of the producer have in common
    :param emit: is told what happens on this connection
    :param number: of the connection, from 0
    """

    def __init__(self, settings: Settings, shared: Shared, emit: Emit, number: int) -> None:
        self.gate = shared.gate
        self.dispatcher = shared.dispatcher
        self.spans = shared.spans
        self._retry_worker = shared.retry_worker
        self._emit = emit
        self._io = IOThread(
            settings,
            shared.resolver,
            self.gate,
            self._retry_worker,
            emit,
            shared.connected,
            number,
        )
        self.io = self._io
        self.relay = self._io.relay
        self.rank = self._io.rank
        self.breaker = self._io.sender.breaker
        self._patience = settings.publish_timeout
        self._probing_until = 0.0
        self._ordinal = 0
        self._owner: object = None
        self._threads: dict[str, threading.Thread] = {}
        self._closing = False

    # --- life ----------------------------------------------------------------------------------

    def take_ordinal(self) -> int:
        """Take the number that the threads carry, once."""
        self._ordinal = self._ordinal or threads.take_ordinal(self)
        return self._ordinal

    def start(self, owner: object) -> None:
        """Start the threads.

        :param owner: the producer's running part
        :raises RuntimeError: the interpreter is shutting down
        """
        self._owner = owner
        self.take_ordinal()
        self._spawn_io()
        for role, timer in self._io.timers().items():
            self._threads[role] = threads.spawn(role, self._ordinal, timer.run, owner)

    def _spawn_io(self) -> None:
        self._threads["io"] = threads.spawn("io", self._ordinal, self._io.run, self._owner)

    def watch(self) -> None:
        """Replace an I/O thread that died in spite of everything."""
        thread = self._threads.get("io")
        if thread is not None and not self._closing and not thread.is_alive():
            write(logger, logging.CRITICAL, "the I/O thread died; starting another")
            self._spawn_io()

    def store_rest(self) -> Latch:
        """Have a durable store take what is left; the latch is opened once it has."""
        self._closing = True
        done = Latch()
        ordered = self._threads and self._retry_worker.durable
        if not (ordered and self._io.order(partial(self._io.store_rest, done))):
            done.open()
        return done

    def end(self) -> None:
        """Have the connection and its threads end, and every publisher answered."""
        self._closing = True
        if "io" in self._threads:
            self._io.end()
        else:
            self._io.io_loop.discard()

    def join(self, deadline: float) -> bool:
        """Wait for the I/O thread, until a monotonic deadline; true if it ended."""
        ended = threads.join_all([t for t in (self._threads.get("io"),) if t is not None], deadline)
        self._io.stop_timers()
        return ended

    def unread(self) -> list[Delivery]:
        """Take out what an I/O thread that died has not read."""
        return [item for item in self._io.io_loop.mailbox.close() if isinstance(item, Delivery)]

    def join_timers(self, deadline: float) -> None:
        """Wait for the other threads, which have been told to end."""
        threads.join_all(self._threads.values(), deadline)
        threads.return_ordinal(self._ordinal, self)

    def descriptors(self) -> list[int]:
        """Return every descriptor that is held here, for a forked child to close."""
        return self._io.io_loop.descriptors()

    # --- messages ------------------------------------------------------------------------------

    def post(self, delivery: Delivery) -> None:
        """Hand over a delivery that has passed the gate.

        :raises ProducerClosedError: the producer was closed meanwhile
        """
        # Where nothing is written ahead, as `try_post` does, without a call.
        post = self.try_post if self._retry_worker.writes_ahead else self._io.io_loop.mailbox.put
        if not post(delivery):
            self._refuse_closed(delivery)

    def try_post(self, delivery: Delivery) -> bool:
        """Do what `post` does; false where the producer was closed meanwhile."""
        if self._retry_worker.writes_ahead and not self._closing:
            self._retry_worker.write_ahead(delivery)
            return True
        return self._io.io_loop.mailbox.put(delivery)

    def post_stored(self, delivery: Delivery) -> None:
        """Hand over a delivery; where messages are written ahead, once it is stored.

        :raises ProducerClosedError: the producer was closed meanwhile
        :raises StoreError: it was not stored within ``publish_timeout``, and will not be
        """
        if self._closing or not self._retry_worker.writes_ahead:
            self.post(delivery)
            return
        # The gate has had a time of its own.
        delivery.extend(time.monotonic() + self._patience)
        done = Latch()
        put = self._retry_worker.write_ahead(delivery, done)
        if done.wait(delivery.deadline - time.monotonic()):
            if put.refusal is not None:
                raise put.refusal
            return
        error = silent_store(delivery, self._retry_worker.name)
        if self.take_back(delivery, error):
            raise error  # a row that is committed after this is deleted
        if put.refusal is not None:
            raise put.refusal  # it came at this very moment, as its row would have

    def refuse(self, delivery: Delivery) -> CircuitOpenError | None:
        """Return the error with which an open breaker fails a message on the spot.

        None is given where the message can be stored instead, which the sender decides.
        """
        breaker = self._io.sender.breaker
        if not breaker.refuses() or (self._retry_worker.durable and delivery.retry):
            return None
        if self._io.peer() is not None:
            return None  # the I/O thread hands it over to that one
        if self._io.connector.hears_calls:
            self._io.order(self._io.connector.called)
        error = CircuitOpenError(
            "the circuit breaker is open",
            retry_after=breaker.retry_after(time.monotonic()),
            message_id=delivery.envelope.message_id,
        )
        self._emit(events.Failed(delivery, error))
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
        owner = delivery.owner or self._io
        owner.order(partial(owner.expire, delivery))

    def expire_in_time(self, delivery: Delivery) -> None:
        """See that a deadline is kept although its publisher waits no longer to say so."""
        known = weakref.ref(delivery)  # a timer may outlast it by far

        def expire() -> None:
            left = known()
            if left is not None:
                self.expire(left)

        self._io.order(partial(self._io.call_at, delivery.deadline, expire))

    def withdraw(self, delivery: Delivery, error: BaseException | None = None) -> None:
        """Take back a delivery whose publisher was interrupted: it arrives once or not at all."""
        delivery.recall()
        told = error if isinstance(error, PublishError) else PublishError("interrupted")
        self.take_back(delivery, told)
        self._io.io_loop.mailbox.ring()

    def take_back(self, delivery: Delivery, error: PublishError) -> bool:
        """Take back a delivery, with an error, unless the library has it already."""
        taken = delivery.withdraw()
        if taken:
            self.gate.leave((delivery,))
            self._emit(events.Failed(delivery, error))
        return taken

    # --- the connection ------------------------------------------------------------------------

    def takes_probe(self) -> bool:
        """Whether the next message is the one that probes the half-open breaker.

        This is true for one of the threads that ask, and again once its message should have had its
        end. Where two threads hear it at the same moment, the second's message is handed over.
        """
        now = time.monotonic()
        if now < self._probing_until:
            return False
        self._probing_until = now + self._patience
        return True

    @property
    def connected(self) -> bool:
        """The connection carries messages."""
        return self._io.is_connected

    def declare(self) -> Question:
        """Have declared what was added for all connections, on this one."""
        question = Question()
        if not self._io.order(partial(self._io.declare, question.answer)):
            question.answer(good=False)
        return question

    def reconnect(self) -> None:
        """Connect now, if there is no connection."""
        self._io.order(self._io.dial)

    @property
    def away(self) -> bool:
        """There is no connection, and the last attempt to make one has failed."""
        return not self._io.is_connected and self._io.connector.failures > 0

    @property
    def idle(self) -> bool:
        """Nothing is connected, under way or due."""
        return self._io.connector.idle

    @property
    def abandoned(self) -> list[Delivery]:
        """Messages that have failed here since the producer was closed."""
        return list(self._io.sender.shutdown.abandoned)

    @property
    def confirmed(self) -> int:
        """Messages that were confirmed here so far."""
        return self._io.sender.confirmed

    def status(self) -> Status:
        """Say how things stand, without the counts of what is stored."""
        connector = self._io.connector
        return Status(
            connection_state=ConnectionState(connector.state),
            reconnect_attempts=connector.failures,
            consecutive_failures=self._io.sender.breaker.failures,
            circuit_state=self._io.sender.breaker.state,
            pending_confirms=self._io.sender.in_flight,
            blocked=self._io.sender.blocked,
            confirming=self._io.sender.confirming,
            broker=connector.endpoint.broker.address,
        )
