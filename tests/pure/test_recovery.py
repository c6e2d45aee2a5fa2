"""What a failure means, over every error there is."""

from __future__ import annotations

from itertools import product

import pytest

from mlproducer import errors
from mlproducer.core.recovery import Verdict, accuses, decide

DEFERRABLE = {
    errors.BrokerBlockedError,
    errors.CircuitOpenError,
    errors.ConfirmTimeoutError,
    errors.ConnectionLostError,
    errors.NackError,
    errors.NotConnectedError,
    errors.UnroutableError,
}
"""The rows of the contract's section 3 that say DEFERRED."""

HOPELESS = {
    errors.BrokerRejectedError,
    errors.InvalidMessageError,
    errors.MessageTooLargeError,
    errors.ProducerClosedError,
    errors.RetriesExhaustedError,
}
"""No later attempt can succeed, so that a message that is ours becomes a dead letter."""

LEAVES = [
    kind
    for name in errors.__all__
    if issubclass(kind := getattr(errors, name), errors.PublishError)
    and kind is not errors.PublishError
]


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize(
    ("retry", "owned", "exhausted", "durable"), [*product((True, False), repeat=4)]
)
def test_decide(
    kind: type[errors.PublishError], retry: bool, owned: bool, exhausted: bool, durable: bool
) -> None:
    """Kept is what may be kept and is worth it; what is ours never goes back, but to its grave."""
    verdict = decide(kind(), retry=retry, owned=owned, exhausted=exhausted, durable=durable)
    ours = owned or (kind in DEFERRABLE and (durable or kind is not errors.CircuitOpenError))
    if not (retry and ours):
        assert verdict is Verdict.GIVE_BACK
    elif exhausted or (owned and kind in HOPELESS):
        assert verdict is Verdict.BURY
    else:
        assert verdict is Verdict.KEEP


@pytest.mark.parametrize(
    ("code", "guilty"),
    [
        *((code, True) for code in (403, 404, 406, 501, 502, 503, 505, 540, 541)),
        *((code, False) for code in (0, 200, 311, 312, 313, 320, 402, 504, 506, 530)),
    ],
)
def test_accuses(code: int, guilty: bool) -> None:
    """Codes by which a broker answers one message; not those of an operator or of a lost wire."""
    assert accuses(code) is guilty
