"""The benchmarks' own parts work, and what a message costs has not grown."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest

from benchmarks.__main__ import main
from benchmarks.contestants.work import ROUTING_KEY
from benchmarks.harness import PIPELINED
from benchmarks.lab import C_HEADERS, OURS, QUICK, Broker, C, Lab
from benchmarks.report import Figure, Report, at_least, at_most, ratios
from benchmarks.storm import STRATEGIES, Scenario, simulate
from benchmarks.suite import NAMES, guard
from mlproducer.testing.plugin import VirtualHost

COUNT = 2

COST = """
from contextlib import closing
from benchmarks.suite import guard
from benchmarks.way import Way
with closing(Way()) as way:
    print(guard.calls_per_message(way), guard.instructions_per_message(way))
"""


def test_cost_of_a_message() -> None:
    """A message makes no more calls, and takes no more instructions, than it used to.

    In a process of its own: Celery or OpenTelemetry, imported by another test, cost calls too.
    """
    counted = subprocess.run(
        [sys.executable, "-c", COST], capture_output=True, text=True, check=True, timeout=60
    )
    calls, instructions = map(float, counted.stdout.split())
    assert calls <= guard.MAX_CALLS
    assert instructions <= guard.MAX_INSTRUCTIONS


def test_ratio_round_by_round() -> None:
    """The verdict is the median's, and each ratio is one round's."""
    figure = Figure("rate", ratios([8, 2, 6], [4, 4, 4]), target=at_least(1.5))
    assert figure.values == [2.0, 0.5, 1.5]
    assert figure.verdict == "met"
    assert Figure("rate", [1.6, 1.4, 1.2], target=at_least(1.5)).verdict == "missed"
    assert Figure("p50", [1.0], target=at_most(1.05)).verdict == "met"


def test_table_is_a_simple_table() -> None:
    """Each column is as wide as its widest cell, so that the README can take the table as it is."""
    report = Report(figures=[Figure("rate", [1234.5], "1/s")], notes=["a note"])
    rule, head, _, row, end, note = report.table().splitlines()
    assert rule == end
    assert len(head.rstrip()) <= len(rule)
    assert row.split() == ["rate", "1,234", "1,234", "1,234", "1/s"]
    assert note == "  a note"


def test_storm_brings_all_back() -> None:
    """Every producer is connected in the end, and no sooner than the broker can take them."""
    scenario = Scenario(producers=300, outage=2.0, capacity=100)
    for name, delay in STRATEGIES.items():
        storm = simulate(scenario, delay, seed=1)
        assert len(storm.back) == scenario.producers, name
        assert min(storm.back) >= 0.0
        assert storm.back_within(1.0) >= 2.0  # 100 at once, then 100 a second
        assert sum(storm.slots) >= scenario.producers


def test_storm_without_jitter_is_a_herd() -> None:
    """Without jitter all come in the same moment; jitter spreads them."""
    scenario = Scenario(producers=300, outage=5.0)
    assert simulate(scenario, STRATEGIES["no jitter"], seed=1).peak == 300
    assert simulate(scenario, STRATEGIES["full jitter"], seed=1).peak < 300


def test_command_writes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the table and writes the figures, with machine and versions."""
    assert main(["guard", "--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"]["guard"]["figures"][0]["unit"] == "calls/message"
    assert "mlproducer" in results["packages"]
    assert "instructions" in capsys.readouterr().out


def test_command_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no benchmark is a usage error, which says which ones there are."""
    with pytest.raises(SystemExit) as ended:
        main(["nothing"])
    assert ended.value.code == 2
    assert "no such benchmark: nothing" in capsys.readouterr().err


@pytest.mark.broker
def test_contestants_alternate_on_a_broker(tmp_path: Path) -> None:
    """A contest starts its own node, and gives one ratio for each round."""
    assert main(["single", "--rounds", "2", "--seconds", "0.1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    ratio = results["benchmarks"]["single"]["figures"][0]
    assert len(ratio["values"]) == 2
    assert ratio["median"] > 0


@pytest.fixture
def contest(rabbitmq_vhost: VirtualHost) -> dict[str, list[pika.BasicProperties]]:
    """What our own contestant and both of C published: the properties, by their names."""
    url = rabbitmq_vhost.url
    with Lab(QUICK) as lab, closing(Broker("the shared node", url)):
        return {name: _published(lab, name, url) for name in (OURS, C, C_HEADERS)}


def _published(lab: Lab, name: str, url: str) -> list[pika.BasicProperties]:
    contestant = lab.contestant(name, url=url)
    if contestant is None:
        pytest.skip(lab.notes[0])
    with contestant:
        contestant.ask(way=PIPELINED, count=COUNT, workers=1)
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        found = [channel.basic_get(ROUTING_KEY, auto_ack=True)[1] for _ in range(COUNT)]
    for each in found:
        (each.headers or {}).pop("x-delivery-count", None)  # the quorum queue's own
    return found


@pytest.mark.broker
def test_c_publishes_our_headers(contest: dict[str, list[pika.BasicProperties]]) -> None:
    """C's second contestant sends the headers and properties that we do, with ids of its own."""
    ours, theirs = contest[OURS], contest[C_HEADERS]
    assert [_without_ids(each) for each in theirs] == [_without_ids(each) for each in ours]
    assert len({each.message_id for each in theirs}) == COUNT


@pytest.mark.broker
def test_c_publishes_raw_bodies(contest: dict[str, list[pika.BasicProperties]]) -> None:
    """C's first contestant, which the targets are about, sends no headers."""
    for each in contest[C]:
        assert _set(each) == {"content_type": "application/json", "delivery_mode": 2}


def _set(properties: pika.BasicProperties) -> dict[str, Any]:
    return {name: value for name, value in vars(properties).items() if value}


def _without_ids(properties: pika.BasicProperties) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the properties, and the headers in order, as they are whatever the id and process."""
    message_id = properties.message_id
    assert len(message_id) == 36
    found = _set(properties)
    headers = found.pop("headers")
    headers["origin"] = re.sub(r"^gen\d+@", "gen@", headers["origin"])
    for ids in (found, headers):
        ids.update({name: "its id" for name, value in ids.items() if value == message_id})
    return found, list(headers.items())


def test_every_benchmark_has_a_title_and_a_run() -> None:
    """Each name is a module with a one-line title and ``run``."""
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.suite.{name}")
        assert (module.__doc__ or "").partition("\n")[0].endswith("."), name
        assert callable(module.run)
