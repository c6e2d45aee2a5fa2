"""Tasks of a Celery app under faults: what delay() returned for is run, or a dead letter.

A stock worker runs them, behind the same proxy, and is killed now and then. A task that runs twice
must have a reason: the producer wrote it again, since it was in flight when its connection or
channel was lost; or the broker delivered it again, since the worker had not acknowledged it when it
was killed or lost its own connection. Messages of the second kind are marked as redelivered.

``MLPRODUCER_CELERY_SECONDS`` is for how long; ``MLPRODUCER_CELERY_ROLLOUT=0`` shows what becomes of
them by Celery's own way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import pytest
from attrs import define, field, frozen
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from prometheus_client import REGISTRY

from mlproducer._core import events
from mlproducer._core.delivery import Delivery
from mlproducer._engine import runtime
from mlproducer.contrib.celery import PublishFailedError, install, uninstall
from mlproducer.errors import ConfirmTimeoutError, PublishError
from mlproducer.observe.sinks import Fanout, Sink, Table
from mlproducer.testing import CeleryWorker, Proxy
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.faults.nemesis import DEAD_LETTERS, LIGHT, Nemesis
from tests.faults.traffic import FIGURES, LIMIT
from tests.helpers import Background
from tests.stopwatch import Stopwatch

pytestmark = pytest.mark.broker

SEED = int(os.environ.get("MLPRODUCER_NEMESIS_SEED", "615"))
"""By default one that plays each fault within ten seconds."""

SECONDS = float(os.environ.get("MLPRODUCER_CELERY_SECONDS", "10"))
ROLLOUT = float(os.environ.get("MLPRODUCER_CELERY_ROLLOUT", "1"))
THREADS = 4
FAULTS = {name: weight for name, weight in LIGHT.items() if name != "unbind"} | {
    "kill": 2,
    "kill_worker": 2,
}
PREFETCH = 4
"""Messages that the worker holds, and that the broker delivers again where it loses them."""

HASTY = {
    "publish_timeout": 1.5,
    "max_message_retries": 3,
    "reconnect_initial_delay": 0.1,
    "reconnect_max_delay": 1.0,
    "circuit_breaker_cooldown": 1.0,
    "health_check_interval": 5.0,
    "confirm_give_up": 20.0,
}


@define(eq=False)
class Calls:
    """Threads that call tasks until they are told to stop, and what the calls said."""

    app: Celery
    returned: list[str] = field(factory=list)
    refused: list[str] = field(factory=list)
    unsure: list[str] = field(factory=list)
    longest: float = 0.0
    over: threading.Event = field(factory=threading.Event)

    def work(self, thread: int) -> None:
        """Call one task after the other."""
        number = 0
        while not self.over.wait(0.01):
            number += 1
            name = f"{thread}-{number}"
            started = time.monotonic()
            try:
                self.app.send_task(
                    "shop.add", (1, 2), task_id=name, message_id=name, ignore_result=True
                )
            except PublishFailedError as error:
                (self.unsure if error.possibly_sent else self.refused).append(name)
            except OperationalError:
                self.unsure.append(name)
            else:
                self.returned.append(name)
            self.longest = max(self.longest, time.monotonic() - started)


class Losses(Sink):
    """Notes which messages were in flight, and perhaps in the queue, when an attempt failed.

    :ivar by_id: how often each was
    :ivar by_cause: how many were, by what happened to them
    """

    def __init__(self) -> None:
        self.by_id: Counter[str] = Counter()
        self.by_cause: Counter[str] = Counter()

    def table(self) -> Table:
        """Return what counts."""
        return {
            events.AttemptFailed: lambda event: self._failed(event.delivery, event.error),
        }

    def _failed(self, delivery: Delivery, error: PublishError) -> None:
        """Count an attempt that may have succeeded; what is late is still under way."""
        if error.possibly_sent and not isinstance(error, ConfirmTimeoutError):
            self.by_id[delivery.envelope.message_id] += 1
            self.by_cause[getattr(error, "kind", "") or type(error).__name__] += 1


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Give what the producers of the test lose while it is in flight."""
    losses = Losses()
    monkeypatch.setattr(runtime, "Fanout", lambda sinks: Fanout([*sinks, losses]))
    return losses


class WorkerToo(Nemesis):
    """Kills the worker as well, as a kernel does that is short of memory."""

    def __init__(self, vhost: VirtualHost, proxy: Proxy, worker: CeleryWorker) -> None:
        super().__init__(vhost, proxy, SEED)
        self._worker = worker

    def _kill_worker(self) -> None:
        assert self._worker.pid is not None
        os.kill(self._worker.pid, signal.SIGKILL)
        self._worker.stop(0.0)
        self._worker.start()


