"""What a failure means, over every error there is."""

from __future__ import annotations

from itertools import product

from mlproducer import errors
from mlproducer._core.failures import Decision, accuses, decide
from tests.pure.tables import each_row

DEFERRABLE = {
    errors.AuthenticationError,
    errors.BrokerBlockedError,
    errors.CircuitOpenError,
    errors.ConfirmTimeoutError,
    errors.ConnectionLostError,
    errors.NackError,
    errors.NotConnectedError,
    errors.UnroutableError,
}
"""The outcomes that are documented as DEFERRED."""

DURABLY = {errors.AuthenticationError, errors.CircuitOpenError}
"""Those that only a durable store waits for."""

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


def test_decide() -> None:
    """Kept is what may be kept and is worth it; what is ours never goes back, but to its grave."""
    each_row(product(LEAVES, *[(True, False)] * 4), decides)


def decides(
    kind: type[errors.PublishError], retry: bool, owned: bool, exhausted: bool, durable: bool
) -> None:
    """Compare the verdict on one error, in one situation, with the documented one."""
    verdict = decide(kind(), retry=retry, owned=owned, exhausted=exhausted, durable=durable)
    ours = owned or (kind in DEFERRABLE and (durable or kind not in DURABLY))
    if not (retry and ours):
        assert verdict is Decision.FAIL
    elif exhausted or (owned and kind in HOPELESS):
        assert verdict is Decision.DEAD_LETTER
    else:
        assert verdict is Decision.DEFER


def test_accuses() -> None:
    """Codes by which a broker answers one message; not those of an operator or of a lost wire."""
    guilty = (403, 404, 406, 501, 502, 503, 505, 540, 541)
    innocent = (0, 200, 311, 312, 313, 320, 402, 504, 506, 530)
    assert [code for code in guilty if accuses(code) is not True] == []
    assert [code for code in innocent if accuses(code) is not False] == []
