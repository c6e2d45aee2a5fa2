"""The Grafana dashboard and the Prometheus alert rules, as files to be exported.

``mlproducer-dashboard.json`` can be edited in Grafana (9.0 or later) and exported from there.
``mlproducer-alerts.yml`` has its texts as JSON strings, which are YAML too, so that tests can read
it without a YAML library. A test holds both against `mlproducer.observe.metric_families`.

Queries of the dashboard answer wherever a producer is scraped: where a family has no series yet,
they fall back to 0 or NaN times the sum of a counter without labels, which has its series from the
start of a process.

Runs on: any thread.
"""

from __future__ import annotations

from importlib import resources

__all__ = ["ALERTS_FILE", "DASHBOARD_FILE", "files"]

DASHBOARD_FILE = "mlproducer-dashboard.json"
ALERTS_FILE = "mlproducer-alerts.yml"


def files() -> dict[str, str]:
    """Return the text of each file, by its name."""
    here = resources.files(__package__)
    return {
        name: here.joinpath(name).read_text(encoding="utf-8")
        for name in (DASHBOARD_FILE, ALERTS_FILE)
    }
