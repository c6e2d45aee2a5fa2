"""``mlproducer demo``: real texts, a real broker that is frozen and killed, a real Celery worker.

Publishes from several threads, at a pace that leaves time for the faults, and at the end compares
what `publish()` answered with what the worker ran. If RABBITMQ_URL is set, that broker is used, and
neither frozen nor killed. The tasks then go to a queue of the demo's own: the library's queues may
hold other tasks, which the demo's worker would run, and other workers would run the demo's.

Runs on: the main thread, which watches and injects the faults; publishers ``demo-publisher``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from attrs import asdict, evolve

from mlproducer import CeleryTask, EmbeddingTask, MLProducer, Receipt, Settings, SummarizationTask
from mlproducer.cli import connectivity
from mlproducer.cli.demo_result import Progress
from mlproducer.cli.output import Console
from mlproducer.cli.sample_texts import Text, texts
from mlproducer.testing import CeleryNotInstalled, CeleryWorker, RabbitMQError, RabbitMQNode
from mlproducer.testing.audit import Journal

HELP = "see that nothing is lost while a broker is frozen and killed"
DESCRIPTION = (
    "Publish texts that are on this machine to a private RabbitMQ node, freeze and kill the node "
    "meanwhile, and let a Celery worker run the tasks. Takes about 30 s. "
    "If RABBITMQ_URL is set, that broker is used, without any fault: the tasks go by an "
    "exchange to a queue, both named mlproducer.demo, so that other tasks are not touched. "
    "Both stay on the broker, and so do the celery_delayed_* queues that a Celery worker declares "
    "beside a quorum queue. Two demos on one broker at a time take each other's tasks."
)
LOG_LEVEL = logging.ERROR  # what the library warns of is done here on purpose, and printed

MESSAGES, MAX_MESSAGES = 400, 100_000
PUBLISHERS = 8
QUEUES = ("ml.summarize", "ml.embed")

OWN = "mlproducer.demo"
"""The exchange, and the queue, on a broker that is not the demo's own."""

PUBLISHING = 16.0
"""Seconds over which the publishing is spread, so that the faults fall into it."""

FROZEN = 2.0
"""Seconds for which the broker is frozen."""

PATIENCE = 60.0
"""Seconds without any progress after which missing messages count as lost."""

CONNECTING = 30.0
"""Seconds in which a broker must accept the connection."""

PAUSE = 0.5
"""Seconds before a message that was given back is published again."""

GIVEN_BACK = (
    "  given back: publish() raised, so the task was the caller's again. Here that is the demo,\n"
    f"  which published it once more after {PAUSE:g} s."
)

TICK = 0.05
STOPPING = 3.0
"""Seconds in which the worker must stop."""

Task = SummarizationTask | EmbeddingTask | CeleryTask


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the number of messages."""
    parser.add_argument(
        "--messages",
        type=_messages,
        default=MESSAGES,
        metavar="N",
        help=f"how many tasks to publish ({MESSAGES}, at most {MAX_MESSAGES})",
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Run the demo, and return whether nothing was lost.

    :raises RabbitMQNotInstalled: no RABBITMQ_URL is set and there is no RabbitMQ to start
    :raises CeleryNotInstalled: there is no Celery
    """
    if importlib.util.find_spec("celery") is None:
        raise CeleryNotInstalled("Celery is not installed: pip install 'mlproducer[celery]'")
    demo = Demo(console, arguments.messages, texts())
    try:
        demo.run()
    finally:
        console.end_progress()
    return demo.report()


