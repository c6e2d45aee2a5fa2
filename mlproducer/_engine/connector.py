"""Keeps one connection alive: which broker is next, when, and when to try only now and then.

An attempt tries every broker of the list in turn, and of each every address that its name leads to;
only when all have failed has the attempt failed. Each address has its share of the broker's time,
so that a silent one does not use up that of the others. Then the delay grows (RabbitMQ guide,
*Connections*, recommends backoff with jitter so that a runtime does not return in step). The count
of failures goes back to zero once a connection was stable, that is, had a confirm or lasted, so
that a broker which accepts and drops is not hammered.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import evolve, frozen

from mlproducer import _clock as time
from mlproducer._core import events
from mlproducer._core.backoff import Backoff
from mlproducer._core.events import Emit
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._core.states import LINK_MOVES, ConnectionEvent, ConnectionState, Machine
from mlproducer._engine.close_reasons import NOT_ALLOWED
from mlproducer._engine.connection import Connection
from mlproducer._engine.connection_owner import ConnectionOwner
from mlproducer._engine.endpoints import Address, Endpoint, Identity, ResolvedEndpoint
from mlproducer._engine.io_loop import EventLoop
from mlproducer._engine.resolver import Resolver
from mlproducer._foreign_calls import write
from mlproducer.topology import Declaration

logger = logging.getLogger(__name__)

STABLE_AFTER = 5.0
"""Seconds that a connection without traffic must last to count as stable."""

CLOSE_LIMIT = 0.15
"""Seconds for the closing handshake, and for pika to see a cut; a hanging broker answers none."""

CALL_AFTER = 5.0
"""Seconds since an attempt with refused credentials after which a call may start the next."""

NEXT_ADDRESS_AFTER = 2.0
"""Seconds that TCP may take where there is another address; a lost packet is sent again by then."""

RENEW_AT = 0.8
"""The share of a token's life after which it is renewed; what is left is for further tries."""

RENEW_SHORTEST = 0.25
"""Seconds between renewals at least: some give what is left of a token that is about to end."""

RENEW_AGAIN = 0.05
"""The share of a token's life between those tries."""


@frozen
class Patience:
    """How long to wait between attempts.

    :ivar backoff: after each failure
    :ivar limit: failures after which the attempts are used up
    :ivar rare: after that; ``None``: there are no more
    """

    backoff: Backoff
    limit: int
    rare: Backoff | None


