"""Delays before the next attempt."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlproducer._core.backoff import Backoff

SECONDS = st.floats(min_value=0.001, max_value=3600)
SHARE = st.floats(min_value=0, max_value=1)


@settings(max_examples=40, deadline=None)
@given(SECONDS, SECONDS, SHARE, st.integers(0, 10_000), SHARE)
def test_bounds(
    initial: float, maximum: float, jitter: float, failures: int, chance: float
) -> None:
    """A delay lies between the capped power of two and that with all of the jitter on top."""
    delay = Backoff(initial, maximum, jitter).delay(failures, chance)
    exact = min(initial * 2 ** min(failures, 30), maximum)  # 0.001 * 2**30 is past every maximum
    assert exact <= delay <= exact * (1 + jitter)
    assert delay == exact * (1 + jitter * chance)


@settings(max_examples=40, deadline=None)
@given(SECONDS, SECONDS, st.integers(0, 10_000))
def test_never_shrinks(initial: float, maximum: float, failures: int) -> None:
    """Without jitter one more failure never makes the delay shorter."""
    backoff = Backoff(initial, maximum)
    assert backoff.delay(failures) <= backoff.delay(failures + 1)


def test_the_documented_series() -> None:
    """0.5 s, doubled up to 32 s, for connections; 1, 2, 4 ... 10 s for messages."""
    connection = Backoff(0.5, 32, 0.3)
    assert [connection.delay(n) for n in range(8)] == [0.5, 1, 2, 4, 8, 16, 32, 32]
    assert connection.delay(7, 1.0) == 32 * 1.3
    message = Backoff(1.0, 10.0)
    assert [message.delay(n) for n in range(5)] == [1, 2, 4, 8, 10]
