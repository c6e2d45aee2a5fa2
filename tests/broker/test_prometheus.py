"""The exported dashboard and alerts in a real Prometheus, beside a producer through faults."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.errors import NackError
from mlproducer.monitoring import ALERTS_FILE, DASHBOARD_FILE
from mlproducer.testing import RabbitMQNode
from mlproducer.testing.fake_broker import FakeBroker
from mlproducer.testing.plugin import VirtualHost
from mlproducer.wsgi import serve
from tests.broker.commands import run
from tests.helpers import LIMIT, make_message
from tests.prometheus import Prometheus, promtool
from tests.threaded.moods import Moody

pytestmark = pytest.mark.broker

UNHEALTHY, DISCONNECTED = "MLProducerConnectionUnhealthy", "MLProducerDisconnected"
QUEUE_LONG, QUEUE_VERY_LONG = "MLProducerRetryQueueHigh", "MLProducerHighRetryQueueSize"
BREAKER, SILENT = "MLProducerCircuitBreakerOpen", "MLProducerNotConfirming"
OUTBOX_LATE, OUTBOX_LONG = "MLProducerOutboxLate", "MLProducerOutboxLong"

SECONDS = {
    UNHEALTHY: 2,
    DISCONNECTED: 3,
    QUEUE_LONG: 5,
    QUEUE_VERY_LONG: 5,
    BREAKER: 2,
    SILENT: 2,
    OUTBOX_LATE: 2,
    OUTBOX_LONG: 5,
}
"""How long each fault has to last here; the exported rules say minutes."""

SCRAPES = "count_over_time(ml_producer_connection_state[10s])"

SETTINGS: dict[str, Any] = {
    "circuit_breaker_threshold": 1_000_000,
    "reconnect_initial_delay": 0.1,
    "reconnect_max_delay": 0.5,
    "max_reconnect_attempts": 1000,
    "health_check_interval": 0.5,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export with the command."""
    directory = tmp_path_factory.mktemp("monitoring")
    assert run("monitoring", "export", str(directory)).returncode == 0
    return directory


def shortened(exported: Path) -> str:
    """Return the exported rules with minutes of patience as seconds."""
    text, number = re.subn(r"for: (\d+)m\n", r"for: \1s\n", (exported / ALERTS_FILE).read_text())
    assert number == len(SECONDS)
    windows = {"total[2m]": "total[10s]", "}[1m]": "}[5s]"}  # of the alert that looks back
    for minutes, seconds in windows.items():
        assert minutes in text
        text = text.replace(minutes, seconds)
    return text


def queries(exported: Path) -> list[str]:
    """Return all queries of the exported dashboard, with a window as Grafana would choose it."""
    panels = json.loads((exported / DASHBOARD_FILE).read_text())["panels"]
    targets = [target for panel in panels for target in panel.get("targets", [])]
    return [target["expr"].replace("$__rate_interval", "10s") for target in targets]


@contextmanager
def watched(exported: Path, url: str, **settings: Any) -> Iterator[tuple[MLProducer, Prometheus]]:
    """Yield a producer that is connected and scraped, and about which nothing is alerted."""
    registry = CollectorRegistry()
    chosen = Settings(url=url, **{**SETTINGS, **settings})
    with (
        MLProducer(chosen, registry=registry) as producer,
        serve(producer, 0) as server,
    ):
        producer.start()
        assert producer.wait_connected(LIMIT)
        with Prometheus(server.port, shortened(exported)) as prometheus:
            prometheus.wait_until(lambda: (prometheus.value(SCRAPES) or 0) > 3)
            assert prometheus.value("ml_producer_connection_state") == 3
            yield producer, prometheus


def check_patience(prometheus: Prometheus, faults: dict[str, float]) -> None:
    """See that there were no alerts but these, each pending from its fault on before it fired.

    :param faults: when the fault of each alert began
    """
    first = {
        (labels["alertname"], labels["alertstate"]): times[0]
        for labels, times in prometheus.times("ALERTS")
    }
    assert {name for name, _ in first} == set(faults)
    for name, fault in faults.items():
        assert first[name, "pending"] > fault
        assert first[name, "firing"] - first[name, "pending"] >= SECONDS[name]


