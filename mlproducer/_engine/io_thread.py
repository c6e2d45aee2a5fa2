"""What works on the I/O thread: the sender that judges, the connector that keeps the connection
alive.

Others hand deliveries and orders in by the I/O loop's mailbox and read the few plain attributes
that are marked for them. A delivery belongs to one connection at a time. What has not been written
goes to another one that can carry it while this one cannot; the thread that has it hands it over.

Runs on: the I/O thread, except where a method says otherwise.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from attrs import evolve

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.backoff import Backoff
from mlproducer._core.breaker import Adaptive, Breaker, Consecutive, Trip
from mlproducer._core.delivery import Delivery, Owner
from mlproducer._core.delivery_states import ROW_PENDING, AnswerState, AttemptState, RowState
from mlproducer._core.events import Emit
from mlproducer._core.interfaces import NOT_FOUND, Channel, Confirm, Loss, LossKind
from mlproducer._core.sender import Sender
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer._engine.connection import OnDeclared
from mlproducer._engine.connector import Connector, Patience
from mlproducer._engine.dead_letter_maker import DeadLetterMaker
from mlproducer._engine.delayed_delivery import DelayedDelivery, OpenChannel
from mlproducer._engine.gate import Gate
from mlproducer._engine.health import Health, HealthProbe, settle
from mlproducer._engine.io_loop import EventLoop, IOLoop
from mlproducer._engine.pika_adapters import Traffic
from mlproducer._engine.resolver import Resolver
from mlproducer._engine.retry_worker import RetryWorker
from mlproducer._engine.threads import TimerThread
from mlproducer._foreign_calls import guarded
from mlproducer._synchronization import Latch, Relay, Watch
from mlproducer._wire.delay import Delays
from mlproducer.errors import AuthenticationError, NotConnectedError, PublishError
from mlproducer.settings import Settings, topology_of
from mlproducer.topology import Declaration

TICK = 1.0
"""Seconds between looks at what is overdue."""

MANY = 1000
"""Messages that one sweep sends at most, so that it does not starve new ones."""

STORE_LIMIT = 0.1
"""Seconds beyond a publisher's deadline that the store may take to store, or delete, a message."""

SLOW = 0.02
"""Seconds after which publishers are let through although one has not passed on."""

BREATH = 0.01
"""Seconds until the next write where pika's buffer was too full for all that waits."""


class Standing(enum.IntEnum):
    """What becomes of a message handed over now, the best first."""

    CARRIES = 1  # it is written
    WAITS = 2  # it waits for a connection, or for the end of the broker's alarm
    PROBES = 3  # it is written if it is the first: half-open, the breaker lets one through
    REFUSES = 4  # it fails, since the last attempt to connect has
    SHUT = 5  # it fails, since the breaker is open


