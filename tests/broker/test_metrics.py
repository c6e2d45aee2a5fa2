"""Metrics beside a real broker: of several processes, of forked children, and through faults."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mlproducer import MLProducer, Settings
from mlproducer._core import events
from mlproducer.observe import metrics
from mlproducer.observe.metric_families import FAMILIES
from mlproducer.testing.plugin import VirtualHost
from mlproducer.topology import ROUTING_KEYS
from tests.broker.scripts import Program, run
from tests.helpers import LIMIT
from tests.threaded.moods import told

pytestmark = pytest.mark.broker

Series = dict[tuple[str, tuple[str, ...]], float]


def get(port: int, path: str) -> bytes:
    """Ask a web server."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read()


def publish_until_two_have(port: int) -> list[dict[str, Any]]:
    """Let workers publish until both have."""
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + 20.0
    with ThreadPoolExecutor(4) as pool:
        while len({answer["pid"] for answer in answers}) < 2:
            assert time.monotonic() < deadline
            answers += map(json.loads, pool.map(get, [port] * 8, ["/"] * 8))
    return answers


def scraped(text: bytes) -> Series:
    """Return every series by its name and its labels' values."""
    return {
        (sample.name.removeprefix("ml_producer_"), tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def sent(series: Series) -> Counter[str]:
    """Count messages by task type and status."""
    return Counter(
        {
            " ".join(sorted(labels)): int(number)
            for (name, labels), number in series.items()
            if name == "tasks_sent_total"
        }
    )


@pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="needs gunicorn")
def test_two_gunicorn_workers(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """Any worker shows what both have counted, at once, and the state of both connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2"]
        argv += ["--config", "metrics_gunicorn.py", "--bind", f"fd://{listener.fileno()}"]
        environ = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        with Program(
            [*argv, "metrics_app:app"], rabbitmq_vhost.url, environ, [listener.fileno()]
        ) as program:
            port = listener.getsockname()[1]
            unused = scraped(get(port, "/metrics"))
            answers = publish_until_two_have(port)
            used = scraped(get(port, "/metrics"))
            os.kill(answers[0]["pid"], signal.SIGTERM)
            answers += publish_until_two_have(port)
            replaced = scraped(get(port, "/metrics"))
            program.signal(signal.SIGTERM)
            ended = program.end()
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert all(answer["confirmed"] for answer in answers)
    check_unused(unused)
    for series in (used, replaced):
        assert series["connection_state", ()] == 3
        assert series["circuit_breaker_open", ()] == 0
        assert len(set(sent(series).values())) == 1
    assert used["connection_state_changes_total", ("CONNECTED",)] == 2
    assert sent(replaced) == Counter(
        {
            "success summarize_llm": len(answers),
            "raw success": len(answers),
            "unknown validation_error": len(answers),
        }
    )
    assert replaced["message_size_bytes_count", ()] == 2 * len(answers)


def check_unused(series: Series) -> None:
    """Before a producer is in use every series without labels is there, at zero, but one."""
    for family in FAMILIES:
        name = family.name.removeprefix("ml_producer_")
        if not family.labels and name != "connection_state":
            shown = name if family.kind.value != "histogram" else f"{name}_count"
            assert series[shown, ()] == 0
    assert ("connection_state", ()) not in series


def test_forks(rabbitmq_vhost: VirtualHost) -> None:
    """Children that are forked while threads publish and scrape count from zero; none hangs."""
    ended = run("metrics_storm", url=rabbitmq_vhost.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    *children, parent = ended.reports
    assert parent["codes"] == [0] * 30
    for child in children:
        assert child == {
            "before": {"tasks_sent_total": 0.0, "connection_state": 1.0},
            "after": {"tasks_sent_total": 1.0, "connection_state": 1.0},
            "confirmed": True,
            "with_second": False,
        }


def test_queue_depth(rabbitmq_vhost: VirtualHost) -> None:
    """The health check reads how much each queue holds."""
    registry = CollectorRegistry()
    settings = Settings(url=rabbitmq_vhost.url, health_check_interval=0.2)
    with MLProducer(settings, registry=registry) as producer:
        assert producer.wait_connected(LIMIT)
        read = told(producer, events.QueueDepth, lambda event: event.queue)
        read.wait_until(lambda: set(ROUTING_KEYS) <= set(read.seen))
        depths = {
            labels["queue_name"]: number
            for name, labels, number in metrics.samples(registry)
            if name == "ml_producer_queue_depth"
        }
    assert depths == dict.fromkeys(ROUTING_KEYS, 0.0)
