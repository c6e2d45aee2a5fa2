"""What counting costs: CPU microseconds per confirmed message, alone and in bursts.

Measured is the whole of what metrics, rates and logs add to a confirm: the events of one engine,
with the sinks that it has. The process's CPU time is taken, the least of a round.

Runs on: the main thread.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

from benchmarks.lab import Lab
from benchmarks.report import Figure, Report, at_most
from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer.message import Envelope
from mlproducer.observe.counters import Tally
from mlproducer.observe.log import LogSink
from mlproducer.observe.producer_metrics import ProducerMetrics
from mlproducer.observe.recent_history import Recorder
from mlproducer.observe.sinks import Fanout

BURSTS = (1, 10, 1000)
MESSAGES = 50_000
LIMIT = 2.0


def run(lab: Lab) -> Report:
    """Count messages in bursts of several sizes."""
    sink = Fanout([LogSink(), ProducerMetrics(Tally()).sink(), Recorder().sink(list)])
    return Report(
        figures=[
            Figure(
                f"{burst} confirmed by one frame",
                [_cost(sink, burst) for _ in range(lab.scale.rounds)],
                "us/message",
                at_most(LIMIT),
            )
            for burst in BURSTS
        ]
    )


def _cost(sink: Fanout, burst: int) -> float:
    deliveries = [_delivery(number) for number in range(burst)]
    calls = MESSAGES // burst
    begun = time.process_time()
    for _ in range(calls):
        sink.emit(events.Confirmed(deliveries, 0.002))
    return (time.process_time() - begun) / (calls * burst) * 1e6


def _delivery(number: int) -> Delivery:
    envelope = Envelope(f"m{number}", "summarize_llm", "x", "k", b"", bytes(500))
    return Delivery(envelope, Future(), started=0.0, deadline=5.0)
