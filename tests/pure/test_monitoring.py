"""The dashboard and the alert rules against the catalog of metrics, and the command."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlproducer._core.states import ConnectionState
from mlproducer.cli import main
from mlproducer.monitoring import ALERTS_FILE, DASHBOARD_FILE, files
from mlproducer.observe import producer_metrics
from mlproducer.observe.metric_families import FAMILIES, Kind
from tests.pure.tables import each_row

BY_SERIES = {
    f"{family.name}{suffix}": family
    for family in FAMILIES
    for suffix in (("_bucket", "_sum", "_count") if family.kind is Kind.HISTOGRAM else ("",))
}
"""The family of each series that Prometheus can be asked for."""

DASHBOARD: dict[str, Any] = json.loads(files()[DASHBOARD_FILE])
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
QUERIES = [target["expr"] for target in TARGETS]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def alerts() -> list[tuple[str, str, str]]:
    """Read the name, the query and the patience of each alert out of the rule file."""
    rule = (
        r'- alert: (\w+)\n +expr: (".*")\n +for: (\w+)\n +labels:\n +severity: \w+\n +annotations:'
    )
    found = re.findall(rule, files()[ALERTS_FILE])
    return [(name, json.loads(expr), patience) for name, expr, patience in found]


def series_of(query: str) -> Iterator[str]:
    """Yield the series that a query asks for."""
    yield from re.findall(r"\bml_\w+", query)


# --- the alerts --------------------------------------------------------------------------------


SUCCESSES = (
    'sum without (task_type, status) (increase(ml_producer_tasks_sent_total{status="success"}[1m]))'
)


def test_alerts_are_the_documented_ones() -> None:
    """Names, queries and patience, by the documented names and not by the catalog."""
    assert alerts() == [
        ("MLProducerHighRetryQueueSize", "ml_producer_retry_queue_size > 100", "5m"),
        ("MLProducerRetryQueueHigh", "ml_producer_retry_queue_size > 50", "5m"),
        (
            "MLProducerCircuitBreakerOpen",
            "max_over_time(ml_producer_circuit_breaker_open[1m]) == 1",
            "2m",
        ),
        ("MLProducerConnectionUnhealthy", "ml_producer_connection_state != 3", "2m"),
        ("MLProducerDisconnected", "ml_producer_connection_state < 3", "3m"),
        ("MLProducerOutboxLate", "ml_producer_outbox_oldest_seconds > 60", "2m"),
        ("MLProducerOutboxLong", "ml_producer_outbox_rows > 10000", "5m"),
        (
            "MLProducerNotConfirming",
            f"increase(ml_producer_confirm_timeouts_total[2m]) > 0 unless {SUCCESSES} > 0",
            "2m",
        ),
    ]


def test_each_alert_says_what_to_do() -> None:
    """Summary, description and action are there, as texts that any YAML reader takes."""
    lines = files()[ALERTS_FILE].splitlines()
    for name in ("summary", "description", "action"):
        texts = [line.partition(": ")[2] for line in lines if line.strip().startswith(f"{name}: ")]
        assert len(texts) == len(alerts())
        assert all(len(json.loads(text)) > 20 for text in texts)
        assert all(text.isascii() for text in texts)


# --- the dashboard -----------------------------------------------------------------------------


def test_rows_of_the_dashboard() -> None:
    """Its title and rows, in the order in which an operator looks for a fault."""
    assert DASHBOARD["title"] == "ML Producer Monitoring"
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        "Connection",
        "Delivery",
        "Latency percentiles",
        "Retries and dead letters",
        "Circuit breaker",
        "Back-pressure",
    ]


def test_every_panel_asks_the_chosen_data_source() -> None:
    """The data source is a variable, and nothing asks another one."""
    first = DASHBOARD["templating"]["list"][0]
    assert (first["type"], first["query"], first["name"]) == (
        "datasource",
        "prometheus",
        "datasource",
    )
    assert all(each["datasource"] == SOURCE for each in [*PANELS, *TARGETS])


def test_every_panel_explains_itself() -> None:
    """A title of its own, a description, a unit, and a name for each line."""
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    assert all(panel["description"].endswith(".") for panel in PANELS)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert all(target["legendFormat"] for target in TARGETS)


def test_panels_do_not_overlap() -> None:
    """Each has a number and a place of its own, within the 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert columns.stop <= 24
        assert not cells & taken
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_states_have_the_words_of_the_code() -> None:
    """Numbers of states are shown as the words that the library has for them."""
    assert words_of("Connection state") == {
        str(state.value): state.name.lower() for state in ConnectionState
    }
    assert words_of("Breaker state") == {
        str(number): state.name.lower().replace("_", "-")
        for state, number in producer_metrics._CIRCUIT_NUMBERS.items()
    }


