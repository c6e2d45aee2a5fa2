"""The tree of errors: what each says of its message, and that it survives a journey."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from itertools import product

import pytest

import mlproducer
from mlproducer import Message, Settings, SummarizationTask, errors
from tests.pure.refusals import CANARY, tells_nothing
from tests.pure.tables import each_row

LEAVES = [
    kind
    for name in errors.__all__
    if issubclass(kind := getattr(errors, name), errors.PublishError)
]
POSSIBLY_SENT = {"NackError", "ConfirmTimeoutError", "ConnectionLostError"}
COUNTED = POSSIBLY_SENT | {"NotConnectedError"}
BUILTIN = {
    "ConfigurationError": ValueError,
    "InvalidTaskError": ValueError,
    "InvalidMessageError": ValueError,
    "MessageTooLargeError": ValueError,
    "ConfirmTimeoutError": TimeoutError,
}


def test_all_is_the_tree() -> None:
    """What is exported is every public error that there is, sorted, and drawn in the docstring."""
    tree = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception) and not name.startswith("_")
    }
    assert sorted(tree) == errors.__all__
    assert all(name in (errors.__doc__ or "") for name in tree)
    assert all(getattr(errors, name).__module__ == "mlproducer.errors" for name in tree)
    assert mlproducer.errors is errors


def test_place_in_the_tree() -> None:
    """Everything is an MLProducerError, and a builtin error where that is documented."""
    each_row(errors.__all__, has_its_place)


def has_its_place(name: str) -> None:
    """Look at the bases of one error."""
    kind = getattr(errors, name)
    assert issubclass(kind, errors.MLProducerError)
    for builtin in (ValueError, TimeoutError):
        assert issubclass(kind, builtin) == (BUILTIN.get(name) is builtin)
    assert kind.__doc__


@pytest.mark.parametrize("kind", LEAVES)
def test_facts(kind: type[errors.PublishError]) -> None:
    """Whether the broker may have it and whether the breaker counts it, by the documented table."""
    assert kind.possibly_sent is (kind.__name__ in POSSIBLY_SENT)
    assert kind.counts_for_breaker is (kind.__name__ in COUNTED)
    assert not (kind.deferrable and kind.permanent)


@pytest.mark.parametrize("kind", LEAVES)
def test_attributes(kind: type[errors.PublishError]) -> None:
    """Every error names its message; an instance may know better than its class."""
    assert (kind().message_id, kind().attempts) == (None, 0)
    for certain in (True, False):
        error = kind("text", message_id="m", attempts=2, possibly_sent=certain)
        assert (str(error), error.message_id, error.attempts) == ("text", "m", 2)
        assert error.possibly_sent is certain
    assert kind.possibly_sent is (kind.__name__ in POSSIBLY_SENT)


@pytest.mark.parametrize("journey", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_picklable(journey: object) -> None:
    """An error crosses processes with all that it knows."""
    each_row(product(LEAVES, [journey]), arrives_whole)


def arrives_whole(kind: type[errors.PublishError], journey: object) -> None:
    """Send one error on a journey."""
    error = kind("text", message_id="m", attempts=2, possibly_sent=True)
    facts = {"reply_code": 404, "reply_text": "gone", "retry_after": 1.5, "address": "h:1"}
    for name, value in {**facts, "kind": "lost"}.items():
        if hasattr(error, name):
            setattr(error, name, value)
    if isinstance(error, errors.RetriesExhaustedError):
        error.reason = errors.NackError("nacked", message_id="m")
    arrived = journey(error)  # type: ignore[operator]
    assert type(arrived) is kind
    assert str(arrived) == "text"
    assert vars(arrived).keys() == vars(error).keys()
    for name, value in vars(error).items():
        if name == "reason" and value is not None:
            assert str(arrived.reason) == str(value)
        else:
            assert getattr(arrived, name) == value


def test_what_some_know_besides() -> None:
    """The broker's words, the breaker's patience, and the last failure."""
    rejected = errors.BrokerRejectedError("t", reply_code=403, reply_text="ACCESS_REFUSED")
    assert (rejected.reply_code, rejected.reply_text) == (403, "ACCESS_REFUSED")
    assert errors.UnroutableError("t", reply_code=312).reply_code == 312
    assert errors.CircuitOpenError("t", retry_after=2.5).retry_after == 2.5
    reason = errors.NackError("t")
    assert errors.RetriesExhaustedError("t", reason=reason).reason is reason


def test_what_is_known_of_a_connection() -> None:
    """Its broker, and what that said, in fields; no text has to be searched."""
    facts = {"kind": "refused", "address": "h:5672", "reply_code": 530, "reply_text": "not found"}
    for kind in (errors.NotConnectedError, errors.AuthenticationError, errors.ConnectionLostError):
        error = kind("t", **facts)  # type: ignore[arg-type]
        assert {name: getattr(error, name) for name in facts} == facts


def test_frameless() -> None:
    """An error of ours leaves without the frames in which it arose, and with nothing chained."""

    @errors.frameless
    def call(secret: str) -> None:
        try:
            int(secret)
        except ValueError:
            raise errors.ConfigurationError("no number") from None

    with pytest.raises(errors.ConfigurationError, match="no number") as caught:
        call(CANARY)
    tells_nothing(caught.value)
    assert caught.value.__context__ is caught.value.__cause__ is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: Settings(url=f"amqp://user:{CANARY}@host/", no_such_field=1),  # type: ignore[call-arg]
        lambda: Settings(url=f"amqp://user:{CANARY}@host/", tls=CANARY),  # type: ignore[arg-type]
        lambda: SummarizationTask("s", {"text": CANARY}, no_such_field=1),  # type: ignore[call-arg]
        lambda: Message(body=CANARY.encode(), key="k"),  # type: ignore[call-arg]
    ],
    ids=["setting", "tls", "task", "message"],
)
def test_arguments_of_a_wrong_call_are_in_no_frame(call: Callable[[], object]) -> None:
    """A slip of the pen is an error of Python's own, which would show the arguments beside it."""
    with pytest.raises((TypeError, errors.ConfigurationError)) as caught:
        call()
    tells_nothing(caught.value)
