"""``mlproducer reliability`` as a user runs it: all is as expected, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlproducer.cli.reliability import SCENARIOS
from mlproducer.testing.plugin import VirtualHost
from tests.broker.commands import documents, run
from tests.leftovers import left_behind
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker

MINUTES = 3 * 60.0


def _failed(document: dict[str, Any]) -> list[Any]:
    steps = [step for each in document["scenarios"] for step in each["steps"]]
    return [(step["done"], step["seen"]) for step in steps if step["ok"] is False]


def test_one_scenario(tmp_path: Path) -> None:
    """The breaker on a private node: every step as expected, told to programs and to people."""
    result = run("reliability", "circuit-breaker", "--json", TMPDIR=str(tmp_path))
    (document,) = documents(result.stdout)
    assert _failed(document) == []
    assert result.returncode == 0, result.stderr
    (scenario,) = document["scenarios"]
    assert scenario["scenario"] == "circuit-breaker"
    assert scenario["ok"] is document["ok"] is document["private"] is True
    assert {step["ok"] for step in scenario["steps"]} == {True}
    assert document["delivery_rate"] == 1.0
    assert document["taken_over"] == document["delivered"] > 0
    for step in scenario["steps"]:
        assert f"expected  {step['expected']}" in result.stderr
        assert f"seen      {step['seen']}" in result.stderr
    assert left_behind(tmp_path) == []


def test_a_broker_of_yours_is_not_harmed(rabbitmq_vhost: VirtualHost) -> None:
    """With RABBITMQ_URL set harmful steps are skipped and named; nothing is left on the broker."""
    node, name = rabbitmq_vhost.node, rabbitmq_vhost.name
    before = node.ctl("--quiet", "list_exchanges", "-p", name)
    pid = node.pid
    result = run("reliability", "--json", url=rabbitmq_vhost.url)
    (document,) = documents(result.stdout)
    assert _failed(document) == []
    assert result.returncode == 0, result.stderr
    assert document["private"] is False
    assert document["taken_over"] == 0
    steps = [step for each in document["scenarios"] for step in each["steps"]]
    assert [step["done"] for step in steps if step["ok"]]
    assert {step["seen"] for step in steps if step["ok"] is None} == {
        "needs a broker and queues that may be harmed: unset RABBITMQ_URL"
    }
    assert node.pid == pid
    assert node.ctl("--quiet", "list_queues", "-p", name).split()[1:] == []
    assert node.ctl("--quiet", "list_exchanges", "-p", name) == before


def test_a_broker_that_is_away_fails(tmp_path: Path) -> None:
    """Where nothing answers the steps fail, each with its reason, and so does the command."""
    url = "amqp://u:password@127.0.0.1:1/"
    result = run("reliability", "health-checks", "--json", url=url)
    assert result.returncode == 1
    (document,) = documents(result.stdout)
    assert document["ok"] is False
    assert [seen for _, seen in _failed(document)] == ["no connection within 10 s"]


@pytest.mark.slow
def test_all_of_them() -> None:
    """All scenarios end in under three minutes, and all that was taken over is delivered."""
    with in_time(MINUTES):
        result = run("reliability", "all", "--json", limit=2 * MINUTES)
    (document,) = documents(result.stdout)
    assert _failed(document) == []
    assert result.returncode == 0, result.stderr
    assert [each["scenario"] for each in document["scenarios"]] == list(SCENARIOS)
    assert all(step["ok"] for each in document["scenarios"] for step in each["steps"])
    assert document["taken_over"] == document["delivered"] > 1000
    assert document["leaked"] == 0
    assert document["longest_publish"] < 1.25