def words_of(title: str) -> dict[str, str]:
    """Return the words that a panel shows for numbers."""
    (panel,) = (panel for panel in PANELS if panel["title"] == title)
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    return {number: shown["text"] for number, shown in mapping["options"].items()}


def test_an_alert_names_the_states_of_the_code() -> None:
    """The text that is chosen by the number of a state is that of the state."""
    for number, word in re.findall(r"if eq \$value (\d)\.0 }}(\w+)", files()[ALERTS_FILE]):
        assert ConnectionState(int(number)).name.lower() == word


# --- both against the catalog ------------------------------------------------------------------


def test_queries_ask_for_what_there_is() -> None:
    """Each series, label and word of a query is of a family; only counters have a rate."""
    each_row([*QUERIES, *(expr for _, expr, _ in alerts())], asks_for_what_there_is)


def asks_for_what_there_is(query: str) -> None:
    """Look a query's words up in the catalog."""
    found = list(series_of(query))
    assert found
    assert set(found) <= set(BY_SERIES)
    counted = re.findall(r"(?:rate|increase)\((\w+)", query)
    for name in found:
        is_gauge = BY_SERIES[name].kind is Kind.GAUGE
        assert is_gauge != (name in counted) or f"sum({name})" in query
    for name in re.findall(r"histogram_quantile\(.*?rate\((\w+)", query):
        assert name.endswith("_bucket")
    family = BY_SERIES[found[0]]
    for labels in re.findall(r"by \(([^)]*)\)", query):
        assert set(labels.split(", ")) <= {*family.labels, "le"}
    for labels, name in re.findall(r"without \(([^)]*)\) \(increase\((\w+)", query):
        assert tuple(labels.split(", ")) == BY_SERIES[name].labels
    for name, label, word in re.findall(r'(\w+)\{(\w+)!?="(\w+)"\}', query):
        assert word in BY_SERIES[name].words[label]


def test_lines_are_named_by_labels_that_they_have() -> None:
    """A legend's label is one that the query keeps."""
    for target in TARGETS:
        expr = target["expr"]
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            kept = re.search(r"by \(([^)]*)\)", expr)
            assert label in (kept[1].split(", ") if kept else ["instance"]), expr


def test_panels_are_not_empty_before_the_first_event() -> None:
    """A series with labels is there once it has counted; until then a query falls back."""
    for query in QUERIES:
        if any(BY_SERIES[name].labels for name in series_of(query)):
            assert re.search(r" or on\(\) \((?:0|NaN) \* sum\((\w+)\)\)$", query), query
            assert not BY_SERIES[re.findall(r"\* sum\((\w+)\)", query)[-1]].labels


def test_every_family_is_drawn() -> None:
    """The dashboard leaves out nothing of what is measured."""
    drawn = {BY_SERIES[name] for query in QUERIES for name in series_of(query)}
    assert drawn == set(FAMILIES)


@pytest.mark.parametrize(
    "query",
    [
        "ml_producer_no_such_total",
        "sum by (state) (rate(ml_producer_tasks_sent_total[5m]))",
        'rate(ml_producer_tasks_sent_total{status="sucess"}[5m])',
        'rate(ml_producer_nacks_total{status="success"}[5m])',
        "rate(ml_producer_pending_confirms[5m])",
        "ml_producer_nacks_total",
        "histogram_quantile(0.5, sum by (le) (rate(ml_producer_nacks_total[5m])))",
        "max by (queue) (ml_producer_queue_depth)",
    ],
)
def test_wrong_queries_are_found(query: str) -> None:
    """A query that could never be answered does not pass the check above."""
    with pytest.raises((AssertionError, KeyError)):
        asks_for_what_there_is(query)


# --- the command -------------------------------------------------------------------------------


def export(directory: Path, *options: str) -> int:
    """Run the command, and return its exit code."""
    return main(["monitoring", "export", str(directory), *options])


