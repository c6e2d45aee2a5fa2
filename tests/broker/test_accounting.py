"""The account itself: what is lost, leaked, foreign, recovered or doubled is seen."""

from __future__ import annotations

from collections import Counter

from mlproducer import Receipt
from mlproducer.errors import ConnectionLostError, NotConnectedError
from tests.accounting import Account, Journal


def account(found: dict[str, int]) -> Account:
    """Hold a journal of four calls against what was found."""
    journal = Journal()
    journal.note("confirmed", Receipt("confirmed", 1, 0.1))
    lost = ConnectionLostError("", message_id="deferred")
    journal.note("deferred", Receipt("deferred", 1, 0.1, False, lost))
    journal.note("unsent", NotConnectedError("", message_id="unsent"))
    journal.note("doubtful", ConnectionLostError("", message_id="doubtful"))
    return journal.check(Counter(found))


def test_an_account_that_balances() -> None:
    """What was taken over is there; of what was given back only what may be."""
    seen = account({"confirmed": 1, "deferred": 1})
    assert (seen.lost, seen.leaked, seen.foreign, seen.recovered) == (frozenset(),) * 4
    assert (seen.duplicates, seen.in_doubt) == (0, 2)


def test_an_account_that_does_not_balance() -> None:
    """Each kind of difference has its place."""
    seen = account({"deferred": 3, "unsent": 1, "doubtful": 2, "strange": 1})
    assert seen.lost == {"confirmed"}
    assert seen.leaked == {"unsent"}
    assert seen.recovered == {"doubtful"}
    assert seen.foreign == {"strange"}
    assert seen.duplicates == 3
