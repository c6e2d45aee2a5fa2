"""A private Prometheus that scrapes and evaluates each second.

Needs Debian's package ``prometheus``, whose own service is left alone.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from attrs import frozen

from mlproducer.testing.erlang import free_port
from mlproducer.testing.workspace import Program, Workspace

LIMIT = 120.0
"""Seconds after which a test stops waiting for what ought to come."""

LOOK_INTERVAL = 0.1

HISTORY = 300
"""Seconds that no test takes."""


@frozen
class Alert:
    """An alert that is pending or firing."""

    name: str
    state: str
    annotations: Mapping[str, str]


class Prometheus:
    """One instance, for the length of a ``with`` block, in a directory of its own.

    :param port: of 127.0.0.1, whose ``/metrics`` is scraped
    :param rules: the text of a rule file
    """

    def __init__(self, port: int, rules: str) -> None:
        self._target = f"127.0.0.1:{port}"
        self._rules = rules
        self._address = f"127.0.0.1:{free_port()}"
        self._workspace = Workspace("mlproducer-prometheus-")
        self._program: Program | None = None

    def __enter__(self) -> Prometheus:
        try:
            self._start()
        except BaseException:
            self._workspace.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._workspace.close()

    def get(self, path: str, **parameters: str) -> Any:
        """Ask the HTTP API (Prometheus documentation, *HTTP API*), and return the data."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=LIMIT) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert found["status"] == "success", found
        assert "warnings" not in found, found
        return found["data"]

    def value(self, query: str) -> float | None:
        """Return the one value that a query has now, if it has any."""
        found = self.get("query", query=query)["result"]
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None

    def times(self, series: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return the labels of each series, and the times of all its samples, in seconds."""
        found = self.get("query", query=f"{series}[{HISTORY}s]")["result"]
        return [(each["metric"], [at for at, _ in each["values"]]) for each in found]

    def numbers(self, query: str) -> list[float]:
        """Return all values that a query had from second to second, but for NaN."""
        now = time.time()
        span = {"start": str(now - HISTORY), "end": str(now), "step": "1"}
        found = self.get("query_range", query=query, **span)["result"]
        values = [float(value) for series in found for _, value in series["values"]]
        return [value for value in values if not math.isnan(value)]

    def alerts(self) -> list[Alert]:
        """Return the alerts that are pending or firing."""
        return [
            Alert(each["labels"]["alertname"], each["state"], each["annotations"])
            for each in self.get("alerts")["alerts"]
        ]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {alert.name for alert in self.alerts() if alert.state == "firing"}

    def wait_until(self, holds: Callable[[], bool], limit: float = LIMIT) -> None:
        """Look again and again until it holds."""
        assert self._program is not None
        deadline = time.monotonic() + limit
        while not holds():
            ended = self._program.ended_within(LOOK_INTERVAL)
            assert not ended, self._program.log_tail()
            assert time.monotonic() < deadline, self.alerts()

    def _start(self) -> None:
        program = shutil.which("prometheus")
        assert program is not None, "not installed: apt-get install -y prometheus"
        directory = self._workspace.path
        (directory / "rules.yml").write_text(self._rules)
        (directory / "prometheus.yml").write_text(json.dumps(self._configuration()))
        argv = [program, f"--config.file={directory / 'prometheus.yml'}"]
        argv += [f"--storage.tsdb.path={directory / 'data'}"]
        argv += [f"--web.listen-address={self._address}", "--log.level=warn"]
        self._program = self._workspace.spawn("prometheus", argv, os.environ)
        self.wait_until(self._ready)

    def _configuration(self) -> dict[str, Any]:
        targets = [{"targets": [self._target]}]
        return {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "mlproducer", "static_configs": targets}],
        }

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=LIMIT):
                return True
        except OSError:
            return False


def promtool(*arguments: str, directory: Path) -> str:
    """Run ``promtool``, see that it is content, and return what it printed."""
    program = shutil.which("promtool")
    assert program is not None, "not installed: apt-get install -y prometheus"
    ended = subprocess.run(
        [program, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
