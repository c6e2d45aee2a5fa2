"""The life of a message, as three tables of legal moves: its attempt, its row, its answer.

Together they say where a message is; what a delivery holds besides are facts. `Delivery` has one
step for each table. Whatever is not in a table is illegal: it raises and changes nothing.

Runs on: the I/O thread that the delivery belongs to, except where a move says otherwise.
"""

from __future__ import annotations

import enum

from mlproducer._core.states import Column, Moves, State


class AttemptState(State):
    """Where the attempt to send a message stands.

    Illegal, and why: anything but QUEUED to IN_FLIGHT (a message is on the wire at most once per
    live channel: what is in flight leaves it by the broker's word, or with its channel); IN_FLIGHT,
    LATE or RETURNED to SCHEDULED or RETIRED (while the tag is open the confirm may come, and it
    decides); FAILED to IN_FLIGHT (a retry is judged and queued first); CONFIRMED to anything (the
    broker has it); RETIRED to QUEUED (its publisher has been told, or is about to be, that it is
    not sent).
    """

    MAILBOX = enum.auto()  # handed over, by its publisher or another sender, not yet seen by this
    QUEUED = enum.auto()  # with the sender, for a connection that can carry it
    IN_FLIGHT = enum.auto()  # written, its tag open
    LATE = enum.auto()  # the same, and its publisher does not wait for the confirm any longer
    RETURNED = enum.auto()  # its tag still open: the broker has no queue for it, its ack follows
    FAILED = enum.auto()  # nacked or lost, and about to be judged; a queue may have it
    UNROUTABLE = enum.auto()  # returned, and about to be judged; no queue has it
    SCHEDULED = enum.auto()  # with the retry worker, until it is due
    CONFIRMED = enum.auto()  # the broker has it
    RETIRED = enum.auto()  # it is not sent any more


class AttemptEvent(State):
    """What moves an attempt."""

    ACCEPTED = enum.auto()  # by a sender
    HANDED_OVER = enum.auto()  # to another connection
    WRITTEN = enum.auto()
    TIMED_OUT = enum.auto()  # its publisher's time is up
    RETURNED = enum.auto()
    ACKED = enum.auto()
    NACKED = enum.auto()
    LOST = enum.auto()  # its channel is gone
    ISOLATED = enum.auto()  # it may have cost the channel, and is to be sent alone
    SCHEDULED = enum.auto()
    RETIRED = enum.auto()


_A, _AE = AttemptState, AttemptEvent

ATTEMPT_MOVES: Moves[AttemptState, AttemptEvent] = {
    _A.MAILBOX: {
        _AE.ACCEPTED: _A.QUEUED,
        _AE.SCHEDULED: _A.SCHEDULED,
        _AE.RETIRED: _A.RETIRED,
    },
    _A.QUEUED: {
        _AE.HANDED_OVER: _A.MAILBOX,
        _AE.WRITTEN: _A.IN_FLIGHT,
        _AE.SCHEDULED: _A.SCHEDULED,
        _AE.RETIRED: _A.RETIRED,
    },
    _A.IN_FLIGHT: {
        _AE.TIMED_OUT: _A.LATE,
        _AE.RETURNED: _A.RETURNED,
        _AE.ACKED: _A.CONFIRMED,
        _AE.NACKED: _A.FAILED,
        _AE.LOST: _A.FAILED,
    },
    _A.LATE: {
        _AE.RETURNED: _A.RETURNED,
        _AE.ACKED: _A.CONFIRMED,
        _AE.NACKED: _A.FAILED,
        _AE.LOST: _A.FAILED,
    },
    _A.RETURNED: {
        _AE.TIMED_OUT: _A.RETURNED,
        _AE.RETURNED: _A.RETURNED,
        _AE.ACKED: _A.UNROUTABLE,
        _AE.NACKED: _A.UNROUTABLE,
        _AE.LOST: _A.UNROUTABLE,
    },
    _A.FAILED: {
        _AE.ISOLATED: _A.QUEUED,
        _AE.SCHEDULED: _A.SCHEDULED,
        _AE.RETIRED: _A.RETIRED,
    },
    _A.UNROUTABLE: {
        _AE.ISOLATED: _A.QUEUED,
        _AE.SCHEDULED: _A.SCHEDULED,
        _AE.RETIRED: _A.RETIRED,
    },
    _A.SCHEDULED: {
        _AE.ACCEPTED: _A.QUEUED,
        _AE.SCHEDULED: _A.SCHEDULED,
        _AE.RETIRED: _A.RETIRED,
    },
    _A.CONFIRMED: {_AE.RETIRED: _A.CONFIRMED},
    _A.RETIRED: {_AE.RETIRED: _A.RETIRED},
}