def test_promtool_accepts_the_rules(exported: Path) -> None:
    """The file as it is exported passes ``promtool check rules``."""
    assert "8 rules found" in promtool("check", "rules", ALERTS_FILE, directory=exported)


STATE, OPEN = "ml_producer_connection_state", "ml_producer_circuit_breaker_open"
WAITING, TIMEOUTS = "ml_producer_retry_queue_size", "ml_producer_confirm_timeouts_total"


@pytest.mark.parametrize(
    ("series", "values", "firing"),
    [
        (WAITING, "50x40", {}),
        (WAITING, "51x40", {QUEUE_LONG: 300}),
        (WAITING, "100x40", {QUEUE_LONG: 300}),
        (WAITING, "101x40", {QUEUE_LONG: 300, QUEUE_VERY_LONG: 300}),
        (WAITING, "101x19 0 101x15", {}),
        (STATE, "3x40", {}),
        (STATE, "1 2 1 2 1 2 1 2 1 2 1 2 1 2 1 2", {UNHEALTHY: 120, DISCONNECTED: 180}),
        (STATE, "1x7 3 2x7 3 1x7", {}),
        (STATE, "4x40", {UNHEALTHY: 120}),
        (STATE, "5x40", {UNHEALTHY: 120}),
        (OPEN, "0x40", {}),
        (OPEN, "1 1 0 0x20", {}),
        (OPEN, "1 1 0 1 1 0 1 1 0 1 1 0", {BREAKER: 120}),
        (OPEN, "1x40", {BREAKER: 120}),
        (TIMEOUTS, "0x40", {}),
        (TIMEOUTS, "0 1x40", {}),
        (TIMEOUTS, "0+1x40", {SILENT: 135}),
        (TIMEOUTS, "0 0 0 0 1x3 2x3 3x3 4x3 5x3", {SILENT: 180}),
    ],
    ids=lambda value: value.replace("ml_producer_", "") if isinstance(value, str) else "",
)
def test_patience(
    exported: Path, tmp_path: Path, series: str, values: str, firing: dict[str, int]
) -> None:
    """The exported rules, minutes and all, fire when they should: on readings 15 s apart.

    A state that changes between disconnected and connecting is one outage; a breaker that is
    half-open for a moment between two cooldowns is one fault; either fault, ended and begun again,
    is two.
    """
    readings = sum(int(each.partition("x")[2] or 0) + 1 for each in values.split())
    expected = {
        at: [name for name, after in firing.items() if at >= after]
        for at in range(0, 15 * readings, 15)
    }
    (tmp_path / "test.yml").write_text(json.dumps(unit_test(exported, series, values, expected)))
    assert "SUCCESS" in promtool("test", "rules", "test.yml", directory=tmp_path)


def test_successes_beside_timeouts(exported: Path, tmp_path: Path) -> None:
    """While messages are confirmed beside others that are not, there is no such alert."""
    test = unit_test(exported, TIMEOUTS, "0+1x60", {at: [] for at in range(0, 600, 15)})
    [case] = test["tests"]
    case["input_series"].append(
        {
            "series": 'ml_producer_tasks_sent_total{instance="a:1",status="success",task_type="t"}',
            "values": "5+1x40 45x20",
        }
    )
    fires = {"labels": f'{{alertname="{SILENT}"}}', "value": 1}
    for each in case["promql_expr_test"]:
        seconds = int(each["eval_time"].removesuffix("s"))
        each["exp_samples"] = [fires] if seconds >= 600 + 60 + 120 else []
    (tmp_path / "test.yml").write_text(json.dumps(test))
    assert "SUCCESS" in promtool("test", "rules", "test.yml", directory=tmp_path)


def unit_test(
    exported: Path, series: str, values: str, expected: dict[int, list[str]]
) -> dict[str, Any]:
    """Return a test as promtool reads it: at each second, the alerts that fire."""
    fires = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{at}s",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
        }
        for at, names in expected.items()
    ]
    return {
        "rule_files": [str(exported / ALERTS_FILE)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": f'{series}{{instance="a:1"}}', "values": values}],
                "promql_expr_test": fires,
            }
        ],
    }


