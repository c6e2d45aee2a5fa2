"""The life of a message: what its three tables allow, and that nothing else moves it."""

from __future__ import annotations

import ast
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlproducer
from mlproducer._core import delivery_states as states
from mlproducer._core.delivery import Delivery, Doubt
from mlproducer._core.delivery_errors import unreachable
from mlproducer._core.delivery_states import (
    ANSWER_MOVES,
    ATTEMPT_MOVES,
    ON_THE_WIRE,
    ROW_IN_STORE,
    ROW_MOVES,
    UNANSWERED,
    AnswerEvent,
    AnswerState,
    AttemptEvent,
    AttemptState,
    RowEvent,
    RowState,
)
from mlproducer._core.states import IllegalMoveError
from mlproducer.errors import NackError, NotConnectedError
from tests.helpers import make_delivery
from tests.pure.tables import each_row
from tests.pure.test_states import reachable

TABLES: list[tuple[str, Any, Any, Any]] = [
    ("attempt", ATTEMPT_MOVES, AttemptState, AttemptEvent),
    ("row", ROW_MOVES, RowState, RowEvent),
    ("answer", ANSWER_MOVES, AnswerState, AnswerEvent),
]

COLUMNS = [
    (states.ACCEPTED, ATTEMPT_MOVES, AttemptEvent.ACCEPTED),
    (states.WRITTEN, ATTEMPT_MOVES, AttemptEvent.WRITTEN),
    (states.ACKED, ATTEMPT_MOVES, AttemptEvent.ACKED),
    (states.TAKEN, ANSWER_MOVES, AnswerEvent.TAKEN),
    (states.CONFIRMED, ANSWER_MOVES, AnswerEvent.CONFIRMED),
]


def leaving(moves: Any, event: enum.Enum) -> dict[Any, Any]:
    """Return where an event leads, by the state before."""
    return {state: row[event] for state, row in moves.items() if event in row}


@pytest.mark.parametrize(("name", "moves", "kinds", "events"), TABLES)
def test_tables_are_total(name: str, moves: Any, kinds: Any, events: Any) -> None:
    """Each state has its row and is reachable from the first, and each event moves something."""
    assert set(moves) == set(kinds)
    assert {event for row in moves.values() for event in row} == set(events)
    assert reachable(moves, next(iter(kinds))) == set(kinds)


@pytest.mark.parametrize(("name", "moves", "kinds", "events"), TABLES)
def test_what_is_not_in_a_table_is_illegal(name: str, moves: Any, kinds: Any, events: Any) -> None:
    """It raises and changes nothing; what is in it moves that state and no other."""

    def check(state: Any, event: Any) -> None:
        delivery = make_delivery()
        setattr(delivery, name, state)
        others = [getattr(delivery, other) for other, *_ in TABLES if other != name]
        step = getattr(delivery, f"step_{name}")
        if event in moves[state]:
            assert step(event) is moves[state][event]
            assert getattr(delivery, name) is moves[state][event]
        else:
            with pytest.raises(IllegalMoveError, match=f"{event.name} while {state.name}"):
                step(event)
            assert getattr(delivery, name) is state
        assert [getattr(delivery, other) for other, *_ in TABLES if other != name] == others

    each_row([(state, event) for state in kinds for event in events], check)


def test_at_most_once_on_a_channel() -> None:
    """Only what is queued is written, and only the broker or a lost channel ends an open tag."""
    assert leaving(ATTEMPT_MOVES, AttemptEvent.WRITTEN) == {
        AttemptState.QUEUED: AttemptState.IN_FLIGHT
    }
    closes = {AttemptEvent.ACKED, AttemptEvent.NACKED, AttemptEvent.LOST}
    for state in ON_THE_WIRE:
        for event, target in ATTEMPT_MOVES[state].items():
            assert (target in ON_THE_WIRE) == (event not in closes), (state, event)
    for state in set(AttemptState) - ON_THE_WIRE - {AttemptState.QUEUED}:
        assert not ON_THE_WIRE & set(ATTEMPT_MOVES[state].values()), state


def test_what_an_ack_means() -> None:
    """It confirms what was not returned, late or not; what was returned is in no queue."""
    assert leaving(ATTEMPT_MOVES, AttemptEvent.ACKED) == {
        AttemptState.IN_FLIGHT: AttemptState.CONFIRMED,
        AttemptState.LATE: AttemptState.CONFIRMED,
        AttemptState.RETURNED: AttemptState.UNROUTABLE,
    }
    for event in (AttemptEvent.NACKED, AttemptEvent.LOST):
        assert leaving(ATTEMPT_MOVES, event) == {
            AttemptState.IN_FLIGHT: AttemptState.FAILED,
            AttemptState.LATE: AttemptState.FAILED,
            AttemptState.RETURNED: AttemptState.UNROUTABLE,
        }


def test_what_is_over_is_not_sent() -> None:
    """Nothing leads from a confirm, or from retirement, back to a queue."""
    for state in (AttemptState.CONFIRMED, AttemptState.RETIRED):
        assert reachable(ATTEMPT_MOVES, state) == {state}