ON_THE_WIRE = frozenset({_A.IN_FLIGHT, _A.LATE, _A.RETURNED})
"""States in which a tag is open: what becomes of the attempt is the broker's to say."""


WAS_SENT = ON_THE_WIRE | {_A.FAILED, _A.CONFIRMED}
"""States in which the last attempt may have brought it to a queue."""


class RowState(State):
    """Where the message's row of the store stands: what was asked for, and what is committed.

    Illegal, and why: WRITING or HELD to AHEAD (written ahead is what was stored before its first
    attempt, and never what has failed); AHEAD or HELD to NONE (a row that is there is deleted, not
    forgotten); WITHDRAWING, DELETING or GONE to WRITING (its message has found its end, and is not
    stored again).
    """

    NONE = enum.auto()  # there is none, and none was asked for
    AHEAD = enum.auto()  # committed before the first attempt; the message may still go back
    WRITING = (
        enum.auto()
    )  # asked for, or asked about since its lease is over: not known to be there
    HELD = enum.auto()  # committed: the message goes on without its publisher
    WITHDRAWING = enum.auto()  # asked to be deleted; then its publisher gets the message back
    DELETING = enum.auto()  # asked to be deleted, and nothing waits for that
    GONE = enum.auto()  # deleted, lost, or ended by another process


class RowEvent(State):
    """What moves a row: orders to the store, and its answers."""

    STORED_AHEAD = enum.auto()
    WRITE = enum.auto()  # ordered
    NOTE = enum.auto()  # ordered: the last attempt's outcome, into a row that is there
    COMMITTED = enum.auto()
    REFUSED = enum.auto()  # it could not be written, or not in time
    WITHDRAW = enum.auto()  # ordered: delete it, and say so
    DELETE = enum.auto()  # ordered
    GONE = enum.auto()


_R, _RE = RowState, RowEvent

ROW_MOVES: Moves[RowState, RowEvent] = {
    _R.NONE: {
        _RE.STORED_AHEAD: _R.AHEAD,
        _RE.WRITE: _R.WRITING,
        _RE.COMMITTED: _R.HELD,  # after it was taken for refused
        _RE.REFUSED: _R.NONE,
        _RE.DELETE: _R.DELETING,  # behind a write that was taken for refused
    },
    _R.AHEAD: {
        _RE.WRITE: _R.WRITING,
        _RE.NOTE: _R.HELD,
        _RE.WITHDRAW: _R.WITHDRAWING,
        _RE.DELETE: _R.DELETING,
        _RE.GONE: _R.GONE,
    },
    _R.WRITING: {
        _RE.NOTE: _R.WRITING,
        _RE.COMMITTED: _R.HELD,
        _RE.REFUSED: _R.NONE,
        _RE.WITHDRAW: _R.WITHDRAWING,
        _RE.DELETE: _R.DELETING,
        _RE.GONE: _R.GONE,
    },
    _R.HELD: {
        _RE.NOTE: _R.HELD,
        _RE.WITHDRAW: _R.WITHDRAWING,
        _RE.DELETE: _R.DELETING,
        _RE.GONE: _R.GONE,
    },
    _R.WITHDRAWING: {
        _RE.DELETE: _R.DELETING,
        _RE.GONE: _R.GONE,
    },
    _R.DELETING: {
        _RE.COMMITTED: _R.HELD,  # a write that came after all; it is deleted again
        _RE.DELETE: _R.DELETING,
        _RE.GONE: _R.GONE,
    },
    _R.GONE: {_RE.COMMITTED: _R.HELD, _RE.GONE: _R.GONE},
}

