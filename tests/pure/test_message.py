"""Receipts, from deferred to their fate, and what a message shows of itself."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future, _base
from typing import Any

import pytest

from mlproducer import Message, Outcome, Receipt, message
from mlproducer.errors import NackError, RetriesExhaustedError
from mlproducer.message import Fate
from tests.helpers import make_envelope
from tests.pure.refusals import CANARY
from tests.stopwatch import in_time


def deferred(fate: Future[Receipt], error: NackError | None = None) -> Receipt:
    """A receipt for a message that was nacked."""
    return Receipt("m", 1, 0.5, False, error or NackError("nacked", message_id="m"), fate)


def test_confirmed_at_once() -> None:
    """There is nothing to wait for."""
    receipt = Receipt("m", 1, 0.25)
    assert receipt.outcome is Outcome.CONFIRMED
    assert receipt.confirmed
    assert receipt.durable
    assert receipt.reason is None
    assert receipt.result(0) is receipt


def test_deferred_then_confirmed() -> None:
    """It says DEFERRED until the fate is known, and then gives the receipt of the end."""
    fate: Future[Receipt] = Future()
    receipt = deferred(fate)
    assert receipt.outcome is Outcome.DEFERRED
    assert not receipt.confirmed
    assert isinstance(receipt.reason, NackError)
    last = Receipt("m", 2, 3.0)
    fate.set_result(last)
    assert receipt.outcome is Outcome.CONFIRMED
    assert receipt.confirmed
    assert receipt.result(0) is last
    assert (receipt.attempts, receipt.elapsed) == (1, 0.5)


def test_deferred_then_dead() -> None:
    """A dead letter stays DEFERRED, and its error is raised."""
    fate: Future[Receipt] = Future()
    receipt = deferred(fate)
    fate.set_exception(RetriesExhaustedError("dead", message_id="m", reason=receipt.reason))
    assert receipt.outcome is Outcome.DEFERRED
    with pytest.raises(RetriesExhaustedError) as caught:
        receipt.result(0)
    assert caught.value.reason is receipt.reason


def test_undecided() -> None:
    """Waiting ends with the builtin TimeoutError, on every Python, and names the message."""
    with pytest.raises(TimeoutError, match="m is still undecided"):
        deferred(Future()).result(0.01)


def test_a_fate_that_is_deferred_itself() -> None:
    """Where an answer came late, the receipt follows it to the end, within one timeout."""
    late: Future[Receipt] = Future()
    fate: Future[Receipt] = Future()
    receipt = deferred(late)
    late.set_result(deferred(fate))
    assert receipt.outcome is Outcome.DEFERRED
    with in_time(0.2, 0.05), pytest.raises(TimeoutError):
        receipt.result(0.05)
    fate.set_result(Receipt("m", 2, 1.0))
    assert receipt.confirmed
    assert receipt.result(0).attempts == 2


def test_a_cancelled_fate() -> None:
    """What was withdrawn was not confirmed."""
    fate: Future[Receipt] = Future()
    receipt = deferred(fate)
    fate.cancel()
    assert receipt.outcome is Outcome.DEFERRED


def test_reprs_hide_content() -> None:
    """A message, envelope or receipt in a log shows where it goes, and nothing of the user's."""
    body = CANARY.encode()
    message = Message(
        body=body, routing_key="k", headers={"h": CANARY}, correlation_id=CANARY, message_id="m"
    )
    receipt = deferred(Future(), NackError(CANARY))
    for each in (message, make_envelope("m", body=body), receipt):
        assert CANARY not in f"{each} {each!r}"
    assert "routing_key='k'" in repr(message)
    assert "DEFERRED" in repr(receipt)
    assert "NackError" in repr(receipt)
    assert "CONFIRMED, message_id='m', attempts=1, elapsed=0.250" in repr(Receipt("m", 1, 0.25))


