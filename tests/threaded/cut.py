"""A program whose calls are cut by an exception at each of their steps, one after another.

It is a KeyboardInterrupt, or what a signal handler raises that has published something itself.

A trace function counts the lines that run in the library on the main thread, or the bytecodes at
which CPython looks for signals (after calls, and at backward jumps), and raises in the n-th. So
each step is cut once, and the program looks at what is left.

Runs on: the main thread of a process of its own.
"""

from __future__ import annotations

import dis
import inspect
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlproducer
from mlproducer import Message, MLProducer, Settings
from mlproducer._engine import lifecycle
from mlproducer.errors import NackError, ProducerClosedError
from mlproducer.testing.fake_broker import FakeBroker
from tests.helpers import LIMIT, make_message, wait_until
from tests.threaded.brokers import Silent
from tests.threaded.conftest import QUICK

PACKAGE = str(Path(mlproducer.__file__).parent)
SIGNALS_COME_AFTER = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
"""Bytecodes in which CPython 3.10 to 3.13 runs the handlers of signals."""

TESTING = str(Path(PACKAGE, "testing"))


class Cut:
    """Raises in the n-th step of a call, if it has so many.

    :param event: what a step is, ``line`` or ``opcode``
    :param error: what it raises
    """

    def __init__(self, number: int, event: str, error: BaseException | None = None) -> None:
        self._left = number
        self._event = event
        self.error = error or KeyboardInterrupt()
        self._last: dict[FrameType, str] = {}
        self.made = False
        self.where = ""

    def run(self, call: Callable[[], Any]) -> Any:
        """Make the call; return what it returns, or what has cut it."""
        frame = inspect.currentframe()
        if frame is not None:
            frame.f_trace_opcodes = True  # once before, or Python 3.12 traces none
        sys.settrace(self._trace)
        try:
            return call()
        except (KeyboardInterrupt, NackError) as error:
            if error is not self.error:
                raise
            return error
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or file.startswith(TESTING):
            return None
        if frame.f_code.co_name.startswith("_forget"):
            return None  # a callback of the collector, where Python itself swallows the interrupt
        frame.f_trace_opcodes = self._event == "opcode"
        step = event == self._event and not self.made
        if step and event == "opcode":
            before = self._last.get(frame, "")
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            ends = frame.f_lineno is None  # a generator that is thrown away, which swallows it
            step = before.startswith(SIGNALS_COME_AFTER) and not ends
        if step:
            self._left -= 1
            if self._left < 0:
                self.made = True
                self.where = f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise self.error
        return self._trace


def ours() -> list[str]:
    """Return the names of the library's threads that run."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("mlproducer-") and "fake" not in name]


def cut_publishing(way: str, *, handler: bool) -> dict[str, Any]:
    """Cut a publish() or submit() at each step.

    :param handler: not by Ctrl-C, but by the error of another message
    """
    with FakeBroker() as broker:
        producer = MLProducer(Settings(url=broker.url, max_in_flight=2, **QUICK))
        assert producer.wait_connected(LIMIT)

        def publish_three(message: Message) -> Any:
            others = [make_message(f"{message.message_id}-{each}") for each in "ab"]
            return producer.publish_many([message, *others])

        calls = {"publish": producer.publish, "submit": producer.submit}
        call: Callable[[Message], Any] = calls.get(way, publish_three)
        runtime: Any = producer._life.runtime
        steps, leaks, futures, refused = 0, [], [], []
        while True:
            cut = Cut(steps, "opcode", NackError("of another message") if handler else None)
            message = make_message(f"m{steps}")
            answer = cut.run(lambda message=message: call(message))
            if answer is not cut.error:
                answers = answer if isinstance(answer, list) else [answer]
                futures += [each for each in answers if each is not cut.error]
                refused += [f"m{steps}" for each in answers[:1] if each is cut.error]
            if not wait_until(lambda: not len(runtime.gate)):
                leaks.append(cut.where)
                break
            if not cut.made:
                break
            steps += 1
        copies = Counter(message.properties.message_id for message in broker.messages)
        report = producer.close(1.0)
        return {
            "steps": steps,
            "leaks": leaks,
            "twice": [name for name, count in copies.items() if count > 1],
            "confirmed": all(answer.result(LIMIT).confirmed for answer in futures),
            "refused and sent": [name for name in refused if name in copies],
            "abandoned": report.abandoned,
            "threads": ours(),
        }


def cut_start() -> dict[str, Any]:
    """Cut the start at each step; whatever was left of it is closed by the next close()."""
    steps, left = 0, []
    with FakeBroker() as broker:
        while True:
            producer = MLProducer(Settings(url=broker.url, **QUICK))
            cut = Cut(steps, "opcode")
            cut.run(producer.start)
            if steps % 2:
                assert producer.publish(make_message()).confirmed
            producer.close(LIMIT)
            if not wait_until(lambda: not ours()):
                left.append(cut.where)
                break
            if not cut.made:
                break
            steps += 1
        broker.wait_for_connections(0, LIMIT)
    return {"steps": steps, "left": left}


def cut_close() -> dict[str, Any]:
    """Cut the close() at each step; the next one reports, and ends everything."""
    steps, wrong = 0, []
    lifecycle.CLOSE_MARGIN = LIMIT  # who is told, and not how soon, is what is looked at
    with FakeBroker(Silent()) as broker:
        while True:
            producer = MLProducer(Settings(url=broker.url, **QUICK))
            futures = [producer.submit(make_message(f"{steps}-{each}")) for each in range(3)]
            cut = Cut(steps, "opcode")
            cut.run(lambda producer=producer: producer.close(0.02))
            report = producer.close(0.02)
            told = all(each.done() for each in futures)
            told = told and all(
                isinstance(each.exception(0), ProducerClosedError) for each in futures
            )
            names = {future.message_id for future in futures}
            ended = wait_until(lambda: not ours() and not broker.connections)
            if set(report.abandoned) != names or not told or not ended:
                wrong.append((cut.where, report.abandoned, told, ours()))
                break
            if not cut.made:
                break
            steps += 1
    return {"steps": steps, "wrong": wrong}


if __name__ == "__main__":
    program = {"start": cut_start, "close": cut_close}.get(sys.argv[1])
    handler = sys.argv[2:] == ["handler"]
    print(json.dumps(program() if program else cut_publishing(sys.argv[1], handler=handler)))
