"""What works on the I/O thread: the courier that judges, the dialer that keeps the link alive.

Others hand deliveries and orders in by the reactor's mailbox and read the few plain attributes that
are marked for them. A delivery belongs to one connection at a time. What has not been written goes
to another one that can carry it while this one cannot; the thread that has it hands it over.

Runs on: the I/O thread, except where a method says otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from attrs import evolve

from mlproducer import clock as time
from mlproducer.core.backoff import Backoff
from mlproducer.core.breaker import Adaptive, Breaker, Consecutive, Trip
from mlproducer.core.courier import Courier
from mlproducer.core.delivery import Delivery, Place
from mlproducer.core.ports import Carrier, Desk, Loss, LossKind
from mlproducer.core.states import CircuitState, ConnectionState
from mlproducer.core.trial import NOT_FOUND
from mlproducer.engine.checkup import Checkup
from mlproducer.engine.cooldown import Cooldown
from mlproducer.engine.delays import DelayedDelivery, OpenChannel
from mlproducer.engine.dialer import Dialer, Patience
from mlproducer.engine.gate import Gate
from mlproducer.engine.health import Health, settle
from mlproducer.engine.keeper import Keeper
from mlproducer.engine.link import Answer, EventLoop
from mlproducer.engine.reactor import Reactor
from mlproducer.engine.resolver import Resolver
from mlproducer.engine.threads import TimerThread
from mlproducer.engine.undertaker import Undertaker
from mlproducer.errors import AuthenticationError, NotConnectedError, PublishError
from mlproducer.latch import Latch, Relay, Watch
from mlproducer.observe.events import EventSink
from mlproducer.settings import Settings
from mlproducer.topology import Declaration, Topology
from mlproducer.wire.delay import Delays

TICK = 1.0
"""Seconds between looks at what is overdue."""

MANY = 1000
"""Messages that one sweep sends at most, so that it does not starve new ones."""

STORE_LIMIT = 0.1
"""Seconds beyond a publisher's deadline that the store may take to store, or delete, a message."""