def _possible_duplicates() -> float:
    """Count what was sent again although its earlier fate was not known."""
    return REGISTRY.get_sample_value("ml_producer_possible_duplicates_total") or 0.0


@frozen
class Copies:
    """How often each task was run, or is still there to be.

    :ivar fresh: deliveries of each that the broker makes for the first time
    :ivar again: those that it makes once more, of what a worker has not acknowledged
    """

    fresh: Counter[str]
    again: Counter[str]

    @property
    def found(self) -> set[str]:
        """Return the ids of all tasks that have arrived."""
        return {*self.fresh, *self.again}

    @property
    def written(self) -> int:
        """Count the copies that the producer has written on top of each first one."""
        return sum(count - 1 for count in self.fresh.values() if count > 1)


def count(worker: CeleryWorker, url: str) -> Copies:
    """Stop the worker, and count what it has run and what it leaves in the queue."""
    worker.stop()
    copies = {flag: Counter[str]() for flag in (False, True)}
    for run in worker.runs():
        copies[bool(run.delivery_info["redelivered"])][run.id] += 1
    with open_channel(url) as channel:
        while (got := channel.basic_get("shop", auto_ack=True))[0] is not None:
            copies[got[0].redelivered][got[1].message_id] += 1
    return Copies(copies[False], copies[True])


def test_nothing_is_lost(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, losses: Losses
) -> None:
    """Whatever the network, the broker and the worker do; and each task that ran twice had to."""
    url = proxy.url(rabbitmq_vhost.url)
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.task_queues = [Queue("shop", queue_arguments={"x-queue-type": "quorum"})]
    app.conf.task_default_queue = "shop"
    producer = connect(url, **HASTY)
    install(app, producer, rollout=ROLLOUT)
    assert producer.wait_connected(LIMIT)
    before = _possible_duplicates()
    app.send_task("shop.add", (1, 2), task_id="first", message_id="first", ignore_result=True)
    with CeleryWorker(
        url, ["shop"], tasks=["shop.add"], exchange="", declare=False, prefetch=PREFETCH
    ) as worker:
        nemesis, calls = WorkerToo(rabbitmq_vhost, proxy, worker), Calls(app)
        watch = Stopwatch()
        background = Background()
        for number in range(THREADS):
            background.call(calls.work, number)
        try:
            nemesis.play(FAULTS, SECONDS)
        finally:
            proxy.heal()
            calls.over.set()
        background.gather(LIMIT)
        waited = watch.waited()
        assert producer.flush(LIMIT) == 0
        install(app, producer, rollout=1.0)  # Celery's own way may lose this one too
        app.send_task("shop.add", (1, 2), task_id="last", message_id="last", ignore_result=True)
        worker.wait_for({"last"}, LIMIT)
        copies = count(worker, rabbitmq_vhost.url)
    dead = drain(rabbitmq_vhost.url, [DEAD_LETTERS])
    lost = [name for name in calls.returned if name not in copies.found and name not in dead]
    leaked = [name for name in calls.refused if name in copies.found]
    unexplained = {
        name: count for name, count in copies.fresh.items() if count > 1 + losses.by_id[name]
    }
    again = _possible_duplicates() - before
    causes = ", ".join(f"{cause} {n}" for cause, n in losses.by_cause.most_common())
    FIGURES[f"celery for {SECONDS:g} s"] = (
        f"seed {SEED}, rollout {ROLLOUT:g}, returned {len(calls.returned)}, "
        f"refused {len(calls.refused)}, unsure {len(calls.unsure)}, lost {len(lost)}, "
        f"leaked {len(leaked)}, dead letters {len(dead)}; "
        f"in flight at a loss {losses.by_cause.total()} ({causes}), of these written again "
        f"{again:g}, which made {copies.written} copies, unexplained {len(unexplained)}; "
        f"delivered again by the broker {copies.again.total()}, "
        f"over {proxy.accepted} connections; {nemesis.played.total()} faults "
        f"({', '.join(f'{n} {name}' for name, n in sorted(nemesis.played.items()))}), "
        f"longest call {calls.longest:.2f} s"
    )
    print(FIGURES[f"celery for {SECONDS:g} s"])
    uninstall(app)
    app.close()
    assert (lost, leaked) == ([], [])
    assert unexplained == {}
    assert copies.written <= min(again, losses.by_cause.total())
    assert copies.again.total() <= PREFETCH * proxy.accepted
    assert calls.longest - waited < HASTY["publish_timeout"] + 0.75