class Connector:
    """Opens connections, one at a time.

    :param owner: is told what happens on each connection
    :param order: has something done on the I/O thread
    :param attempt_failed: is told when no broker of the list could be reached
    :param finished: is called when the connection is closed for good
    :param turn: with which broker of the list to begin, so that connections spread over them
    :ivar failures: attempts that failed since the connection was last stable
    """

    def __init__(
        self,
        resolver: Resolver,
        patience: Patience,
        owner: ConnectionOwner,
        order: Callable[[Callable[[], None]], bool],
        emit: Emit,
        attempt_failed: Callable[[Loss], None],
        finished: Callable[[], None],
        turn: int,
    ) -> None:
        self._resolver = resolver
        self._patience = patience
        self._owner = owner
        self._order = order
        self._emit = emit
        self._attempt_failed = attempt_failed
        self._finished = finished
        self._machine = Machine(LINK_MOVES, ConnectionState.DISCONNECTED)
        self._turn = turn
        self._tried = 0
        self._begun_at = 0.0
        self._refused = False
        self._gave_up = False
        self.stable = False
        self._delays = 0
        self.failures = 0
        self._resolved: ResolvedEndpoint | None = None
        self._addresses: deque[Address] = deque()
        self._address: Address | None = None
        self._good: set[Address] = set()
        self._deadline = 0.0
        self._skipped: list[tuple[str, Declaration]] = []
        self._without_probes: set[str] = set()
        self._connection: Connection | None = None
        self._timer: Any = None
        self._renewal: Any = None
        self._loop: EventLoop | None = None

    @property
    def state(self) -> ConnectionState:
        """Where the connection stands; anyone may look."""
        return self._machine.state

    @property
    def idle(self) -> bool:
        """The attempts are used up: none is made but the rare ones."""
        return self.state is ConnectionState.DISCONNECTED and (self._gave_up or self._timer is None)

    @property
    def hears_calls(self) -> bool:
        """Whether `called` would begin an attempt; anyone may look."""
        if self.state is not ConnectionState.DISCONNECTED:
            return False
        return self.idle or (self._refused and time.monotonic() - self._begun_at >= CALL_AFTER)

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint now in use, or tried last; anyone may look."""
        resolved = self._resolved  # read once: the I/O thread may forget it at any moment
        if resolved is not None:
            return resolved.endpoint
        endpoints = self._resolver.directory.known
        return endpoints[self._turn % len(endpoints)]

    @property
    def connection(self) -> Connection | None:
        """The connection in use, or being opened."""
        return self._connection

    def attach(self, loop: EventLoop) -> None:
        """Use a loop; a new one where the old one failed."""
        self._loop = loop
        self._timer = self._renewal = None

    def dial(self) -> None:
        """Try now; where the attempts were used up, start over."""
        if self.state is ConnectionState.DISCONNECTED:
            self._start_over()
            self._begin()

    def called(self) -> None:
        """Note that something is to be sent, which is worth an attempt that is not due yet.

        So it is where the attempts were used up, and where the credentials were refused a while
        ago: they may have been put right.
        """
        if self.hears_calls:
            self.dial()

    def ready(self) -> None:
        """Note that the connection carries messages."""
        if self.state is ConnectionState.CONNECTING:
            self.stable = self._refused = False
            if self._address is not None:
                self._good.add(self._address)
            self._step(ConnectionEvent.OPENED)
            self._set_timer(STABLE_AFTER, self.settle)
            if self._resolved is not None:
                self._renew_before(self._resolved.identity)

    def settle(self) -> None:
        """Note that the connection is stable: it was confirmed on, or has lasted."""
        if not self.stable and self.state is ConnectionState.CONNECTED:
            self.stable = True
            self._gave_up = False
            self.failures = self._delays = 0
            self._cancel_timer()

    def lost(self) -> None:
        """Note that the connection carries no messages any more, before `failed` goes on."""
        if self.state is ConnectionState.CONNECTED:
            self._step(ConnectionEvent.LOST)

    def failed(self, loss: Loss) -> None:
        """Go on after a connection that was `lost`, or never began to carry messages."""
        connection, self._connection = self._connection, None
        self._cancel_renewal()
        if self.state is ConnectionState.CLOSING:
            self._finish()
        elif connection is not None and connection.fatal is not None:
            self._skip(connection.fatal)
        elif self.state is ConnectionState.DISCONNECTED:
            self._reconnect(loss)
        elif self._addresses and loss.kind is not LossKind.AUTHENTICATION:
            self._forget_address()
            self._open()
        else:
            self._forget_address()
            self._endpoint_failed(loss)

    def give_up(self, why: str) -> None:
        """Drop a connection that is of no use although it stands."""
        if self._connection is not None:
            self._connection.give_up(why)

    def without_probes(self) -> bool:
        """Ask this broker no more questions beside publishing; false if that was known."""
        address = self.endpoint.broker.address
        known = address in self._without_probes
        self._without_probes.add(address)
        return not known

    def close(self) -> None:
        """Close for good; ``finished`` is called when that is done."""
        if not self._machine.allows(ConnectionEvent.CLOSE):
            if self.state is ConnectionState.CLOSING and self._connection is None:
                self._finish()  # the loop failed meanwhile, and the connection is gone
            return
        self._cancel_timer()
        self._cancel_renewal()
        self._step(ConnectionEvent.CLOSE)
        if self._connection is None:
            self._finish()
        else:
            self._set_timer(CLOSE_LIMIT, self._cut)
            self._connection.close()

    def _cut(self) -> None:
        self._set_timer(CLOSE_LIMIT, self._finish)
        if self._connection is not None:
            self._connection.cut()

    def crashed(self) -> None:
        """Leave everything that belonged to a loop that failed."""
        self._timer = self._renewal = None
        self.failures += 1
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        if self._machine.allows(ConnectionEvent.LOST):
            self._step(ConnectionEvent.LOST)

    def leave(self) -> None:
        """Have the connection, in a forked child, tell nothing, and open no other one."""
        connection, self._connection = self._connection, None
        self._loop = self._timer = self._renewal = None
        if connection is not None:
            connection.mute()

    def redial(self) -> None:
        """Try again after the delay that is due; each is longer than the one before."""
        self._redial_after(self._patience.backoff, self._delays)
        self._delays += 1

    def _finish(self) -> None:
        self._cancel_timer()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()  # what it would still tell, in the loop's last turn, is no loss
        self._step(ConnectionEvent.GONE)
        self._finished()

    # --- one attempt ---------------------------------------------------------------------------

    def _begin(self) -> None:
        self._cancel_timer()
        self._tried = 0
        self._begun_at = time.monotonic()
        self._step(ConnectionEvent.DIAL)
        self._seek()

    def _seek(self) -> None:
        """Have the next endpoint resolved, within its time."""
        self._resolved = None
        timeout = self.endpoint.broker.connection_timeout
        self._deadline = time.monotonic() + timeout
        self._set_timer(timeout, self._not_found_in_time)
        found = partial(self._on_found, self._timer)
        self._resolver.find(self._turn, lambda what: self._order(partial(found, what)))

    def _not_found_in_time(self) -> None:
        self._timer = None
        self._resolver.replace()
        text = f"{self.endpoint.broker.address}: host name or credentials were not found in time"
        self._endpoint_failed(Loss(text, kind=LossKind.TIMEOUT))

    def _on_found(self, asked: object, resolved: ResolvedEndpoint | Loss) -> None:
        if asked is not self._timer or self.state is not ConnectionState.CONNECTING:
            return  # too late
        self._cancel_timer()
        if isinstance(resolved, Loss):
            self._endpoint_failed(resolved)
        else:
            self._resolved = resolved
            # those that were good before go first: sorting keeps the resolver's order
            self._addresses = deque(
                sorted(resolved.addresses, key=lambda each: each not in self._good)
            )
            self._open()

    def _open(self) -> None:
        """Open a connection at the next address, with its share of the time that is left."""
        if self._loop is None or self._resolved is None:
            return
        left = max(0.0, self._deadline - time.monotonic())
        share = max(
            left / len(self._addresses), self._resolved.endpoint.broker.connection_timeout / 100
        )
        self._address = self._addresses.popleft()
        known = self._resolved.endpoint.broker.address
        connect = min(share, NEXT_ADDRESS_AFTER) if self._addresses else share
        self._connection = Connection(
            self._loop,
            self._resolved,
            self._address,
            (connect, share),
            self._owner,
            [declaration for broker, declaration in self._skipped if broker == known],
            probes=known not in self._without_probes,
        )

    def _forget_address(self) -> None:
        if self._address is not None:
            self._good.discard(self._address)

    def _endpoint_failed(self, loss: Loss) -> None:
        loss = evolve(loss, address=loss.address or self.endpoint.broker.address)
        self._tried += 1
        self._turn += 1
        self._refused = loss.kind is LossKind.AUTHENTICATION and loss.reply_code != NOT_ALLOWED
        if self._tried < len(self._resolver.directory.known):
            self._seek()
        else:
            self._step(ConnectionEvent.LOST)
            self._attempt_failed(loss)
            self._count_failure(loss)

    # --- after it ------------------------------------------------------------------------------

    def _reconnect(self, loss: Loss) -> None:
        """Go on after a connection that carried messages."""
        self._cancel_timer()
        self._tried = 0
        self._turn += 1
        if self.stable:
            self._skipped.clear()
            self.redial()
        else:
            self._forget_address()
            self._count_failure(loss)

    def _skip(self, declaration: Declaration) -> None:
        """Connect again without a declaration over which the broker ends connections.

        That is no failure: each time one declaration fewer is left.
        """
        self._skipped.append((self.endpoint.broker.address, declaration))
        self._cancel_timer()
        if self.state is ConnectionState.CONNECTING and self._address is not None:
            self._deadline = time.monotonic() + self.endpoint.broker.connection_timeout
            self._addresses.appendleft(self._address)
            self._set_timer(self._patience.backoff.initial, self._open_again)
            return
        self._redial_after(self._patience.backoff, 0)

    def _open_again(self) -> None:
        self._timer = None
        self._open()

    def _count_failure(self, loss: Loss) -> None:
        self.failures += 1
        if self.failures >= self._patience.limit:
            self._go_slow(loss)
        elif self._refused:
            self._redial_after(self._patience.backoff, 64)  # no lockout by hammering
        else:
            self.redial()

    def _go_slow(self, loss: Loss) -> None:
        """Try only now and then, since nothing else has helped; say so once."""
        told, self._gave_up = self._gave_up, True
        if self._patience.rare is not None:
            self._redial_after(self._patience.rare, 0)
        if not told:
            self._emit(events.GaveUp(self.failures, loss))

    def _start_over(self) -> None:
        if self.idle:
            self._gave_up = False
            self.failures = self._delays = 0

    # --- a token that ends ---------------------------------------------------------------------

    def _renew_before(self, identity: Identity) -> None:
        """Renew a token while it is still valid, on the open connection."""
        self._cancel_renewal()
        if identity.ends is not None and self._loop is not None:
            begun = identity.ends - identity.lifetime
            due = begun + identity.lifetime * RENEW_AT - time.monotonic()
            self._renewal = self._loop.call_later(max(RENEW_SHORTEST, due), self._renew)

    def _renew(self) -> None:
        self._renewal = None
        if self._resolved is not None:
            renewed = partial(self._on_renewed, self._connection)
            self._resolver.identify(
                self._resolved.endpoint, lambda found: self._order(partial(renewed, found))
            )

    def _on_renewed(self, connection: Connection | None, found: Identity | Loss) -> None:
        if (
            connection is None
            or connection is not self._connection
            or self.state is not ConnectionState.CONNECTED
        ):
            return  # the next connection has asked for itself
        if isinstance(found, Loss):
            self._renew_again(found)
        else:
            connection.renew(found.password)
            self._renew_before(found)

    def _renew_again(self, loss: Loss) -> None:
        if self._resolved is None or self._loop is None:
            return
        delay = max(1.0, self._resolved.identity.lifetime * RENEW_AGAIN)
        write(
            logger,
            logging.WARNING,
            "a token was not renewed: %s; trying again in %.0f s",
            loss.text,
            delay,
        )
        self._renewal = self._loop.call_later(delay, self._renew)

    # --- time ----------------------------------------------------------------------------------

    def _redial_after(self, backoff: Backoff, failures: int) -> None:
        self._set_timer(backoff.delay(failures, random.random()), self._begin)

    def _set_timer(self, delay: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        if self._loop is not None:
            self._timer = self._loop.call_later(delay, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._loop is not None:
            self._loop.remove_timeout(self._timer)
        self._timer = None

    def _cancel_renewal(self) -> None:
        if self._renewal is not None and self._loop is not None:
            self._loop.remove_timeout(self._renewal)
        self._renewal = None

    def _step(self, event: ConnectionEvent) -> None:
        self._emit(events.StateChanged(self._machine.step(event)))