def test_an_outage(mortal_node: RabbitMQNode, rabbitmq_vhost: VirtualHost, exported: Path) -> None:
    """Alerts of connection and queue fire one by one while the broker is away, and end with it.

    Every query of the dashboard answers before it and after it, and has given numbers.
    """
    with watched(exported, rabbitmq_vhost.url) as (producer, prometheus):
        for query in queries(exported):
            assert prometheus.get("query", query=query)["result"], query
        assert producer.publish(SummarizationTask("1", {"text": "x"})).confirmed
        assert prometheus.alerts() == []

        faults = dict.fromkeys((UNHEALTHY, DISCONNECTED, QUEUE_LONG), time.time())
        mortal_node.stop()
        futures = [producer.submit(SummarizationTask("2", {"text": "x"})) for _ in range(51)]
        prometheus.wait_until(lambda: prometheus.firing() == set(faults))

        faults[QUEUE_VERY_LONG] = time.time()
        futures += [producer.submit(SummarizationTask("3", {"text": "x"})) for _ in range(50)]
        prometheus.wait_until(lambda: prometheus.firing() == set(faults))
        check_patience(prometheus, faults)
        check_texts(prometheus)

        mortal_node.restart()
        assert all(future.result(2 * LIMIT).confirmed for future in futures)
        prometheus.wait_until(lambda: prometheus.alerts() == [])
        for query in queries(exported):
            assert prometheus.get("query", query=query)["result"], query
            assert prometheus.numbers(query), query


def check_texts(prometheus: Prometheus) -> None:
    """See that the texts of alerts that fire are complete, and name the process."""
    for alert in prometheus.alerts():
        assert set(alert.annotations) == {"summary", "description", "action"}
        assert re.match(r"127\.0\.0\.1:\d+: ", alert.annotations["summary"])
        for text in alert.annotations.values():
            assert not re.search(r"\{\{|error expanding|no value", text)


def test_a_broker_that_refuses(exported: Path) -> None:
    """The breaker's alert fires once the breaker is open, and no other does."""
    mood = Moody()
    with (
        FakeBroker(mood) as broker,
        watched(exported, broker.url, circuit_breaker_threshold=1, declare_topology="off") as (
            producer,
            prometheus,
        ),
    ):
        assert producer.publish(make_message()).confirmed
        assert prometheus.alerts() == []

        mood.mood = "nack"
        faults = {BREAKER: time.time()}
        with pytest.raises(NackError):
            producer.publish(make_message(), retry=False)
        prometheus.wait_until(lambda: prometheus.firing() == set(faults))
        check_patience(prometheus, faults)
        check_texts(prometheus)


def test_a_broker_that_confirms_nothing(exported: Path) -> None:
    """The alert fires beside a connection that stands, and ends with the first confirm."""
    mood = Moody()
    chosen: dict[str, Any] = {"declare_topology": "off", "publish_timeout": 0.2}
    with (
        FakeBroker(mood) as broker,
        watched(exported, broker.url, **chosen) as (producer, prometheus),
    ):
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
        assert prometheus.alerts() == []

        mood.mood = "silence"
        faults = {SILENT: time.time()}

        def publish_in_vain() -> bool:
            assert not producer.publish(make_message()).confirmed
            return prometheus.firing() == set(faults)

        prometheus.wait_until(publish_in_vain)
        check_patience(prometheus, faults)
        check_texts(prometheus)

        mood.mood = "ack"
        assert producer.publish(make_message(), timeout=LIMIT).confirmed
        prometheus.wait_until(lambda: prometheus.alerts() == [])


def test_a_producer_that_was_closed(rabbitmq_vhost: VirtualHost, exported: Path) -> None:
    """A closed producer is not healthy, yet not disconnected either."""
    with watched(exported, rabbitmq_vhost.url) as (producer, prometheus):
        faults = {UNHEALTHY: time.time()}
        producer.close()
        prometheus.wait_until(lambda: prometheus.firing() == set(faults))
        check_patience(prometheus, faults)
