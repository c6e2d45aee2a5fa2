"""`CeleryWorker`: a stock Celery 5 worker in a subprocess, which reports what it ran.

Owns the worker's process, the small application module that it loads, and the list of runs. Celery
is started, not imported, so it is needed only once a worker starts. Must not know how the tasks got
into the queues.

Runs on: the caller's thread, and ``mlproducer-worker-reader``, which reads what the worker reports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attrs import field, frozen

from mlproducer.testing.workspace import Program, Workspace
from mlproducer.topology import Queue

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["QUEUES", "TASKS", "CeleryNotInstalled", "CeleryWorker", "TaskRun", "WorkerError"]

TASKS = (
    "llm_service.tasks.summarize_content",
    "llm_service.tasks.summarize_content_local",
    "whisper.tasks.transcribe_api",
    "whisper.tasks.transcribe_local",
    "vector_service.tasks.generate_embeddings",
    "vector_service.tasks.generate_embeddings_batch",
)
QUEUES = ("ml.summarize", "ml.summarize_local", "ml.transcribe", "ml.transcribe_local", "ml.embed")

_START_LIMIT = 240.0
_STOP_LIMIT = 10.0
_APPLICATION = '''\
"""A Celery application whose tasks report each run, as one line of JSON, to the old stdout."""
import json, os
from celery import Celery
from celery.signals import worker_ready
from kombu import Exchange, Queue

reports = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the banner and the log belong to stderr

def report(**record):
    reports.write(json.dumps(record, default=repr) + "\\n")
    reports.flush()

app = Celery("worker")
exchange = Exchange({exchange!r}, type="topic")
options = {options!r}
app.conf.task_queues = [Queue(name, exchange, routing_key=name, **options) for name in {queues!r}]

def run(self, *args, **kwargs):
    properties = dict(self.request.properties)
    report(
        task=self.name, id=self.request.id, args=list(args), kwargs=kwargs,
        headers=properties.pop("application_headers"), properties=properties,
        delivery_info=self.request.delivery_info,
    )

for name in {tasks!r}:
    app.task(run, bind=True, name=name)

@worker_ready.connect
def ready(**_):
    report(ready=True)
'''


class WorkerError(Exception):
    """The worker did not start, or ended; the text holds the end of its log."""


class CeleryNotInstalled(WorkerError):  # noqa: N818 - says what is missing
    """No Celery for this Python."""


@frozen
class TaskRun:
    """One run of a task, as the worker saw it.

    ``headers`` are the message's AMQP headers (``eta``, ``expires``, ``traceparent`` ...),
    ``properties`` its other AMQP properties under their Celery names (``priority``,
    ``delivery_mode``, ``correlation_id`` ...), ``delivery_info`` how it came (``exchange``,
    ``routing_key``, ``redelivered``).
    """

    task: str
    id: str
    args: list[Any] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    headers: dict[str, Any] = field(repr=False)
    properties: dict[str, Any] = field(repr=False)
    delivery_info: dict[str, Any] = field(repr=False)


class CeleryWorker:
    """A Celery worker on ``queues``, as a context manager; it is ready after about 2 s.

    The worker is stock but for ``task_queues``, and that is the least that works (seen with Celery
    5.7 and RabbitMQ 3.10.8). With ``-Q ml.summarize`` alone it declares a classic queue, with
    ``task_create_missing_queue_type = "quorum"`` one without the other arguments: it ends with
    406 PRECONDITION_FAILED either way. With ``no_declare`` and no arguments it does not see that
    the queue is a quorum queue, asks for global QoS, and gets 540 NOT_IMPLEMENTED. So each queue
    is named with all of its arguments, or with its type and ``no_declare``; Celery 5.5 and later
    then leaves global QoS alone by itself (``worker_detect_quorum_queues``, on by default). It
    also declares its 28 ``celery_delayed_*`` queues, because there is a quorum queue.

    Args:
        url: the broker; several addresses are separated by commas.
        queues: the queues to consume from, each bound to ``exchange`` by its own name.
        tasks: the names of the tasks to serve. Others are discarded, as Celery does.
        exchange: the topic exchange of the queues.
        declare: name the queues with all of their arguments, and declare them; otherwise they are
            taken to be there.
        concurrency: processes of a prefork pool; None runs one task after the other in the
            worker's own process.
        prefetch: messages that the worker holds for each of its processes.
        directory: where to make the worker's directory; the temporary directory by default.

    """

    def __init__(
        self,
        url: str,
        queues: Sequence[str] = QUEUES,
        *,
        tasks: Sequence[str] = TASKS,
        exchange: str = "bookmarkai.ml",
        declare: bool = True,
        concurrency: int | None = None,
        prefetch: int = 4,
        directory: str | Path | None = None,
    ) -> None:
        self.queues = tuple(queues)
        self.tasks = tuple(tasks)
        self._url = url
        self._exchange = exchange
        self._declare = declare
        self._concurrency = concurrency
        self._prefetch = prefetch
        self._directory = directory
        self._workspace: Workspace | None = None
        self._program: Program | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()  # guards: _runs, _ready, _ended
        self._runs: list[TaskRun] = []
        self._ready = False
        self._ended = False

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<CeleryWorker {', '.join(self.queues)} {state}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the worker's process is alive."""
        return self._program is not None and self._program.running

    @property
    def pid(self) -> int | None:
        """The process id of the worker, None before the start."""
        return None if self._program is None else self._program.pid

    @property
    def ready(self) -> bool:
        """Whether the worker has reported that it consumes."""
        return self._ready

    def start(self, timeout: float = _START_LIMIT) -> None:
        """Start the worker and wait until it consumes, at most ``timeout`` seconds.

        Raises:
            CeleryNotInstalled: this Python has no Celery.
            WorkerError: it runs already or did not come up; with the end of its log.

        """
        if importlib.util.find_spec("celery") is None:
            raise CeleryNotInstalled("Celery is not installed: pip install celery")
        if self._workspace is not None:
            raise WorkerError("the worker is running already")
        self._ready = self._ended = False
        self._workspace = Workspace("celery-worker-", self._directory)
        self._program = self._spawn(self._workspace)
        self._reader = threading.Thread(
            target=self._read, args=[self._program.process.stdout], daemon=True
        )
        self._reader.name = "mlproducer-worker-reader"
        self._reader.start()
        if not self._wait(lambda: self._ready, timeout):
            log = self._program.log_tail()
            self.stop(0.0)
            raise WorkerError(f"the worker was not ready within {timeout:g} s; its log:\n{log}")

    def stop(self, timeout: float = _STOP_LIMIT) -> None:
        """Warm shutdown: the running task ends first; SIGKILL after ``timeout`` seconds."""
        if self._program is not None:
            self._program.terminate(timeout)
        if self._reader is not None:
            self._reader.join(_STOP_LIMIT)
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None

    def runs(self) -> list[TaskRun]:
        """The runs so far, in order."""
        with self._changed:
            return list(self._runs)

    def wait_for(
        self,
        wanted: Collection[str] | Callable[[list[TaskRun]], bool],
        timeout: float = 30.0,
    ) -> list[TaskRun]:
        """Wait until all task ids in ``wanted`` have run, or until ``wanted(runs)`` is true.

        Raises:
            TimeoutError: that is not so after ``timeout`` seconds.
            WorkerError: the worker ended before; with the end of its log.

        """
        if isinstance(wanted, str):
            raise TypeError("wanted must be a collection of task ids or a callable, not str")

        def satisfied() -> bool:
            if callable(wanted):
                return wanted(list(self._runs))
            return {run.id for run in self._runs}.issuperset(wanted)

        if self._wait(satisfied, timeout):
            return self.runs()
        log = "" if self._program is None else self._program.log_tail()
        raise TimeoutError(f"not run within {timeout:g} s; {len(self.runs())} runs; log:\n{log}")

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._ended, timeout)
            if condition():
                return True
            if not self._ended:
                return False
        log = "" if self._program is None else self._program.log_tail()
        raise WorkerError(f"the worker has ended; the end of its log:\n{log}")

    def _queue_options(self) -> dict[str, Any]:
        if not self._declare:
            return {"queue_arguments": {"x-queue-type": "quorum"}, "no_declare": True}
        return {"queue_arguments": Queue("any").declared_arguments(f"{self._exchange}.dlx")}

    def _spawn(self, workspace: Workspace) -> Program:
        (workspace.path / "worker_application.py").write_text(
            _APPLICATION.format(
                exchange=self._exchange,
                queues=self.queues,
                tasks=self.tasks,
                options=self._queue_options(),
            )
        )
        name = f"worker-{secrets.token_hex(4)}"
        argv = [sys.executable, "-m", "celery", "--app", "worker_application", "worker"]
        if self._concurrency is None:
            argv += ["--pool", "solo"]
        else:
            argv += ["--pool", "prefork", "--concurrency", str(self._concurrency)]
        argv += ["--prefetch-multiplier", str(self._prefetch)]
        argv += ["--hostname", f"{name}@localhost", "--loglevel", "INFO"]
        # An idle worker sees SIGTERM at its next heartbeat.
        argv += ["--without-gossip", "--without-mingle", "--heartbeat-interval", "1"]
        environ = os.environ | {"CELERY_BROKER_URL": self._url.replace(",", ";")}
        return workspace.spawn("worker", argv, environ, stdout=subprocess.PIPE)

    def _read(self, reports: IO[bytes]) -> None:
        with reports:
            for line in reports:
                if not line.endswith(b"\n"):
                    break  # killed while it wrote
                record = json.loads(line)
                with self._changed:
                    if "ready" in record:
                        self._ready = True
                    else:
                        self._runs.append(TaskRun(**record))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
