"""A stock worker does with our messages all that Celery's headers are for, fewer though they be."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import date, datetime, timezone
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import pytest

from mlproducer import CeleryTask, MLProducer, Queue, Settings, Topology
from mlproducer.testing import RedisServer
from mlproducer.testing.plugin import VirtualHost

pytestmark = pytest.mark.broker

LIMIT = 60.0
PYTHON = os.environ.get("CANVAS_PYTHON", sys.executable)
"""An interpreter with another Celery can be named, to try that one."""

TOPOLOGY = Topology("canvas", queues=(Queue("canvas", type=None),))


class Told:
    """What a worker has written so far, by name."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        self._found: dict[str, Any] = {}
        threading.Thread(target=self._read, args=[stream], daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)

    def __getitem__(self, name: str) -> Any:
        while name not in self._found:
            key, _, value = self._lines.get(timeout=LIMIT).partition(" ")
            self._found[key] = json.loads(value)
        return self._found[name]


@pytest.fixture
def told(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> Iterator[Told]:
    """Yield what a prefork worker tells, which is ready."""
    argv = [PYTHON, "-m", "celery", "-A", "canvas_app", "worker", "--concurrency=2"]
    with RedisServer() as redis, (tmp_path / "log").open("w") as log:
        environ = {
            **os.environ,
            "BROKER": rabbitmq_vhost.url,
            "BACKEND": redis.url,
            "PYTHONPATH": str(Path(__file__).parent / "scripts"),
        }
        options = ["--without-gossip", "--without-mingle", "--loglevel=INFO"]
        with subprocess.Popen(
            [*argv, *options], env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        ) as worker:
            try:
                assert worker.stdout is not None
                lines = Told(worker.stdout)
                assert lines["ready"]
                yield lines
            finally:
                worker.terminate()
                try:
                    worker.wait(30.0)
                except subprocess.TimeoutExpired:
                    worker.kill()


def test_canvas(rabbitmq_vhost: VirtualHost, told: Told) -> None:
    """Retry, link, chain, group, chord, replace, limits and kombu's types, on a stock worker."""
    rich = [
        uuid.UUID(int=7),
        datetime(2024, 5, 1, 12, tzinfo=timezone.utc),
        date(2024, 5, 1),
        time_of_day(12, 30),
        Decimal("1.10"),
        b"text",
        b"\xff",
    ]
    settings = Settings(url=rabbitmq_vhost.url, topology=TOPOLOGY, declare_topology="off")
    with MLProducer(settings) as producer:

        def publish(name: str, *args: Any, **fields: Any) -> str:
            task = CeleryTask(f"canvas.{name}", args, routing_key="canvas", **fields)
            receipt = producer.publish(task)
            assert receipt.confirmed
            return receipt.message_id

        plain = publish("retry", "plain")
        limited = publish("retry", "limited", time_limit=20, soft_time_limit=10)
        root = publish("all")
        publish("slow", soft_time_limit=1)
        publish("rich", *rich, kwargs={"last": rich[0]})

        assert told["plain"][:2] == [2, plain]
        assert told["limited"] == [2, limited, [20, 10]]
        sums = {"link": 3, "chain": 6, "group0": 0, "group1": 1, "chord": [0, 2, 4]}
        for name, value in {**sums, "replace": "replaced"}.items():
            given, its_root, parent = told[name]
            assert (given, its_root) == (value, root), name
            assert parent is not None or name == "replace"
        assert told["limit"][0] == [None, 1]
        assert told["rich"] == [[type(each).__name__, str(each)] for each in [*rich, rich[0]]]
