"""Where the time of a message goes, stage by stage.

The real classes, in bursts of 32, without threads, sockets and pika; what the whole costs with them
is the processor time of `pipelined`. The rows "of which" are parts of the encoding; a uuid4, which
the library draws in its own way, stands beside it for comparison.

Runs on: the main thread.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import closing

from benchmarks.contestants.work import TEXT
from benchmarks.lab import Lab
from benchmarks.report import Figure, Report
from benchmarks.way import BURST, Way
from mlproducer import SummarizationTask
from mlproducer._wire import strict_json
from mlproducer.tasks import PreferredBackends

UNIT = "us/message"
REPEATS = 9


def run(lab: Lab) -> Report:
    """Time each stage over many bursts, several times."""
    bursts = 50 if lab.scale.quick else 200
    with closing(Way()) as way:
        runs = [_time_stages(way, bursts) for _ in range(REPEATS)]
    figures = [Figure(stage, [each[stage] for each in runs], UNIT) for stage in runs[0]]
    total = Figure("all stages", [sum(each.values()) for each in runs], UNIT)
    return Report(figures=[*figures, total, *_parts(bursts * BURST)])


def _time_stages(way: Way, bursts: int) -> dict[str, float]:
    spent: dict[str, float] = {}
    for _ in range(bursts):
        for stage, step in way.steps():
            started = time.perf_counter()
            step()
            spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
    return {stage: seconds / (bursts * BURST) * 1e6 for stage, seconds in spent.items()}


def _parts(count: int) -> list[Figure]:
    task = SummarizationTask("share-1", {"text": TEXT})
    preferred = PreferredBackends()
    _, kwargs = task.call(preferred)
    parts: dict[str, Callable[[], object]] = {
        "of which: arguments": lambda: task.call(preferred),
        "of which: the text as JSON": lambda: strict_json.quoted("text", TEXT),
        "beside it: json's own encoder": lambda: strict_json.dumps("kwargs", kwargs),
        "beside it: str(uuid4())": lambda: str(uuid.uuid4()),
    }
    return [Figure(name, _time(part, count), UNIT) for name, part in parts.items()]


def _time(part: Callable[[], object], count: int) -> list[float]:
    values = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(count):
            part()
        values.append((time.perf_counter() - started) / count * 1e6)
    return values
