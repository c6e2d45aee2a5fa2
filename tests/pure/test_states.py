"""The tables of legal moves."""

from __future__ import annotations

import enum
from itertools import product
from typing import Any

import pytest

from mlproducer._core.states import (
    CIRCUIT_MOVES,
    LINK_MOVES,
    CircuitEvent,
    CircuitState,
    ConnectionEvent,
    ConnectionState,
    IllegalMoveError,
    Machine,
)
from tests.pure.tables import each_row

TABLES = [
    pytest.param(LINK_MOVES, ConnectionEvent, ConnectionState.DISCONNECTED, id="connection"),
    pytest.param(CIRCUIT_MOVES, CircuitEvent, CircuitState.CLOSED, id="circuit"),
]


def reachable(moves: Any, start: enum.Enum) -> set[enum.Enum]:
    """Every state that some sequence of events leads to."""
    seen, fresh = {start}, {start}
    while fresh:
        fresh = {target for state in fresh for target in moves[state].values()} - seen
        seen |= fresh
    return seen


@pytest.mark.parametrize(("moves", "events", "start"), TABLES)
def test_every_state_is_reachable(moves: Any, events: type[enum.Enum], start: enum.Enum) -> None:
    """No state stands in the table that nothing leads to."""
    assert reachable(moves, start) == set(type(start))


@pytest.mark.parametrize(("moves", "events", "start"), TABLES)
def test_tables_are_total(moves: Any, events: type[enum.Enum], start: enum.Enum) -> None:
    """Every state has its row, even an empty one, and every event moves something."""
    assert set(moves) == set(type(start))
    assert {event for row in moves.values() for event in row} == set(events)
    assert {target for row in moves.values() for target in row.values()} <= set(moves)


@pytest.mark.parametrize("state", ConnectionState)
def test_closed_is_reachable_from_everywhere(state: ConnectionState) -> None:
    """Whatever a connection is doing, it can be closed."""
    assert ConnectionState.CLOSED in reachable(LINK_MOVES, state)


@pytest.mark.parametrize(("moves", "events", "start"), TABLES)
def test_a_machine_obeys_its_table(moves: Any, events: type[enum.Enum], start: enum.Enum) -> None:
    """A legal move is made; an illegal one raises, names both, and changes nothing."""
    each_row(product([moves], moves, events), obeys)


def obeys(moves: Any, state: enum.Enum, event: enum.Enum) -> None:
    """Try one event in one state."""
    machine: Machine[Any, Any] = Machine(moves, state)
    legal = event in moves[state]
    assert machine.allows(event) is legal
    if legal:
        assert machine.step(event) is machine.state is moves[state][event]
    else:
        with pytest.raises(IllegalMoveError, match=f"{event.name} while {state.name}"):
            machine.step(event)
        assert machine.state is state


EDGES = {
    ConnectionState: {
        "DISCONNECTED-CONNECTING",
        "CONNECTING-CONNECTED",
        "CONNECTING-DISCONNECTED",
        "CONNECTED-DISCONNECTED",
        "DISCONNECTED-CLOSING",
        "CONNECTING-CLOSING",
        "CONNECTED-CLOSING",
        "CLOSING-CLOSED",
    },
    CircuitState: {
        "CLOSED-OPEN",
        "OPEN-HALF_OPEN",
        "OPEN-CLOSED",
        "HALF_OPEN-CLOSED",
        "HALF_OPEN-OPEN",
    },
}
"""The documented moves of the connection and of the breaker (I17, I18)."""


@pytest.mark.parametrize(("moves", "events", "start"), TABLES)
def test_the_documented_moves(moves: Any, events: type[enum.Enum], start: enum.Enum) -> None:
    """Exactly these: a move that is not documented is illegal."""
    edges = {
        f"{state.name}-{target.name}" for state, row in moves.items() for target in row.values()
    }
    assert edges == EDGES[type(start)]


def test_the_numbers_of_the_metric() -> None:
    """The numbers that dashboards know do not change."""
    assert [(state.name, int(state)) for state in ConnectionState] == [
        ("DISCONNECTED", 1),
        ("CONNECTING", 2),
        ("CONNECTED", 3),
        ("CLOSING", 4),
        ("CLOSED", 5),
    ]
