"""Tasks of a Celery app under faults: what delay() returned for is there, or a dead letter.

``MLPRODUCER_CELERY_SECONDS`` is for how long; ``MLPRODUCER_CELERY_ROLLOUT=0`` shows what becomes of
them by Celery's own way.
"""

from __future__ import annotations

import os
import secrets
import threading
import time

import pytest
from attrs import define, field
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError
from prometheus_client import REGISTRY

from mlproducer.contrib.celery import PublishFailedError, install, uninstall
from mlproducer.testing import Proxy
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.faults.nemesis import DEAD_LETTERS, LIGHT, Nemesis
from tests.faults.traffic import FIGURES, LIMIT
from tests.helpers import Background

pytestmark = pytest.mark.broker

SEED = int(os.environ.get("MLPRODUCER_NEMESIS_SEED") or secrets.randbelow(1_000_000))
SECONDS = float(os.environ.get("MLPRODUCER_CELERY_SECONDS", "10"))
ROLLOUT = float(os.environ.get("MLPRODUCER_CELERY_ROLLOUT", "1"))
THREADS = 4
FAULTS = {name: weight for name, weight in LIGHT.items() if name != "unbind"} | {"kill": 2}

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


def _possible_duplicates() -> float:
    """Count what was sent again although its earlier fate was not known."""
    return REGISTRY.get_sample_value("ml_producer_possible_duplicates_total") or 0.0


def test_nothing_is_lost(rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy) -> None:
    """Whatever the network and the broker do; a copy too many is one that was sent again."""
    url = proxy.url(rabbitmq_vhost.url)
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.task_queues = [Queue("shop", queue_arguments={"x-queue-type": "quorum"})]
    app.conf.task_default_queue = "shop"
    producer = connect(url, **HASTY)
    install(app, producer, rollout=ROLLOUT)
    assert producer.wait_connected(LIMIT)
    before = _possible_duplicates()
    app.send_task("shop.add", (1, 2), task_id="first", ignore_result=True)
    nemesis, calls, background = Nemesis(rabbitmq_vhost, proxy, SEED), Calls(app), Background()
    for number in range(THREADS):
        background.call(calls.work, number)
    try:
        nemesis.play(FAULTS, SECONDS)
    finally:
        proxy.heal()
        calls.over.set()
    background.gather(LIMIT)
    assert producer.flush(LIMIT) == 0
    found = drain(rabbitmq_vhost.url, ["shop"])
    dead = drain(rabbitmq_vhost.url, [DEAD_LETTERS])
    lost = [name for name in calls.returned if name not in found and name not in dead]
    leaked = [name for name in calls.refused if name in found]
    copies = {name: count for name, count in found.items() if count > 1}
    FIGURES[f"celery for {SECONDS:g} s"] = (
        f"seed {SEED}, rollout {ROLLOUT:g}, returned {len(calls.returned)}, "
        f"refused {len(calls.refused)}, unsure {len(calls.unsure)}, lost {len(lost)}, "
        f"leaked {len(leaked)}, duplicates {len(copies)}, dead letters {len(dead)}, "
        f"{nemesis.played.total()} faults, longest call {calls.longest:.2f} s"
    )
    print(FIGURES[f"celery for {SECONDS:g} s"])
    uninstall(app)
    app.close()
    assert (lost, leaked) == ([], [])
    assert found.total() - len(found) <= _possible_duplicates() - before
    assert calls.longest < HASTY["publish_timeout"] + 0.75