def test_what_was_asked_for_is_not_what_is_committed() -> None:
    """A row is held once the store says so, or where one is there already that is noted in."""
    held = {state for state, row in ROW_MOVES.items() if RowState.HELD in row.values()}
    assert held == {*leaving(ROW_MOVES, RowEvent.COMMITTED), RowState.AHEAD, RowState.HELD}
    assert leaving(ROW_MOVES, RowEvent.WRITE) == {
        RowState.NONE: RowState.WRITING,
        RowState.AHEAD: RowState.WRITING,
    }
    ending = {RowState.WITHDRAWING, RowState.DELETING, RowState.GONE}
    for state in ending:  # a write that was under way may still come, and nothing else
        kept = {event for event, target in ROW_MOVES[state].items() if target in ROW_IN_STORE}
        assert kept <= {RowEvent.COMMITTED}
    assert RowEvent.COMMITTED not in ROW_MOVES[RowState.WITHDRAWING]


def test_a_row_that_goes_back_is_told_of() -> None:
    """From wherever there is one, or may be; a row that was refused is not there."""
    assert leaving(ROW_MOVES, RowEvent.WITHDRAW) == dict.fromkeys(
        (RowState.AHEAD, RowState.WRITING, RowState.HELD), RowState.WITHDRAWING
    )
    assert leaving(ROW_MOVES, RowEvent.REFUSED) == dict.fromkeys(
        (RowState.NONE, RowState.WRITING), RowState.NONE
    )


def test_a_suspect_is_sent_again() -> None:
    """Whatever became of its attempt, and only then."""
    assert leaving(ATTEMPT_MOVES, AttemptEvent.ISOLATED) == dict.fromkeys(
        (AttemptState.FAILED, AttemptState.UNROUTABLE), AttemptState.QUEUED
    )


def test_an_answer_is_given_once() -> None:
    """Final states lead nowhere, and are reached from a message that was taken over."""
    assert {state for state, row in ANSWER_MOVES.items() if not row} == set(
        AnswerState
    ) - UNANSWERED
    assert set(ANSWER_MOVES[AnswerState.WITHDRAWABLE]) == {
        AnswerEvent.TAKEN,
        AnswerEvent.WITHDRAWN,
    }
    assert leaving(ANSWER_MOVES, AnswerEvent.WITHDRAWN) == {
        AnswerState.WITHDRAWABLE: AnswerState.WITHDRAWN
    }
    for event in (AnswerEvent.CONFIRMED, AnswerEvent.FAILED, AnswerEvent.RELEASED):
        assert leaving(ANSWER_MOVES, event) == dict.fromkeys(
            (AnswerState.WAITING, AnswerState.DEFERRED), AnswerState[event.name]
        )


def test_the_inlined_moves_are_the_tables() -> None:
    """What the way of a confirmed message looks up instead of calling a step."""
    for column, moves, event in COLUMNS:
        assert dict(column) == leaving(moves, event)
        illegal = next(state for state in moves if event not in moves[state])
        with pytest.raises(IllegalMoveError, match=f"{event.name} while {illegal.name}"):
            column[illegal]


FIELDS = frozenset(Delivery.__slots__) - {"__weakref__"}


def assignments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each attribute that is set on something other than ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Delete) else [node.target]
        else:
            continue
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) != "self":
                    yield each.lineno, ast.unparse(each)


def test_only_the_core_sets_fields_of_a_delivery() -> None:
    """The engine passes events in and carries actions out."""
    package = Path(mlproducer.__file__).parent
    names = {"delivery", "each", "message", "late", "lost"}
    found = [
        f"{path.relative_to(package)}:{line} sets {target}"
        for path in sorted(package.rglob("*.py"))
        if path.parts[len(package.parts)] != "_core"
        for line, target in assignments(ast.parse(path.read_text(encoding="utf-8")))
        if target.rpartition(".")[2] in FIELDS and target.rpartition(".")[0] in names
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("attempt", [AttemptState.QUEUED, AttemptState.SCHEDULED])
def test_another_connection_gets_it(attempt: AttemptState) -> None:
    """What was queued waits in a mailbox again; what is due stays so."""
    delivery = make_delivery()
    delivery.attempt = attempt
    delivery.hand_over(owner := object())  # type: ignore[arg-type]
    assert delivery.owner is owner
    delivery.give_to(first := object())  # type: ignore[arg-type]
    assert delivery.owner is first
    queued = attempt is AttemptState.QUEUED
    assert delivery.attempt is (AttemptState.MAILBOX if queued else attempt)


def test_what_a_row_knows_comes_back() -> None:
    """With a row its attempts, why they failed, and since when."""
    why = NackError("no")
    envelope = make_delivery().envelope
    one = Delivery.stored(
        envelope, started=9.0, attempts=3, doubtful=True, reason=why, first_failed=5.0, unrouted=1
    )
    assert (one.attempts, one.reason, one.first_failed, one.unrouted) == (3, why, 5.0, 1)
    assert (one.doubt, one.dead, one.started) == (Doubt.POSSIBLE, False, 9.0)


def test_an_error_names_the_broker_that_was_not_there() -> None:
    """Each message has an error of its own, with what is known of the failed attempt."""
    why = NotConnectedError("down", kind="refused", address="host:5672")
    why.reply_code, why.reply_text = 320, "closed"
    error = unreachable(make_delivery("a"), why)
    assert isinstance(error, NotConnectedError)
    assert (error.message_id, error.kind, error.address) == ("a", "refused", "host:5672")
    assert (error.reply_code, error.reply_text) == (320, "closed")
