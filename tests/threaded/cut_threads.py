"""A program that cuts the library's own threads at each of their steps, one after another.

What is raised is a SystemExit, as ``PyThreadState_SetAsyncExc`` sets it from outside; a MemoryError
comes at the same places. For each step a message is submitted, nacked, stored and sent again
meanwhile, and has to find its end.

Runs on: the main thread of a process of its own; the cuts are made on the library's threads.
"""

from __future__ import annotations

import dis
import json
import logging
import sys
import tempfile
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from mlproducer import MLProducer, Settings
from mlproducer.errors import PublishError
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, make_message, wait_until
from tests.threaded.conftest import QUICK
from tests.threaded.cut import PACKAGE, SIGNALS_COME_AFTER

PARTS = tuple(str(Path(PACKAGE, name)) for name in ("_core", "_engine", "stores/memory"))
"""What is cut: the way of a message, and not how events are counted and logged."""


class ThreadCut:
    """Raises in the n-th step of a thread from when it is armed.

    :param role: the thread's name, without a number
    """

    def __init__(self, role: str) -> None:
        self._name = f"mlproducer-{role}"
        self._last: dict[FrameType, str] = {}
        self._left: int | None = None
        self.where = ""

    def arm(self, steps: int) -> None:
        """Cut after so many steps."""
        self.where, self._left = "", steps

    def disarm(self) -> bool:
        """Cut no more; true if it has cut."""
        self._left = None
        return bool(self.where)

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        """Follow the frames of the thread."""
        if threading.current_thread().name != self._name:
            return None
        if not frame.f_code.co_filename.startswith(PARTS):
            return self.trace  # it may call what is followed
        frame.f_trace_opcodes = True
        if event == "return":
            self._last.pop(frame, None)
        if event == "opcode":
            before = self._last.get(frame, "")
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(SIGNALS_COME_AFTER):
                self._step(frame)
        return self.trace

    def _step(self, frame: FrameType) -> None:
        if self._left is None:
            return
        self._left -= 1
        if self._left < 0:
            self._left = None
            file = Path(frame.f_code.co_filename).name
            self.where = f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
            raise SystemExit


class FirstCopyIsRefused(Behaviour):
    """Nacks the first copy of each message, and confirms the next."""

    def __init__(self) -> None:
        self._seen: set[str | None] = set()

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Basic.Nack, then Basic.Ack."""
        name = message.properties.message_id
        settle = connection.ack if name in self._seen else connection.nack
        self._seen.add(name)
        settle(channel, tag)


def main(role: str, store: str, stride: int) -> dict[str, Any]:
    """Cut a thread at each n-th step of a message that is nacked, stored and confirmed."""
    logging.disable(logging.CRITICAL)
    cut = ThreadCut(role)
    threading.settrace(cut.trace)
    step, lost = 0, []
    with tempfile.TemporaryDirectory() as directory, FakeBroker(FirstCopyIsRefused()) as broker:
        file = f"sqlite:///{directory}/rows.db"
        url = {"memory": "memory://", "sqlite": file, "ahead": file + "?write_ahead=1"}[store]
        settings: dict[str, Any] = {**QUICK, "publish_timeout": 1.0, "store_url": url}
        settings["store_lease"] = 2.0  # after which a row comes back that was claimed unheard
        producer = MLProducer(Settings(url=broker.url, max_in_flight=4, **settings))
        assert producer.submit(make_message()).result(LIMIT).confirmed
        runtime: Any = producer._life.runtime
        thread = runtime._retry_worker.thread if role == "retry" else runtime.only.io
        made = True
        while made:
            assert producer.wait_connected(LIMIT)
            traced = threading.Event()
            # What a trace function raises ends the tracing of its thread.
            thread.order(partial(sys.settrace, cut.trace))
            thread.order(traced.set)
            assert traced.wait(LIMIT)
            cut.arm(step)
            try:
                told = producer.submit(make_message(f"m{step}")).result(LIMIT).confirmed
            except (PublishError, FutureTimeoutError):
                told = False
            left = producer.flush(LIMIT)
            made = cut.disarm()
            if not told or left or not wait_until(lambda: not len(runtime.gate)):
                lost.append(f"step {step}, {cut.where}: {told=} {left=}")
                break
            step += stride
        producer.close(0.0)
    return {"steps": step // stride, "lost": lost}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