class IOThread:
    """Everything that one connection's I/O thread owns.

    :ivar peers: the other connections of the producer
    """

    def __init__(
        self,
        settings: Settings,
        resolver: Resolver,
        gate: Gate,
        retry_worker: RetryWorker,
        emit: Emit,
        connected: Watch,
        number: int,
    ) -> None:
        self._give_up = settings.confirm_give_up
        self._emit = emit
        self._gate = gate
        self._retry_worker = retry_worker
        self.io_loop = IOLoop(self.accept, self.pump)
        self.order = self.io_loop.order
        self._connected = connected
        self.relay = Relay(self._remind)
        self.is_connected = False
        self._topology = topology_of(settings)
        self._health_probe = HealthProbe(self._topology, emit)
        self._traffic = Traffic()
        self._health = Health(settings.health_check_interval, self.order, self.probe, self.silent)
        self._cooldown = TimerThread(self._cooled)
        breaker = Breaker(
            _trip(settings),
            settings.circuit_breaker_cooldown,
            settings.publish_timeout,
            self._circuit_changed,
            self._cooldown.call_at,
        )
        self._delayed = DelayedDelivery(
            Delays.of(self._topology, settings.queue_prefix),
            active=settings.declare_topology == "active",
            call_later=self.io_loop.call_later,
            fault=self.topology_fault,
            resume=self.pump,
        )
        self._dead_letter_maker = DeadLetterMaker(
            self._topology.dead_letter_exchange, self._delayed.plain
        )
        self.sender = Sender(
            settings.max_message_retries,
            breaker,
            retry_worker,
            self._dead_letter_maker.dead_letter,
            gate.leave,
            emit,
        )
        self.connector = Connector(
            resolver,
            _patience(settings),
            owner=self,
            order=self.order,
            emit=emit,
            attempt_failed=self._attempt_failed,
            finished=self._finished,
            turn=number,
        )
        self.peers: Sequence[IOThread] = ()
        self._breathing = False
        self._ends = self._closed = self._crashed = False
        self._channel: Channel | None = None
        self._returning: deque[Delivery] = deque()  # being readmitted just now
        self._faults: set[tuple[str, str, int]] = set()
        self._late: set[Delivery] = set()  # seen by `_look_for_lost` the last time

    # --- for any thread ------------------------------------------------------------------------

    def ready(self) -> int:
        """How many messages handed over now would be written: none, one as a probe, or many."""
        if not self.sender.able:
            return 0
        return MANY if self.sender.breaker.state is CircuitState.CLOSED else 1

    def standing(self) -> Standing:
        """What would become of a message handed over now."""
        sender = self.sender
        if sender.able:
            closed = sender.breaker.state is CircuitState.CLOSED
            return Standing.CARRIES if closed else Standing.PROBES
        if sender.breaker.refuses():
            return Standing.SHUT
        return Standing.REFUSES if sender.refused else Standing.WAITS

    def burden(self) -> int:
        """How many messages are here; some may be counted twice, or not, on their way through."""
        sender = self.sender
        return len(self.io_loop.mailbox) + sender.waiting + sender.in_flight

    def peer(self, mine: Standing | None = None) -> IOThread | None:
        """Return another connection for what this one cannot carry, unless none is better off.

        :param mine: this one's standing, where it is about to change
        """
        if not self.peers:
            return None
        mine = mine or self.standing()
        if mine is Standing.CARRIES or (mine is Standing.PROBES and not self.sender.waiting):
            return None
        peer = min(self.peers, key=IOThread.rank)
        theirs = peer.standing()
        hopeful = theirs is Standing.WAITS and mine in (Standing.REFUSES, Standing.SHUT)
        return peer if theirs is Standing.CARRIES or hopeful else None

    def rank(self) -> tuple[Standing, int]:
        """Say how well it would carry the next message; the lowest does best."""
        return self.standing(), self.burden()

    def timers(self) -> dict[str, TimerThread]:
        """Return the timer threads by their roles."""
        return {
            "health": self._health.thread,
            "breaker": self._cooldown,
        }

    def _cooled(self) -> None:
        """Have the breaker look at the time; on its thread."""
        self._cooldown.due = None
        self.order(self.cool)

    def stop_timers(self) -> None:
        """End the timer threads, once they have done what they were told so far."""
        self._health.stop()
        self._cooldown.stop()

    def end(self) -> None:
        """Have every publisher answered, and the connection and the thread end."""
        self._ends = True
        self.order(self.close)

    def leave(self) -> None:
        """Do nothing more, in a forked child; greenlets, unlike threads, go on in it."""
        self.io_loop.leave()
        self.connector.leave()
        for thread in self.timers().values():
            thread.leave()

    # --- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `close` has ended everything."""
        self.io_loop.run(self._begin, self._failed)
        self.relay.hurry()  # for publishers whose turn would have come by a timer

    def _begin(self, loop: EventLoop) -> None:
        """Connect on a new loop, at once or, where an earlier loop failed, after a delay."""
        self.connector.attach(loop)
        self._breathing = False
        self.relay.hurry()
        if self._crashed:
            self._recover(self._retry_worker.stored_rows.deliveries(), crashed=True)
        self._tick()
        if self._ends:  # what was done of that went with the loop that failed
            self._closed = False
            self.order(self.close)
        elif self.connector.failures:
            self.connector.redial()
        else:
            self.connector.dial()

    def accept(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries from publishers, who start attempts over that were used up."""
        entry = self._delayed.entry
        for delivery in deliveries:
            if delivery.envelope.exchange == entry:
                deliveries = self._hold_delayed(deliveries, self._take)
                break
        if self.peers:
            self._take(deliveries)
        else:
            self.sender.accept(deliveries, time.monotonic())
        if self.peers or not self.is_connected:
            self._wake()

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        now = time.monotonic()
        if not self.peers or self.standing() is Standing.CARRIES:
            self.sender.accept(deliveries, now)
        else:
            for delivery in deliveries:
                if delivery.attempt is AttemptState.MAILBOX and not self._give(delivery):
                    self.sender.accept((delivery,), now)
        if self.peers:
            self._expire_overdue(deliveries)

    def _hold_delayed(
        self, deliveries: Sequence[Delivery], take: Callable[[Sequence[Delivery]], None]
    ) -> Sequence[Delivery]:
        """Hold back tasks that are due later until they can be sent; give the others."""
        entry = self._delayed.entry
        if all(delivery.envelope.exchange != entry for delivery in deliveries):
            return deliveries
        if self._channel is not None:  # from now on tasks are addressed as they are written
            self.sender.use_channel(self._delayed.addressing(self._channel))
        return self._delayed.hold(deliveries, take, self._channels())

    def _channels(self) -> OpenChannel | None:
        """Return what opens a channel for declarations on a connection that carries messages."""
        connection = self.connector.connection
        return None if connection is None or not self.is_connected else connection.declaring_channel

    def _failed(self, error: BaseException, in_hand: Sequence[Delivery]) -> None:
        """Tell those who wait that the loop failed; put back what was being handed over."""
        self._crashed = True
        self._emit(events.LoopFailed(error))
        self.is_connected = False
        self._delayed.forget()
        self.connector.crashed()
        self._channel = None
        self.sender.down(Loss("the I/O loop failed"), time.monotonic())
        self.sender.disconnected()
        for delivery in in_hand:
            untouched = delivery.answer is not AnswerState.WAITING  # else `_recover` takes it up
            if (
                delivery.attempt is AttemptState.MAILBOX
                and untouched
                and delivery.owner in (None, self)
            ):
                self.io_loop.mailbox.put(delivery)

    def _recover_held(self) -> None:
        """Take up messages over which a callback has failed; pika ends the connection over that."""
        self._recover(list(self._retry_worker.stored_rows.claims))

    def _recover(self, stored: Sequence[Delivery], *, crashed: bool = False) -> None:
        """Take up messages that were left between two of their steps.

        :param stored: of those that have a row, in which to look
        :param crashed: the loop has failed, maybe amid an order to the store
        """
        now = time.monotonic()
        while self._returning:
            guarded(self.sender.readmit, self._returning.popleft(), now)
        known = dict.fromkeys([*self._gate.inside(), *stored])
        here = [each for each in known if each.owner is self]
        ahead = set[Delivery]()
        if self._retry_worker.writes_ahead:  # those may be on their way to the store, or from it
            ahead.update(each for each in here if each.attempt is AttemptState.MAILBOX)
        owed = self.sender.recover([each for each in here if each not in ahead], now)
        if owed or crashed:
            self._retry_worker.recover(self, [*owed, *ahead], crashed=crashed)

    def _give(self, delivery: Delivery) -> bool:
        """Let another connection accept a delivery, if there is one that is better off."""
        peer = self.peer()
        if peer is None:
            return False
        delivery.give_to(peer)
        given = peer.io_loop.mailbox.put(delivery)
        if not given:
            delivery.give_to(self)
        return given

    def relieve(self, mine: Standing | None = None) -> None:
        """Let another connection have what waits here, if there is one that is better off.

        :param mine: its standing, where an attempt to connect has failed: then suspects go, too
        """
        peer = self.peer(mine) if self.sender.waiting else None
        if peer is not None:
            self.pass_on(self.sender.release(suspects=mine is Standing.REFUSES), peer)

    def _invite(self) -> None:
        """Offer to carry what waits on other connections, now that this one can."""
        for peer in self.peers:
            peer.order(peer.relieve)

    def _wake(self) -> None:
        """Tell the connectors of all connections that something is to be sent."""
        self.connector.called()
        for peer in self.peers:
            if peer.connector.hears_calls:
                peer.order(peer.connector.called)

    def pump(self) -> None:
        """Write what waits, and again in a moment what there was no room for."""
        sender = self.sender
        if sender.pump(time.monotonic()) and sender.able and not self._breathing:
            self._breathing = True
            self.io_loop.call_later(BREATH, self._breathe)

    def _breathe(self) -> None:
        self._breathing = False
        self.pump()

    def _remind(self) -> None:
        """See that publishers come through; asked by any thread that has an answer for one."""
        if not self.order(self._hurry_later):
            self.relay.hurry()

    def _hurry_later(self) -> None:
        if not self.io_loop.call_later(SLOW, self.relay.hurry):
            self.relay.hurry()

    def _tick(self) -> None:
        self.io_loop.call_later(TICK, self._tick)
        now, connection = time.monotonic(), self.connector.connection
        if len(self._gate):
            self._look_for_lost(now)
        if not self.sender.overdue(now, self._give_up - TICK) or connection is None:
            return
        before, self._traffic = self._traffic, connection.traffic()
        slow = self._traffic.waiting and self._traffic.taken > before.taken
        if self.sender.overdue(now, self._give_up) and not (slow or self.sender.blocked):
            self.connector.give_up("confirms are overdue")

    def _look_for_lost(self, now: float) -> None:
        """Take up what has been inside for long, and is neither here nor on its way.

        Its publisher was interrupted twice, before it was handed over, or this thread between the
        mailbox and the queue.
        """
        before, self._late = self._late, set[Delivery]()
        for delivery in self._gate.inside():
            if delivery.attempt is not AttemptState.MAILBOX or delivery.owner is not self:
                continue
            if now < delivery.deadline + TICK or self._delayed.holds(delivery):
                continue
            if delivery not in before or len(self.io_loop.mailbox):
                self._late.add(delivery)
            elif delivery.recalled or not delivery.open:
                delivery.withdraw()
                self._gate.leave((delivery,))
            elif not self._retry_worker.writes_ahead:
                self.io_loop.mailbox.put(delivery)

    # --- orders, by way of the mailbox ---------------------------------------------------------

    def turn_away(self, delivery: Delivery) -> None:
        """Judge a message for which there was no room in time."""
        self.io_loop.check_owner()
        self.sender.turn_away(delivery, time.monotonic())

    def call_at(self, when: float, function: Callable[[], None]) -> None:
        """Have something done at a monotonic time, unless the loop ends."""
        self.io_loop.call_later(max(0.0, when - time.monotonic()), function)

    def order_again(self, deliveries: Sequence[Delivery]) -> None:
        """Give orders that were cut off, or take answers that were."""
        now = time.monotonic()
        for delivery in deliveries:
            if delivery.owner is not self or not delivery.open:
                continue
            if delivery.attempt is not AttemptState.MAILBOX:
                self.sender.failures.order_again(delivery, now)
            elif self._retry_worker.holds(delivery):
                self.stored_ahead([delivery])

    def expire(self, delivery: Delivery) -> None:
        """End a publisher's wait."""
        self.io_loop.check_owner()
        self._delayed.release(delivery)
        if delivery.owner is not None and delivery.owner is not self:
            delivery.owner.order(partial(delivery.owner.expire, delivery))  # it was handed over
            return
        written_ahead = self._retry_worker.writes_ahead and delivery.row is RowState.NONE
        if delivery.attempt is AttemptState.MAILBOX and not written_ahead:
            return  # it is handed over just now, and its deadline is looked at when it is here
        self.sender.expire(delivery, time.monotonic())
        if delivery.in_flight:
            self._health.check_soon()
        if delivery.row in ROW_PENDING:
            self.io_loop.call_later(STORE_LIMIT, partial(self._store_is_late, delivery))

    def _expire_overdue(self, deliveries: Sequence[Delivery]) -> None:
        """End the waits of publishers who have asked while another connection handed it over."""
        now = time.monotonic()
        for delivery in deliveries:
            if delivery.deadline <= now and delivery.waits_for_answer:
                self.expire(delivery)

    def _store_is_late(self, delivery: Delivery) -> None:
        self.sender.store_is_late(delivery, time.monotonic())

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages that the retry worker held."""
        self.io_loop.check_owner()
        self._take_again(self._hold_delayed(deliveries, self._take_again))

    def _take_again(self, deliveries: Sequence[Delivery]) -> None:
        now, returning = time.monotonic(), self._returning
        returning.extend(deliveries)
        while returning:
            self.sender.readmit(returning[0], now)
            returning.popleft()
        self._expire_overdue(deliveries)
        self.relieve()

    def pass_on(self, deliveries: Sequence[Delivery], owner: Owner) -> None:
        """Have another connection send messages that belong to this one, and are not written."""
        self.io_loop.check_owner()
        for delivery in deliveries:
            delivery.hand_over(owner)
        if not owner.order(partial(owner.readmit, deliveries)):
            for delivery in deliveries:
                delivery.give_to(self)
            self.readmit(deliveries)  # the producer is being closed, and they are told here

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages that are stored, as `accept` and `pump` do with others."""
        self.io_loop.check_owner()
        self.sender.stored_ahead(deliveries)
        self.readmit(deliveries)
        now = time.monotonic()
        for delivery in deliveries:
            if delivery.deadline <= now:
                self.expire(delivery)  # its publisher has asked while it was being stored
        self._wake()

    def stored(self, deliveries: Sequence[Delivery]) -> None:
        """Tell publishers that their messages are stored."""
        self.io_loop.check_owner()
        self.sender.stored(deliveries, time.monotonic())

    def not_stored(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """Tell publishers that the store cannot take their messages."""
        self.io_loop.check_owner()
        for delivery, error in refusals:
            self.sender.not_stored(delivery, error, time.monotonic())

    def withdrawn(self, deliveries: Sequence[Delivery], *, gone: bool) -> None:
        """Tell publishers that their messages are their own again."""
        self.io_loop.check_owner()
        self.sender.withdrawn(deliveries, time.monotonic(), gone=gone)

    def taken_over(self, deliveries: Sequence[Delivery]) -> None:
        """Send no more what another process has claimed."""
        self.io_loop.check_owner()
        self.sender.taken_over(deliveries, time.monotonic())

    def ended_elsewhere(self, deliveries: Sequence[Delivery], *, dead: bool) -> None:
        """Tell what became of messages in another process."""
        self.io_loop.check_owner()
        self.sender.ended_elsewhere(deliveries, time.monotonic(), dead=dead)

    def vanished(self, deliveries: Sequence[Delivery]) -> None:
        """Fail what the store has lost."""
        self.io_loop.check_owner()
        self.sender.vanished(deliveries)

    def declare(self, answer: OnDeclared) -> None:
        """Declare what was added; a connection that is still to come begins with that."""
        connection = self.connector.connection
        if connection is None:
            answer(good=True)
        elif self.sender.blocked:
            answer(good=False)  # a broker that blocks does not read it
        else:
            connection.declare_added(answer)

    def dial(self) -> None:
        """Connect, now, unless the broker is there and merely blocks."""
        self.connector.dial()

    def store_rest(self, done: Latch) -> None:
        """Have a durable store take what is left; the latch is opened once it has.

        A close() that was cut by an interrupt orders it again; it is done once.
        """
        self.io_loop.check_owner()
        if not self.sender.shutdown.begun:
            self._delayed.release()
            self.sender.shutdown.store_rest(time.monotonic())
            self._retry_worker.verify()
        self._retry_worker.thread.order(done.open)

    def close(self) -> None:
        """Answer every publisher, and end the connection and the thread; once."""
        self.io_loop.check_owner()
        if self._closed:
            return
        self._delayed.release()
        stored = [
            each for each in self._retry_worker.stored_rows.deliveries() if each.owner is self
        ]
        rowless = frozenset(self._retry_worker.stored_rows.rowless)
        self.sender.shutdown.end(stored, rowless, time.monotonic())
        self.connector.close()
        self._closed = True

    def probe(self, reply: Future[None]) -> None:
        """Ask the broker whether it is there, unless it is known why it would not answer."""
        connection = self.connector.connection
        if (
            connection is None
            or not connection.probes
            or not self.is_connected
            or self.sender.blocked
        ):
            settle(reply)
            return
        self._health_probe.begin(connection.side_channel, connection.traffic, reply)

    def silent(self, reply: Future[None]) -> None:
        """Give up a broker that has not answered in time."""
        if self._health_probe.is_silent(reply):
            self._emit(events.HealthChecked(alive=False))
            self.connector.give_up("no answer to the health check")
            self._health_probe.end()

    def cool(self) -> None:
        """Let a probe through the breaker, and look for one in the store.

        A probe whose time is up says as much as any confirm timeout: the broker is asked whether it
        is there.
        """
        probing = self.sender.breaker.state is CircuitState.HALF_OPEN
        self.sender.breaker.cool(time.monotonic())
        if probing and self.sender.breaker.state is CircuitState.OPEN:
            self._health.check_soon()
        self.pump()
        self._retry_worker.sweep_soon()

    def _circuit_changed(self, state: CircuitState) -> None:
        if state is CircuitState.OPEN:
            self.order(self.relieve)  # not at once: the sender is in the middle of something
        self._emit(events.CircuitChanged(state))

    # --- what the connector tells -----------------------------------------------------------------

    def _attempt_failed(self, loss: Loss) -> None:
        """Fail what waits for a connection that does not come."""
        self._emit(events.ConnectFailed(loss))
        if loss.kind is LossKind.AUTHENTICATION:
            error: PublishError = AuthenticationError(loss.text, **loss.facts)
        else:
            error = NotConnectedError(f"not connected: {loss.text}", **loss.facts)
        self.relieve(Standing.REFUSES)
        self.sender.refuse(error, time.monotonic())

    def _finished(self) -> None:
        """End the thread."""
        self.is_connected = False
        self.io_loop.stop()

    # --- what the connection tells ---------------------------------------------------------------

    def connection_ready(self, channel: Channel) -> None:
        """Let the sender carry on the new channel, once what it needs is declared."""
        connection = self.connector.connection
        if connection is not None:
            self._delayed.prepare(
                connection.declaring_channel, partial(self._connection_ready, channel)
            )

    def _connection_ready(self, channel: Channel) -> None:
        first = self.connector.state is ConnectionState.CONNECTING
        self.connector.ready()
        self._dead_letter_maker.longest = channel.longest_properties
        self._channel = channel
        delayed = self._delayed
        self.sender.up(delayed.addressing(channel) if delayed.passes else channel)
        if first:
            self.sender.breaker.reconnected()
            if not (self._retry_worker.depth.stored or len(self._gate)):
                self.sender.timeouts = 0  # nothing is left that could be confirmed
            self.is_connected = True
            self._connected.changed()
            self._emit(events.Connected(self.connector.endpoint.broker.address))
        self.pump()
        self._invite()
        self._retry_worker.sweep_soon()

    def connection_failed(self, loss: Loss) -> None:
        """Let the sender decide for what was in flight, and the connector go on."""
        was_up = self.is_connected
        self.is_connected = False
        self._health_probe.end()
        self._delayed.lost(loss)
        self._channel = None
        self.sender.down(loss, time.monotonic())
        self.sender.disconnected()
        self.connector.lost()  # first: a callback for the event may ask for the status
        if was_up:
            self._emit(events.Disconnected(loss))
        self.order(self._recover_held)  # not at once: a callback may be in the middle of something
        self.connector.failed(loss)
        self.relieve()

    def channel_lost(self, loss: Loss) -> None:
        """Let the sender find out whose fault it was."""
        self._emit(events.ChannelLost(loss))
        if loss.reply_code == NOT_FOUND:
            self._delayed.forget()
        self._channel = None
        self.sender.down(loss, time.monotonic())

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Stop writing, or go on."""
        self.sender.block(blocked=blocked)
        self._emit(events.FlowChanged(blocked=blocked, reason=reason))
        if blocked:
            self._health_probe.end()  # a broker that blocks does not read our question
            self.relieve()
        else:
            self.pump()
            self._invite()
            self._retry_worker.sweep_soon()

    def topology_fault(self, declaration: Declaration, loss: Loss) -> None:
        """Report what could not be declared, once: it is tried on every connection."""
        fault = declaration.method, declaration.target, loss.reply_code
        if fault not in self._faults:
            self._faults.add(fault)
            self._emit(events.TopologyFault(declaration.target, loss))

    def probe_refused(self, loss: Loss) -> None:
        """Ask this broker no more: it is well, and its silence is noticed by heartbeats."""
        self._health_probe.end()
        if self._health_probe.excuses(loss):
            return
        if self.connector.without_probes():
            text = f"no health check: only heartbeats notice its silence: {loss.text}"
            self._emit(events.HealthFault(self._topology.exchange, evolve(loss, text=text)))

    def acked(self, confirms: Sequence[Confirm]) -> None:
        """Settle, and write what could not be written before."""
        if not self.connector.stable:
            self.connector.settle()
        if self.sender.acked(confirms, time.monotonic()):
            self.pump()
        elif self._retry_worker.hurries and self._gate.welcomes():
            self._retry_worker.sweep_soon()

    def nacked(self, confirms: Sequence[Confirm]) -> None:
        """Settle what was refused."""
        if self.sender.nacked(confirms, time.monotonic()):
            self.pump()

    def letters_refused(self, tags: Sequence[int], loss: Loss) -> None:
        """Keep dead letters for later, as if they had been returned; no other message is hit."""
        self._emit(events.ChannelLost(loss))
        now = time.monotonic()
        for tag in tags:
            self.sender.returned(tag, loss.reply_code, loss.text)
            self.sender.acked([(tag, False)], now)

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        """Note what has no queue."""
        self.sender.returned(tag, reply_code, reply_text)


def _trip(settings: Settings) -> Trip:
    if settings.circuit_breaker_mode == "adaptive" and settings.circuit_breaker_threshold:
        return Adaptive()
    return Consecutive(settings.circuit_breaker_threshold)


def _patience(settings: Settings) -> Patience:
    jitter, rare = settings.reconnect_jitter, settings.gave_up_interval
    first, longest = settings.reconnect_initial_delay, settings.reconnect_max_delay
    return Patience(
        Backoff(first, longest, jitter),
        settings.max_reconnect_attempts,
        Backoff(rare, rare, jitter) if rare else None,
    )
