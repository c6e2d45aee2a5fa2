"""What counting costs: CPU microseconds per confirmed message, alone and in bursts.

Measured is the whole of what metrics add to a confirm: the sink's ``confirmed``, which counts the
message under its final status and puts its duration and size into histograms. The process's CPU
time is taken, the best of several rounds, so that a busy machine does not count.

Runs on: the main thread.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

from mlproducer.core.delivery import Delivery
from mlproducer.message import Envelope
from mlproducer.observe.meter import Meter
from mlproducer.observe.tally import Tally

LIMIT = 2.0
"""Microseconds per confirmed message that counting may take."""

MESSAGES = 100_000
ROUNDS = 5


def cost_per_confirm(burst: int, messages: int = MESSAGES, rounds: int = ROUNDS) -> float:
    """Give CPU microseconds per message where so many are confirmed by one frame."""
    sink = Meter(Tally()).sink()
    deliveries = [_delivery(n) for n in range(burst)]
    calls = range(messages // burst)
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for _call in calls:
            sink.confirmed(deliveries, 0.002)
        best = min(best, time.process_time() - started)
    return best / (len(calls) * burst) * 1e6


def _delivery(n: int) -> Delivery:
    envelope = Envelope(f"m{n}", "summarize_llm", "x", "k", b"", b"x" * 500)
    return Delivery(envelope, Future(), started=0.0, deadline=5.0)


def main() -> None:
    """Print one line for each size of burst."""
    for burst in (1, 10, 100, 1000):
        cost = cost_per_confirm(burst)
        print(f"burst={burst} us_per_confirm={cost:.3f} limit={LIMIT}")


if __name__ == "__main__":
    main()