SLOW = 0.02
"""Seconds after which publishers are let through whoever has not passed on."""

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
        keeper: Keeper,
        events: EventSink,
        connected: Watch,
        number: int,
    ) -> None:
        self._give_up = settings.confirm_give_up
        self._events = events
        self._gate = gate
        self._keeper = keeper
        self.reactor = Reactor(self)
        self.order = self.reactor.order
        self._connected = connected
        self.relay = Relay(self._remind)
        self.is_connected = False
        self._topology = Topology.of(settings)
        self._checkup = Checkup(self._topology, events)
        self._health = Health(self, settings.health_check_interval)
        self._cooldown = Cooldown(self)
        breaker = Breaker(
            _trip(settings),
            settings.circuit_breaker_cooldown,
            settings.publish_timeout,
            self._circuit_changed,
            self._cooldown.wait_until,
        )
        self._delayed = DelayedDelivery(
            Delays.of(self._topology, settings.queue_prefix),
            active=settings.declare_topology == "active",
            call_later=self.reactor.call_later,
            fault=self.topology_fault,
            resume=self._pump,
        )
        self._undertaker = Undertaker(self._topology.dead_letter_exchange, self._delayed.plain)
        self.courier = Courier(
            settings.max_message_retries, breaker, keeper, self._undertaker, gate, events
        )
        self.dialer = Dialer(resolver, _patience(settings), self, number)
        self.peers: Sequence[IOThread] = ()
        self._breathing = False
        self._closes = False
        self._faults: set[tuple[str, str, int]] = set()

    # --- for any thread ------------------------------------------------------------------------

    def ready(self) -> int:
        """How many messages handed over now would be written: none, one as a probe, or many."""
        if not self.courier.able:
            return 0
        return MANY if self.courier.breaker.state is CircuitState.CLOSED else 1

    def standing(self) -> Standing:
        """What would become of a message handed over now."""
        courier = self.courier
        if courier.able:
            closed = courier.breaker.state is CircuitState.CLOSED
            return Standing.CARRIES if closed else Standing.PROBES
        if courier.breaker.refuses():
            return Standing.SHUT
        return Standing.REFUSES if courier.refused else Standing.WAITS

    def burden(self) -> int:
        """How many messages are here; some may be counted twice, or not, on their way through."""
        courier = self.courier
        return len(self.reactor.mailbox) + courier.waiting + courier.in_flight

    def peer(self, mine: Standing | None = None) -> IOThread | None:
        """Give another connection for what this one cannot carry, unless none is better off.

        :param mine: this one's standing, where it is about to change
        """
        if not self.peers:
            return None
        mine = mine or self.standing()
        if mine is Standing.CARRIES or (mine is Standing.PROBES and not self.courier.waiting):
            return None
        peer = min(self.peers, key=IOThread.rank)
        theirs = peer.standing()
        hopeful = theirs is Standing.WAITS and mine in (Standing.REFUSES, Standing.SHUT)
        return peer if theirs is Standing.CARRIES or hopeful else None

    def rank(self) -> tuple[Standing, int]:
        """Say how well it would carry the next message; the lowest does best."""
        return self.standing(), self.burden()

    def timers(self) -> dict[str, TimerThread]:
        """Give the timer threads by their roles."""
        return {
            "health": self._health.thread,
            "breaker": self._cooldown.thread,
        }

    def stop_timers(self) -> None:
        """End the timer threads, once they have done what they were told so far."""
        self._health.stop()
        self._cooldown.thread.stop()

    def leave(self) -> None:
        """Do nothing more, in a forked child; greenlets, unlike threads, go on in it."""
        self.reactor.leave()
        self.dialer.leave()
        for thread in self.timers().values():
            thread.leave()

    # --- what the reactor tells ----------------------------------------------------------------

    def begin(self, loop: EventLoop) -> None:
        """Connect on a new loop, at once or, where an earlier loop failed, after a delay."""
        self.dialer.attach(loop)
        self._breathing = False
        self.relay.hurry()
        self._tick()
        if self.dialer.failures:
            self.dialer.redial()
        else:
            self.dialer.dial()

    def accept(self, deliveries: Sequence[Delivery]) -> None:
        """Take deliveries from publishers, who start attempts over that were used up."""
        self._take(self._delayed.hold(deliveries, self._take, self._channels()))
        self._wake()

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        now = time.monotonic()
        if not self.peers or self.standing() is Standing.CARRIES:
            self.courier.accept(deliveries, now)
        else:
            for delivery in deliveries:
                if not self._give(delivery):
                    self.courier.accept((delivery,), now)

    def _channels(self) -> OpenChannel | None:
        """Give what opens a channel for declarations on a link that carries messages."""
        link = self.dialer.link
        return None if link is None or not self.is_connected else link.side_channel

    def after_burst(self) -> None:
        """Write what has come."""
        self._pump()

    def failed(self, error: BaseException) -> None:
        """Tell those who wait that the loop failed."""
        self._events.crashed(error)
        self.is_connected = False
        self._delayed.forget()
        self.dialer.crashed()
        self.courier.down(Loss("the I/O loop failed"), time.monotonic())
        self.courier.disconnected()

    def _give(self, delivery: Delivery) -> bool:
        """Let another connection accept a delivery, if there is one that is better off."""
        peer = self.peer()
        if peer is None:
            return False
        delivery.desk = peer
        given = peer.reactor.mailbox.put(delivery)
        if not given:
            delivery.desk = self
        return given

    def relieve(self, mine: Standing | None = None) -> None:
        """Let another connection have what waits here, if there is one that is better off.

        :param mine: its standing, where an attempt to connect has failed: then suspects go, too
        """
        peer = self.peer(mine) if self.courier.waiting else None
        if peer is not None:
            self.pass_on(self.courier.release(suspects=mine is Standing.REFUSES), peer)

    def _invite(self) -> None:
        """Offer to carry what waits on other connections, now that this one can."""
        for peer in self.peers:
            peer.order(peer.relieve)

    def _wake(self) -> None:
        """Tell the dialers of all connections that something is to be sent."""
        self.dialer.called()
        for peer in self.peers:
            if peer.dialer.hears_calls:
                peer.order(peer.dialer.called)

    def _pump(self) -> None:
        courier = self.courier
        courier.pump(time.monotonic())
        if courier.waiting and courier.able and not self._breathing:
            self._breathing = True
            self.reactor.call_later(BREATH, self._breathe)

    def _breathe(self) -> None:
        self._breathing = False
        self._pump()

    def ended(self) -> None:
        """Let publishers through whose turn would have come by a timer."""
        self.relay.hurry()

    def _remind(self) -> None:
        """See that publishers come through; asked by any thread that has an answer for one."""
        if not self.order(self._hurry_later):
            self.relay.hurry()

    def _hurry_later(self) -> None:
        if not self.reactor.call_later(SLOW, self.relay.hurry):
            self.relay.hurry()

    def _tick(self) -> None:
        self.reactor.call_later(TICK, self._tick)
        if self.courier.overdue(time.monotonic(), self._give_up) and not self.courier.blocked:
            self.dialer.give_up("confirms are overdue")

    # --- orders, by way of the mailbox ---------------------------------------------------------

    def turn_away(self, delivery: Delivery) -> None:
        """Judge a message for which there was no room in time."""
        self.courier.turn_away(delivery, time.monotonic())

    def expire(self, delivery: Delivery) -> None:
        """End a publisher's wait."""
        self._delayed.release(delivery)
        if delivery.desk is not None and delivery.desk is not self:
            delivery.desk.order(partial(delivery.desk.expire, delivery))  # it was handed over
            return
        self.courier.expire(delivery, time.monotonic())
        if delivery.place is Place.IN_FLIGHT:
            self._health.check_soon()
        if self.courier.judge.owes(delivery):
            self.reactor.call_later(STORE_LIMIT, partial(self._pay, delivery))

    def _pay(self, delivery: Delivery) -> None:
        self.courier.pay(delivery, time.monotonic())

    def readmit(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages that the keeper held."""
        self._take_again(self._delayed.hold(deliveries, self._take_again, self._channels()))

    def _take_again(self, deliveries: Sequence[Delivery]) -> None:
        now = time.monotonic()
        for delivery in deliveries:
            self.courier.readmit(delivery, now)
        self.relieve()

    def pass_on(self, deliveries: Sequence[Delivery], desk: Desk) -> None:
        """Have another connection send messages that belong to this one, and are not written."""
        for delivery in deliveries:
            delivery.desk = desk
        if not desk.order(partial(desk.readmit, deliveries)):
            for delivery in deliveries:
                delivery.desk = self
            self.readmit(deliveries)  # the producer is being closed, and they are told here

    def stored_ahead(self, deliveries: Sequence[Delivery]) -> None:
        """Send messages that are stored, as `accept` and `after_burst` do with others."""
        self.readmit(deliveries)
        now = time.monotonic()
        for delivery in deliveries:
            if delivery.deadline <= now:
                self.expire(delivery)  # its publisher has asked while it was being stored
        self._wake()

    def kept(self, deliveries: Sequence[Delivery]) -> None:
        """Tell publishers that their messages are stored."""
        self.courier.kept(deliveries, time.monotonic())

    def not_kept(self, refusals: Sequence[tuple[Delivery, PublishError]]) -> None:
        """Tell publishers that the store cannot take their messages."""
        for delivery, error in refusals:
            self.courier.not_kept(delivery, error, time.monotonic())

    def withdrawn(self, deliveries: Sequence[Delivery], *, gone: bool) -> None:
        """Tell publishers that their messages are their own again."""
        self.courier.withdrawn(deliveries, time.monotonic(), gone=gone)

    def taken_over(self, deliveries: Sequence[Delivery]) -> None:
        """Send no more what another process has claimed."""
        self.courier.taken_over(deliveries, time.monotonic())

    def learned(self, deliveries: Sequence[Delivery], *, dead: bool) -> None:
        """Tell what became of messages in another process."""
        self.courier.ended(deliveries, time.monotonic(), dead=dead)

    def vanished(self, deliveries: Sequence[Delivery]) -> None:
        """Give back what the store has lost."""
        self.courier.vanished(deliveries)

    def declare(self, answer: Answer) -> None:
        """Have the link declare what was added; one that is still to come begins with that."""
        link = self.dialer.link
        if link is None:
            answer(good=True)
        elif self.courier.blocked:
            answer(good=False)  # a broker that blocks does not read it
        else:
            link.declare_added(answer)

    def dial(self) -> None:
        """Connect, now, unless the broker is there and merely blocks."""
        self.dialer.dial()

    def shelve(self, done: Latch) -> None:
        """Have a durable store take what is left; the latch is opened once it has.

        A close() that was cut by an interrupt orders it again; it is done once.
        """
        if not self.courier.farewell.begun:
            self._delayed.release()
            self.courier.farewell.shelve(time.monotonic())
            self._keeper.verify()
        self._keeper.thread.order(done.open)

    def close(self) -> None:
        """Tell everybody how it stands, and end the link and the thread; once."""
        if self._closes:
            return
        self._closes = True
        self._delayed.release()
        stored = [each for each in self._keeper.shelf.deliveries() if each.desk is self]
        rowless = frozenset(self._keeper.shelf.rowless)
        self.courier.farewell.abandon(stored, rowless, time.monotonic())
        self.dialer.close()

    def probe(self, reply: Future[None]) -> None:
        """Ask the broker whether it is there, unless it is known why it would not answer."""
        link = self.dialer.link
        if link is None or not link.probes or not self.is_connected or self.courier.blocked:
            settle(reply)
            return
        self._checkup.begin(link.side_channel, reply)

    def silent(self, reply: Future[None]) -> None:
        """Give up a broker that has not answered, unless the answer came meanwhile."""
        if self._checkup.waits_for(reply):
            self._events.health_checked(alive=False)
            self.dialer.give_up("no answer to the health check")

    def cool(self) -> None:
        """Let a probe through the breaker, and look for one in the store.

        A probe whose time is up says as much as any confirm timeout: the broker is asked whether it
        is there.
        """
        probing = self.courier.breaker.state is CircuitState.HALF_OPEN
        self.courier.breaker.cool(time.monotonic())
        if probing and self.courier.breaker.state is CircuitState.OPEN:
            self._health.check_soon()
        self._pump()
        self._keeper.sweep_soon()

    def _circuit_changed(self, state: CircuitState) -> None:
        if state is CircuitState.OPEN:
            self.order(self.relieve)  # not at once: the courier is in the middle of something
        self._events.circuit_changed(state)

    # --- what the dialer tells -----------------------------------------------------------------

    def attempt_failed(self, loss: Loss) -> None:
        """Let nobody wait for a link that does not come."""
        self._events.connection_error(loss)
        if loss.kind is LossKind.AUTHENTICATION:
            error: PublishError = AuthenticationError(loss.text, **loss.facts)
        else:
            error = NotConnectedError(f"not connected: {loss.text}", **loss.facts)
        self.relieve(Standing.REFUSES)
        self.courier.refuse(error, time.monotonic())

    def gave_up(self, loss: Loss) -> None:
        """Say that attempts are rare from now on, until a call starts them over."""
        self._events.gave_up(self.dialer.failures, loss)

    def state_changed(self, state: ConnectionState) -> None:
        """Tell whoever wants to know."""
        self._events.state_changed(state)

    def finished(self) -> None:
        """End the thread."""
        self.is_connected = False
        self.reactor.stop()

    # --- what the link tells -------------------------------------------------------------------

    def link_ready(self, channel: Carrier) -> None:
        """Let the courier carry on the new channel, once what it needs is declared."""
        link = self.dialer.link
        if link is not None:
            self._delayed.prepare(link.side_channel, partial(self._link_ready, channel))

    def _link_ready(self, channel: Carrier) -> None:
        first = self.dialer.state is ConnectionState.CONNECTING
        self.dialer.ready()
        self._undertaker.longest = channel.longest_properties
        self.courier.up(self._delayed.carrier(channel))
        if first:
            self.courier.breaker.reconnected()
            if not (self._keeper.depth.stored or len(self._gate)):
                self.courier.timeouts = 0  # nothing is left that could be confirmed
            self.is_connected = True
            self._connected.changed()
            self._events.connected(self.dialer.route.broker.address)
        self._pump()
        self._invite()
        self._keeper.sweep_soon()

    def link_failed(self, loss: Loss) -> None:
        """Let the courier decide for what was in flight, and the dialer go on."""
        was_up = self.is_connected
        self.is_connected = False
        self._checkup.end()
        self._delayed.forget()
        self.courier.down(loss, time.monotonic())
        self.courier.disconnected()
        if was_up:
            self._events.disconnected(loss)
        self.dialer.failed(loss)
        self.relieve()

    def channel_lost(self, loss: Loss) -> None:
        """Let the courier find out whose fault it was."""
        self._events.channel_lost(loss)
        if loss.reply_code == NOT_FOUND:
            self._delayed.forget()
        self.courier.down(loss, time.monotonic())

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Stop writing, or go on."""
        self.courier.block(blocked=blocked)
        self._events.flow_changed(blocked=blocked, reason=reason)
        if blocked:
            self._checkup.end()  # a broker that blocks does not read our question
            self.relieve()
        else:
            self._pump()
            self._invite()
            self._keeper.sweep_soon()

    def topology_fault(self, declaration: Declaration, loss: Loss) -> None:
        """Report what could not be declared, once: it is tried on every connection."""
        fault = declaration.method, declaration.target, loss.reply_code
        if fault not in self._faults:
            self._faults.add(fault)
            self._events.topology_fault(declaration.target, loss)

    def probe_refused(self, loss: Loss) -> None:
        """Ask this broker no more: it is well, and its silence is noticed by heartbeats."""
        self._checkup.end()
        if self.dialer.without_probes():
            text = f"no health check: only heartbeats notice its silence: {loss.text}"
            self._events.health_fault(self._topology.exchange, evolve(loss, text=text))

    def acked(self, tag: int, *, multiple: bool) -> None:
        """Settle, and write what could not be written before."""
        self.dialer.settle()
        self.courier.acked(tag, time.monotonic(), multiple=multiple)
        if self.courier.waiting:
            self._pump()
        elif self._keeper.hurries and self._gate.welcomes():
            self._keeper.sweep_soon()

    def nacked(self, tag: int, *, multiple: bool) -> None:
        """Settle what was refused."""
        self.courier.nacked(tag, time.monotonic(), multiple=multiple)
        if self.courier.waiting:
            self._pump()

    def letters_refused(self, tags: Sequence[int], loss: Loss) -> None:
        """Keep dead letters for later, as if they had been returned; no other message is hit."""
        self._events.channel_lost(loss)
        now = time.monotonic()
        for tag in tags:
            self.courier.returned(tag, loss.reply_code, loss.text)
            self.courier.acked(tag, now, multiple=False)

    def returned(self, tag: int, reply_code: int, reply_text: str) -> None:
        """Note what has no queue."""
        self.courier.returned(tag, reply_code, reply_text)


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