def test_two_messages_are_never_the_same() -> None:
    """Envelopes and receipts are told apart by identity, since ids may be the user's own."""
    assert make_envelope("m") != make_envelope("m")
    assert Receipt("m", 1, 0.0) != Receipt("m", 1, 0.0)
    assert len({Receipt("m", 1, 0.0), Receipt("m", 1, 0.0)}) == 2


def test_a_receipt_travels() -> None:
    """Whatever its outcome, it can be pickled; the copy says what was known, and no more."""
    fates: list[Future[Receipt]] = [Future() for _ in range(4)]
    fates[1].set_result(Receipt("m", 2, 3.0))
    fates[2].set_exception(RetriesExhaustedError("dead", message_id="m"))
    fates[3].cancel()
    undecided, confirmed, dead, withdrawn = (
        pickle.loads(pickle.dumps(deferred(fate))) for fate in fates
    )
    for receipt in (undecided, withdrawn):
        assert receipt.outcome is Outcome.DEFERRED
        with pytest.raises(TimeoutError):
            receipt.result()
    assert confirmed.confirmed
    assert dead.outcome is Outcome.DEFERRED
    with pytest.raises(RetriesExhaustedError, match="dead"):
        dead.result()
    for receipt in (undecided, confirmed, dead, withdrawn):
        known = (receipt.message_id, receipt.attempts, receipt.elapsed, receipt.durable)
        assert known == ("m", 1, 0.5, False)
        assert type(receipt.reason) is NackError
    at_once = pickle.loads(pickle.dumps(Receipt("m", 1, 0.25)))
    assert at_once.result() is at_once


def test_a_copy_in_this_process_is_the_receipt_itself() -> None:
    """It follows the fate, and there is only one to follow."""
    receipt = deferred(Future())
    assert copy.copy(receipt) is receipt
    assert copy.deepcopy([receipt]) == [receipt]


@pytest.mark.parametrize("fields", [{"mandatory": False, "timestamp": 5}, {"headers": {"a": [1]}}])
def test_a_message_is_plain_data(fields: dict[str, Any]) -> None:
    """It is frozen, compares by value, can be pickled, and keeps a copy of what it was given."""
    headers: dict[str, Any] = {"a": [1]}
    message = Message(body=b"b", routing_key="k", **{"headers": headers, **fields})
    assert pickle.loads(pickle.dumps(message)) == message
    headers["a"].append(2)
    assert message.headers == {"a": [1]}
    assert message.payload() == b"b"


def renamed_fate() -> Fate:
    """A fate of a Python whose futures have another name for their lock."""
    names = {"Future": type("Future", (), {}), **vars(_base)}
    exec(inspect.getsource(Future).replace("_condition", "_later"), names)
    names = {**vars(message), "Future": names["Future"]}
    exec(inspect.getsource(Fate), names)
    return names["Fate"]()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "lock"), [(Fate, "_condition"), (renamed_fate, "_later")], ids=["as today", "renamed"]
)
def test_a_fate_is_resolved(make: Callable[[], Fate], lock: str) -> None:
    """Also where the base class has another name for what is used of it."""
    for end in (Receipt("m", 1, 0.1), NackError("nacked", message_id="m")):
        fate = make()
        assert hasattr(fate, lock)
        assert fate.set_running_or_notify_cancel()
        assert not fate.cancel()
        if isinstance(end, Receipt):
            fate.set_result(end)
            assert fate.result(0) is end
        else:
            fate.set_exception(end)
            assert fate.exception(0) is end
    fate = make()
    assert fate.cancel()
    assert not fate.set_running_or_notify_cancel()


def test_a_fate_is_resolved_whose_lock_was_left_held() -> None:
    """An interrupt may come between a thread's taking it and the statement that releases it."""
    fate = Fate()
    interrupted = threading.Thread(target=fate._condition.acquire)
    interrupted.start()
    interrupted.join()
    with in_time(5.0):
        fate.set_result(Receipt("m", 1, 0.1))
        assert fate.result(0).confirmed
