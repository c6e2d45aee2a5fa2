"""An audit finds what is lost, leaked, foreign, recovered or doubled."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

from mlproducer import Receipt
from mlproducer.errors import ConnectionLostError, NotConnectedError
from mlproducer.testing.audit import Audit, Journal


def audit(found: dict[str, int]) -> Audit:
    """Hold a journal of four calls against what was found."""
    journal = Journal()
    journal.note("confirmed", Receipt("confirmed", 1, 0.1))
    lost = ConnectionLostError("", message_id="deferred", attempts=1)
    fate: Future[Receipt] = Future()
    fate.set_result(Receipt("deferred", 2, 0.5))
    journal.note("deferred", Receipt("deferred", 1, 0.1, False, lost, fate))
    journal.note("unsent", NotConnectedError("", message_id="unsent"))
    journal.note("doubtful", ConnectionLostError("", message_id="doubtful", attempts=1))
    return journal.check(Counter(found))


def test_an_audit_that_balances() -> None:
    """What was taken over is there; of what was given back only what may be."""
    seen = audit({"confirmed": 1, "deferred": 1})
    assert (seen.lost, seen.leaked, seen.foreign, seen.recovered) == (frozenset(),) * 4
    assert (seen.excess, seen.duplicates, seen.most, seen.in_doubt) == (frozenset(), 0, 1, 2)


def test_an_audit_that_does_not_balance() -> None:
    """Each kind of difference has its place."""
    seen = audit({"deferred": 3, "unsent": 1, "doubtful": 2, "strange": 1})
    assert seen.lost == {"confirmed"}
    assert seen.leaked == {"unsent"}
    assert seen.recovered == {"doubtful"}
    assert seen.foreign == {"strange"}
    assert (seen.duplicates, seen.most) == (3, 3)
    assert seen.excess == {"deferred", "unsent", "doubtful"}


def test_a_second_copy_of_a_message_that_was_written_twice_is_explained() -> None:
    """It is the number of writes that counts, not that of the calls in doubt."""
    assert audit({"deferred": 2}).excess == frozenset()
    assert audit({"confirmed": 2}).excess == {"confirmed"}
