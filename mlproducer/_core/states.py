"""The states of the connection and of the circuit breaker, as tables of legal moves.

Whatever is not in a table is illegal: it raises and changes nothing.

Runs on: the I/O thread; anyone may read a state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)
Moves = Mapping[S, Mapping[E, S]]


class State(enum.Enum):
    """A state or event that is looked up for each message.

    An enum's own hash is that of its name, and Python code; by identity it is a constant in C.
    """

    __hash__ = object.__hash__


class IllegalMoveError(RuntimeError):
    """A state was asked for a move that its table does not have: a bug in this library."""


def illegal(state: enum.Enum, event: enum.Enum) -> IllegalMoveError:
    """Return the error of a move that is in no table."""
    return IllegalMoveError(f"{event.name} while {state.name}")


class Column(dict[S, S]):
    """Where one event leads, by the state before; another state raises `IllegalMoveError`."""

    def __init__(self, moves: Moves[S, E], event: E) -> None:
        super().__init__((state, legal[event]) for state, legal in moves.items() if event in legal)
        self._event = event

    def __missing__(self, state: S) -> S:
        raise illegal(state, self._event)


class Machine(Generic[S, E]):
    """A state that moves only as its table allows."""

    def __init__(self, moves: Moves[S, E], start: S) -> None:
        self._moves = moves
        self.state = start

    def step(self, event: E) -> S:
        """Make the move for ``event`` and give the new state.

        :raises IllegalMoveError: there is none; the state stays as it was
        """
        try:
            self.state = self._moves[self.state][event]
        except KeyError:
            raise illegal(self.state, event) from None
        return self.state

    def allows(self, event: E) -> bool:
        """Whether the table has a move for ``event`` from here."""
        return event in self._moves[self.state]


class ConnectionState(enum.IntEnum):
    """Where the connection to the broker stands; the numbers are those of the metric.

    Illegal, and why: DISCONNECTED to CONNECTED (no attempt was made); CONNECTED to CONNECTING (a
    loss must be seen first, since it decides what becomes of the messages in flight); CLOSED to
    anything (a closed producer stays closed).
    """

    DISCONNECTED = 1
    CONNECTING = 2
    CONNECTED = 3
    CLOSING = 4
    CLOSED = 5


class ConnectionEvent(enum.Enum):
    """What happens to the connection."""

    DIAL = enum.auto()
    OPENED = enum.auto()
    LOST = enum.auto()
    CLOSE = enum.auto()
    GONE = enum.auto()


LINK_MOVES: Moves[ConnectionState, ConnectionEvent] = {
    ConnectionState.DISCONNECTED: {
        ConnectionEvent.DIAL: ConnectionState.CONNECTING,
        ConnectionEvent.CLOSE: ConnectionState.CLOSING,
    },
    ConnectionState.CONNECTING: {
        ConnectionEvent.OPENED: ConnectionState.CONNECTED,
        ConnectionEvent.LOST: ConnectionState.DISCONNECTED,
        ConnectionEvent.CLOSE: ConnectionState.CLOSING,
    },
    ConnectionState.CONNECTED: {
        ConnectionEvent.LOST: ConnectionState.DISCONNECTED,
        ConnectionEvent.CLOSE: ConnectionState.CLOSING,
    },
    ConnectionState.CLOSING: {ConnectionEvent.GONE: ConnectionState.CLOSED},
    ConnectionState.CLOSED: {},
}


class CircuitState(enum.Enum):
    """Where the circuit breaker stands.

    Illegal, and why: CLOSED to HALF_OPEN (there is nothing to probe).
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitEvent(enum.Enum):
    """What moves the breaker."""

    TRIPPED = enum.auto()
    COOLED = enum.auto()
    CONFIRMED = enum.auto()
    PROBE_FAILED = enum.auto()


CIRCUIT_MOVES: Moves[CircuitState, CircuitEvent] = {
    CircuitState.CLOSED: {CircuitEvent.TRIPPED: CircuitState.OPEN},
    CircuitState.OPEN: {
        CircuitEvent.COOLED: CircuitState.HALF_OPEN,
        CircuitEvent.CONFIRMED: CircuitState.CLOSED,  # a late confirm
    },
    CircuitState.HALF_OPEN: {
        CircuitEvent.CONFIRMED: CircuitState.CLOSED,
        CircuitEvent.PROBE_FAILED: CircuitState.OPEN,
    },
}
