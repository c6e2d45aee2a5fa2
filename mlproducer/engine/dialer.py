"""Keeps one link alive: which broker is next, when, and when to stop trying.

An attempt tries every broker of the list in turn; only when all have failed has the attempt failed.
Then the delay grows (RabbitMQ guide, *Connections*, recommends backoff with jitter so that a fleet
does not return in step). The count of failures goes back to zero once a connection was stable, that
is, had a confirm or lasted, so that a broker which accepts and drops is not hammered.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from mlproducer.core.backoff import Backoff
from mlproducer.core.ports import Loss, LossKind
from mlproducer.core.states import LINK_MOVES, ConnectionState, LinkEvent, Machine
from mlproducer.engine.link import EventLoop, Link, Route
from mlproducer.engine.roles import DialerOwner

STABLE_AFTER = 5.0
"""Seconds that a connection without traffic must last to count as stable."""

CLOSE_LIMIT = 0.15
"""Seconds for the closing handshake, and for pika to see a cut; a hanging broker answers none."""


class Dialer:
    """Opens links, one at a time."""

    def __init__(
        self, routes: Sequence[Route], backoff: Backoff, limit: int, owner: DialerOwner
    ) -> None:
        self._routes = routes
        self._backoff = backoff
        self._limit = limit
        self._owner = owner
        self._machine = Machine(LINK_MOVES, ConnectionState.DISCONNECTED)
        self._next_route = 0
        self._tried = 0
        self._stable = False
        self._delays = 0
        self.failures = 0
        self._link: Link | None = None
        self._timer: Any = None
        self._loop: EventLoop | None = None

    @property
    def state(self) -> ConnectionState:
        """Where the link stands; anyone may look."""
        return self._machine.state

    @property
    def idle(self) -> bool:
        """Nothing is connected, under way or due."""
        return self.state is ConnectionState.DISCONNECTED and self._timer is None

    @property
    def route(self) -> Route:
        """The route now in use, or tried last."""
        return self._routes[self._next_route % len(self._routes)]

    def attach(self, loop: EventLoop) -> None:
        """Use a loop; a new one where the old one failed."""
        self._loop = loop
        self._timer = None

    def dial(self) -> None:
        """Try now; where the attempts were used up, start over."""
        if self.idle:
            self.failures = self._delays = 0
        if self.state is ConnectionState.DISCONNECTED:
            self._begin()

    def ready(self) -> None:
        """Note that the link carries messages."""
        if self.state is ConnectionState.CONNECTING:
            self._stable = False
            self._step(LinkEvent.OPENED)
            self._set_timer(STABLE_AFTER, self.settle)

    def settle(self) -> None:
        """Note that the connection is stable: it was confirmed on, or has lasted."""
        if not self._stable and self.state is ConnectionState.CONNECTED:
            self._stable = True
            self.failures = self._delays = 0
            self._cancel_timer()

    def failed(self, loss: Loss) -> None:
        """Go on after a link that ended, or never began."""
        self._link = None
        if self.state is ConnectionState.CLOSING:
            self._finish()
        elif self.state is ConnectionState.CONNECTED:
            self._cancel_timer()
            self._step(LinkEvent.LOST)
            self._tried = 0
            self._rotate()
            if self._stable:
                self.redial()
            else:
                self._count_failure(loss)
        else:
            self._tried += 1
            self._rotate()
            if self._tried < len(self._routes):
                self._open()
            else:
                self._step(LinkEvent.LOST)
                self._owner.attempt_failed(loss)
                self._count_failure(loss)

    @property
    def link(self) -> Link | None:
        """The link in use, or being opened."""
        return self._link

    def give_up(self, why: str) -> None:
        """Drop a link that is of no use although it stands."""
        if self._link is not None:
            self._link.give_up(why)

    def close(self) -> None:
        """Close for good; `DialerOwner.finished` follows."""
        if not self._machine.allows(LinkEvent.CLOSE):
            return
        self._cancel_timer()
        self._step(LinkEvent.CLOSE)
        if self._link is None:
            self._finish()
        else:
            self._set_timer(CLOSE_LIMIT, self._cut)
            self._link.close()

    def _cut(self) -> None:
        self._set_timer(CLOSE_LIMIT, self._finish)
        if self._link is not None:
            self._link.cut()

    def crashed(self) -> None:
        """Leave everything that belonged to a loop that failed."""
        self._timer = None
        self.failures += 1
        link, self._link = self._link, None
        if link is not None:
            link.abort()
        if self._machine.allows(LinkEvent.LOST):
            self._step(LinkEvent.LOST)

    def redial(self) -> None:
        """Try again after the delay that is due; each is longer than the one before."""
        self._redial_after(self._backoff.delay(self._delays, random.random()))
        self._delays += 1

    def _finish(self) -> None:
        self._cancel_timer()
        self._step(LinkEvent.GONE)
        self._owner.finished()

    def _open(self) -> None:
        if self._loop is not None:
            self._link = Link(self._loop, self.route, self._owner)

    def _count_failure(self, loss: Loss) -> None:
        self.failures += 1
        if self.failures >= self._limit:
            self._owner.gave_up(loss)
        elif loss.kind is LossKind.AUTHENTICATION:
            self._redial_after(self._backoff.delay(64, random.random()))  # no lockout by hammering
        else:
            self.redial()

    def _redial_after(self, delay: float) -> None:
        self._set_timer(delay, self._begin)

    def _begin(self) -> None:
        self._cancel_timer()
        self._tried = 0
        self._step(LinkEvent.DIAL)
        self._open()

    def _rotate(self) -> None:
        self._next_route += 1

    def _set_timer(self, delay: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        if self._loop is not None:
            self._timer = self._loop.call_later(delay, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._loop is not None:
            self._loop.remove_timeout(self._timer)
        self._timer = None

    def _step(self, event: LinkEvent) -> None:
        self._owner.state_changed(self._machine.step(event))