class Demo:
    """One run."""

    def __init__(self, console: Console, messages: int, texts: Sequence[Text]) -> None:
        self._console = console
        self._messages = messages
        self._journal = Journal()
        self._progress = Progress(messages, self._journal)
        self._texts = texts
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._connections: list[float] = []
        self._broker = ""
        self._private = not os.environ.get("RABBITMQ_URL")
        self._faults: list[str] = []

    def run(self) -> None:
        """Start broker and worker, publish, watch, and stop everything, whatever happens."""
        with contextlib.ExitStack() as stack:
            settings, node = self._choose_broker(stack)
            producer = MLProducer(settings)
            self._listen(producer)
            queues = QUEUES if node else (OWN,)
            worker = CeleryWorker(str(settings.url), queues, exchange=settings.exchange)
            stack.callback(worker.stop, STOPPING)
            stack.enter_context(pool := ThreadPoolExecutor(PUBLISHERS, "demo-publisher"))
            stack.callback(producer.close, 0.0)
            stack.callback(self._stop.set)
            self._connect(producer)
            self._say("starting a Celery worker")
            worker.start()
            self._say(f"publishing {self._messages} tasks from {PUBLISHERS} threads")
            pause = PUBLISHING * PUBLISHERS / self._messages if node else 0.0
            publishers = [
                pool.submit(self._publish_all, producer, pause, index / PUBLISHERS)
                for index in range(PUBLISHERS)
            ]
            self._watch(publishers, worker, iter(()) if node is None else self._inject_faults(node))
            self._say("stopping")

    def report(self) -> bool:
        """Print the result, and return whether nothing was lost."""
        result = self._progress.figures()
        self._console.say()
        self._console.table(result.rows())
        if result.given_back:
            self._console.say(GIVEN_BACK)
        self._console.emit(
            {
                "ok": result.well,
                **asdict(result),
                "faults": self._faults,
                "broker": self._broker,
                "seconds": round(time.monotonic() - self._started, 3),
            }
        )
        return result.well

    # --- preparations --------------------------------------------------------------------------

    def _choose_broker(self, stack: contextlib.ExitStack) -> tuple[Settings, RabbitMQNode | None]:
        if not self._private:
            self._say(
                "RABBITMQ_URL is set: using that broker, without freezing or killing it, "
                f"with an exchange and a queue named {OWN}, which stay there"
            )
            return evolve(Settings.from_env(), exchange=OWN, declare_topology="off"), None
        self._say("starting a private RabbitMQ node (RABBITMQ_URL is not set)")
        node = stack.enter_context(RabbitMQNode())
        return Settings(url=node.url), node

    def _listen(self, producer: MLProducer) -> None:
        def connected() -> None:
            self._connections.append(time.monotonic())
            self._say(f"producer: connected to {producer.status().broker}")

        def disconnected() -> None:
            if not self._stop.is_set():
                self._say("producer: connection lost")

        producer.on("connected", connected)
        producer.on("disconnected", disconnected)

    def _connect(self, producer: MLProducer) -> None:
        error = connectivity.wait(producer, CONNECTING)
        self._broker = producer.status().broker
        if error is not None:
            raise error

    def _say(self, text: str) -> None:
        self._console.say(f"{time.monotonic() - self._started:5.1f} s  {text}")

    # --- publishers ----------------------------------------------------------------------------

    def _publish_all(self, producer: MLProducer, pause: float, phase: float) -> None:
        self._stop.wait(pause * phase)
        while (number := next(self._numbers)) < self._messages and not self._stop.is_set():
            self._publish(producer, self._task(number))
            self._stop.wait(pause)

    def _task(self, number: int) -> Task:
        text = self._texts[number % len(self._texts)]
        share, backend = f"demo-{number}", {"backend": "api"}
        if not self._private:
            kwargs = {"share_id": share, "content": {"text": text.text}, "options": backend}
            return CeleryTask("llm_service.tasks.summarize_content", (), kwargs, OWN)
        if number % 2:
            return EmbeddingTask(share, {"text": text.text, "type": "article"}, backend)
        return SummarizationTask(share, {"text": text.text, "title": text.title}, backend)

    def _publish(self, producer: MLProducer, task: Task) -> None:
        """Publish a task, again and again until a call returns."""
        while not self._stop.is_set():
            answer = self._journal.publish(producer, task)
            if isinstance(answer, Receipt):
                return
            if answer.permanent:
                raise answer
            self._stop.wait(PAUSE)

    # --- the main thread -----------------------------------------------------------------------

    def _watch(
        self, publishers: Sequence[Future[None]], worker: CeleryWorker, faults: Iterator[None]
    ) -> None:
        """Inject the faults and show progress, until all is run or nothing moves any more."""
        seen, moved = (0, 0, 0), time.monotonic()
        no_more_faults = object()
        while True:
            for publisher in publishers:
                if publisher.done():
                    publisher.result(0.0)
            faults_over = next(faults, no_more_faults) is no_more_faults
            counts = self._progress.look(worker.runs())
            if faults_over and self._progress.share == 1.0 and self._progress.complete:
                return
            if counts != seen:
                seen, moved = counts, time.monotonic()
            elif time.monotonic() - moved > PATIENCE:
                self._say(f"nothing has moved for {PATIENCE:.0f} s: giving up")
                return
            if not worker.running:
                worker.wait_for(lambda _runs: False, 0.0)  # raises, with the end of its log
            self._show(*counts)
            self._stop.wait(TICK)

    def _show(self, published: int, confirmed: int, run: int) -> None:
        text = f"published {published}  confirmed {confirmed}  run {run}"
        self._console.progress(run / self._messages, text)

    def _inject_faults(self, node: RabbitMQNode) -> Iterator[None]:
        """Freeze the broker after a third, kill it after two thirds; each step returns at once."""
        while self._progress.share < 1 / 3:
            yield
        self._say(f"freezing the broker for {FROZEN:.0f} s (SIGSTOP)")
        node.freeze()
        thaw_at = time.monotonic() + FROZEN
        while time.monotonic() < thaw_at:
            yield
        node.thaw()
        self._faults.append("frozen")
        self._say("the broker is thawed (SIGCONT)")
        while self._progress.share < 2 / 3:
            yield
        self._say("killing the broker (kill -9), and starting it again")
        connections = len(self._connections)
        node.kill()
        node.launch()
        self._faults.append("killed")
        while len(self._connections) == connections:
            if not node.running:
                raise RabbitMQError(f"the broker did not start again:\n{node.log_tail()}")
            yield


def _messages(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= MAX_MESSAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_MESSAGES}")
    return number