def names(directory: Path) -> set[str]:
    """Return the names of a directory's files, hidden ones too."""
    return {path.name for path in directory.iterdir()}


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Read what a program is told: what came of each file."""
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {each["for"] for each in told["files"]} == {"grafana", "prometheus"}
    return {Path(each["path"]).name: each["result"] for each in told["files"]}


def test_export_writes_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes the directory, writes the files, readable as others are, and says where they are."""
    directory = tmp_path / "a" / "b"
    assert export(directory) == 0
    printed = capsys.readouterr().out
    assert names(directory) == {DASHBOARD_FILE, ALERTS_FILE}
    (tmp_path / "other").touch()
    for name, text in files().items():
        assert (directory / name).read_text(encoding="utf-8") == text
        assert str(directory / name) in printed
        assert (directory / name).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_export_again_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that say the same are left alone, and are no failure."""
    assert export(tmp_path, "--json") == 0
    assert results(capsys) == {DASHBOARD_FILE: "written", ALERTS_FILE: "written"}
    before = _written(tmp_path / ALERTS_FILE)
    assert export(tmp_path, "--json") == 0
    assert results(capsys) == {DASHBOARD_FILE: "unchanged", ALERTS_FILE: "unchanged"}
    assert _written(tmp_path / ALERTS_FILE) == before


def _written(path: Path) -> tuple[int, ...]:
    """Return what a write would change; reading changes the time of access."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def test_export_keeps_what_was_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that differs is named, nothing is written, the exit code is 1; --force replaces it."""
    (tmp_path / ALERTS_FILE).write_text("groups: []\n")
    assert export(tmp_path, "--json") == 1
    captured = capsys.readouterr()
    assert f"{ALERTS_FILE}: differs from what would be written" in captured.err
    assert "--force" in json.loads(captured.out)["error"]
    assert names(tmp_path) == {ALERTS_FILE}
    assert (tmp_path / ALERTS_FILE).read_text() == "groups: []\n"

    assert export(tmp_path, "--json", "--force") == 0
    assert results(capsys) == {DASHBOARD_FILE: "written", ALERTS_FILE: "replaced"}
    assert (tmp_path / ALERTS_FILE).read_text() == files()[ALERTS_FILE]


def test_export_writes_through_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither one under its temporary name, if that was guessed, nor one under the file's own."""
    victim = tmp_path / "victim"
    victim.write_text("root's")
    directory = tmp_path / "directory"
    directory.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda _count: "guessed")
    (directory / f".{DASHBOARD_FILE}.guessed").symlink_to(victim)
    assert export(directory) == 1
    assert "File exists" in capsys.readouterr().err
    monkeypatch.undo()
    (directory / ALERTS_FILE).unlink(missing_ok=True)
    (directory / ALERTS_FILE).symlink_to(victim)
    assert export(directory, "--force") == 1
    assert "is a symbolic link" in capsys.readouterr().err
    (directory / ALERTS_FILE).unlink()
    os.mkfifo(directory / ALERTS_FILE)
    assert export(directory, "--force") == 1
    assert "is not a regular file" in capsys.readouterr().err
    assert victim.read_text() == "root's"


def test_export_keeps_mode_and_owner(tmp_path: Path) -> None:
    """What is replaced stays readable for those who could read it, and for no others."""
    path = tmp_path / ALERTS_FILE
    path.write_text("edited")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    before = path.stat()
    assert export(tmp_path, "--force") == 0
    after = path.stat()
    assert path.read_text() != "edited"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


def test_export_names_a_directory_in_a_files_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``--force`` too it stays, and nothing is written."""
    (tmp_path / ALERTS_FILE).mkdir()
    assert export(tmp_path, "--force") == 1
    assert f"{tmp_path / ALERTS_FILE}: exists and is not a regular file" in capsys.readouterr().err
    assert names(tmp_path) == {ALERTS_FILE}


@pytest.mark.parametrize("name", ["", ALERTS_FILE, f"{ALERTS_FILE}/below"])
def test_export_to_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A directory that is a file, or lies below one, is named, with exit code 1."""
    (tmp_path / "file").touch()
    assert export(tmp_path / "file" / name) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(tmp_path / "file") in captured.err
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize(
    "argv", [[], ["export"], ["export", ""], ["export", "a", "b"], ["nosuch"]], ids=" ".join
)
def test_bad_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a directory, or with an empty one, nothing is written to the current one."""
    assert main(["monitoring", *argv]) == 2
    assert "usage: mlproducer" in capsys.readouterr().err
