"""When a broker counts as silent: not where its answer cannot be here yet."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from mlproducer._engine import health
from mlproducer._engine.health import ANSWER_LIMIT, HealthProbe
from mlproducer._engine.pika_adapters import Traffic
from mlproducer.topology import Topology


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return it."""
        return self.now


@pytest.mark.parametrize(
    ("traffic", "silent_after"),
    [
        pytest.param([(7, 900, 0)] * 12, 5, id="nothing waits, nothing comes"),
        pytest.param([(n, 900, 0) for n in range(12)], None, id="something comes"),
        pytest.param([(7, 900 + n, 50) for n in range(12)], None, id="behind a long queue"),
        pytest.param([(7, 900 + n, 3) for n in range(12)], 8, id="arrived after three seconds"),
        pytest.param([(7, 900 + n, 0) for n in range(12)], 5, id="only later messages are taken"),
        pytest.param([(7, 900, 50)] * 12, 5, id="the queue does not move"),
    ],
)
def test_silence(
    monkeypatch: pytest.MonkeyPatch,
    traffic: list[tuple[int, int, int]],
    silent_after: int | None,
) -> None:
    """What a second has brought: bytes received, bytes taken, and bytes that wait."""
    clock, told = Clock(), iter(traffic)
    monkeypatch.setattr(health, "time", clock)
    probe, reply = HealthProbe(Topology(), lambda _: None), Future[None]()
    probe.begin(lambda *_: None, lambda: Traffic(*next(told)), reply)
    silent = []
    for second in range(1, len(traffic)):
        clock.now += ANSWER_LIMIT / 5
        if probe.is_silent(reply):
            silent.append(second)
    assert silent[:1] == ([] if silent_after is None else [silent_after])
