"""Counts the Python calls that one message costs, over all threads; see `test_calls`.

Prints a line for each function, and last the figures as JSON. It is a process of its own, since
what other tests import, OpenTelemetry say, makes messages go further.

Runs on: the main thread.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

import pika

import mlproducer
from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage

sys.modules["orjson"] = None  # type: ignore[assignment] # with this extra it is two calls more
PACKAGE = Path(mlproducer.__file__).parent
PIKA = Path(pika.__file__).parent
MESSAGES = 40
"""So many are counted, and what each of them costs is told: what timers do meanwhile is little."""

SETTINGS = {
    "declare_topology": "off",
    "retry_sweep_interval": 60.0,
    "health_check_interval": 60.0,
    "message_retry_base_delay": 60.0,
    "message_retry_max_delay": 60.0,
    "circuit_breaker_threshold": 1_000_000,
}


class Nacking(Behaviour):
    """Refuses everything."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Basic.Nack."""
        connection.nack(channel, tag)


class Calls:
    """Counts the calls of the package's functions, by thread, file and name."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.counting = False
        self.of_pika = 0

    def note(self, frame: FrameType, event: str, _argument: object) -> None:
        """Take one event of the interpreter."""
        if self.counting and event == "call":
            code = frame.f_code
            path = code.co_filename
            if path.startswith(str(PIKA)):
                self.of_pika += threading.current_thread().name == "mlproducer-io"
            elif path.startswith(str(PACKAGE)) and "/testing/" not in path:
                name = getattr(code, "co_qualname", code.co_name)
                file = Path(path).relative_to(PACKAGE).as_posix()
                self.counts[threading.current_thread().name, file, name] += 1

    def of_one(self) -> dict[tuple[str, str, str], int]:
        """Return what a message costs: what timers do, or a further turn of the loop, is rare."""
        each = {call: round(n / MESSAGES) for call, n in self.counts.items()}
        return {call: n for call, n in each.items() if n}


def main(behaviour: Behaviour) -> None:
    """Publish one message after the other, and print what each has cost."""
    calls = Calls()
    threading.setprofile(calls.note)
    sys.setprofile(calls.note)
    tasks = [SummarizationTask(f"s{n}", {"text": "some text"}) for n in range(2 * MESSAGES)]
    with (
        FakeBroker(behaviour) as broker,
        MLProducer(Settings(url=broker.url, **SETTINGS)) as producer,  # type: ignore[arg-type]
    ):
        assert producer.wait_connected(30.0)
        for number, task in enumerate(tasks):
            calls.counting = number >= MESSAGES
            producer.publish(task)
        calls.counting = False
        producer.close(0.0)
    sys.setprofile(None)
    found = calls.of_one()
    for (thread, file, name), count in sorted(found.items()):
        print(f"{count:3}  {thread:24} {file}  {name}")
    figures = {
        "calls": sum(found.values()),
        "calls of pika": round(calls.of_pika / MESSAGES),
        "files": sorted({file for _, file, _ in found}),
        "threads": sorted({thread for thread, _, _ in found}),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Nacking() if sys.argv[1] == "nacked" else Behaviour())