ROW_PENDING = frozenset({_R.WRITING, _R.WITHDRAWING})
"""States in which its publisher's answer waits for the store's."""

ROW_IN_STORE = frozenset({_R.WRITING, _R.HELD})
"""States in which the message goes on as a row of the store."""

ROW_KNOWN = frozenset({_R.AHEAD, _R.WRITING, _R.HELD})
"""States in which there is a row to note something in, or will be."""


class AnswerState(State):
    """What the publisher has been told. CONFIRMED, FAILED, RELEASED and WITHDRAWN are final.

    Illegal, and why: WITHDRAWABLE to CONFIRMED, DEFERRED or FAILED (the message is taken over
    first: else its publisher might take it back at that very moment, and have two answers); WAITING
    to WITHDRAWN (the message may be on the wire); a final state to any (an answer never changes).
    """

    WITHDRAWABLE = enum.auto()  # its publisher may take it back
    WAITING = enum.auto()  # taken over; its publisher waits
    DEFERRED = enum.auto()  # it is ours, and its publisher knows; its fate is still to be told
    CONFIRMED = enum.auto()
    FAILED = enum.auto()
    RELEASED = enum.auto()  # a durable store has it, and its fate is not told here
    WITHDRAWN = enum.auto()  # its publisher has taken it back


class AnswerEvent(State):
    """What moves an answer.

    TAKEN and WITHDRAWN come from the thread that has won the delivery's one-shot token, whichever
    that is; so WITHDRAWABLE is left once.
    """

    TAKEN = enum.auto()
    WITHDRAWN = enum.auto()
    DEFERRED = enum.auto()
    CONFIRMED = enum.auto()
    FAILED = enum.auto()
    RELEASED = enum.auto()


_N, _NE = AnswerState, AnswerEvent

ANSWER_MOVES: Moves[AnswerState, AnswerEvent] = {
    _N.WITHDRAWABLE: {_NE.TAKEN: _N.WAITING, _NE.WITHDRAWN: _N.WITHDRAWN},
    _N.WAITING: {
        _NE.DEFERRED: _N.DEFERRED,
        _NE.CONFIRMED: _N.CONFIRMED,
        _NE.FAILED: _N.FAILED,
        _NE.RELEASED: _N.RELEASED,
    },
    _N.DEFERRED: {
        _NE.CONFIRMED: _N.CONFIRMED,
        _NE.FAILED: _N.FAILED,
        _NE.RELEASED: _N.RELEASED,
    },
    _N.CONFIRMED: {},
    _N.FAILED: {},
    _N.RELEASED: {},
    _N.WITHDRAWN: {},
}

UNANSWERED = frozenset({_N.WITHDRAWABLE, _N.WAITING, _N.DEFERRED})
"""States in which something is still to be told."""

# The moves of a message that is simply confirmed, each a column of its table: one lookup in a dict
# where `Delivery.step_attempt` and `Delivery.step_answer` would be a call.
ACCEPTED = Column(ATTEMPT_MOVES, _AE.ACCEPTED)
WRITTEN = Column(ATTEMPT_MOVES, _AE.WRITTEN)
ACKED = Column(ATTEMPT_MOVES, _AE.ACKED)
TAKEN = Column(ANSWER_MOVES, _NE.TAKEN)
CONFIRMED = Column(ANSWER_MOVES, _NE.CONFIRMED)
