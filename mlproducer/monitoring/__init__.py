"""The Grafana dashboard and the Prometheus alert rules, made from the catalog of metrics.

Owns their file names and their texts. It must not know a producer: it speaks of series by the names
in `mlproducer.observe.metric_families`, and somebody else collects them. ``mlproducer monitoring
export`` writes the files.

Runs on: any thread.
"""

from __future__ import annotations

import json

from mlproducer.monitoring.alerts import rules
from mlproducer.monitoring.dashboard import dashboard

__all__ = ["ALERTS_FILE", "DASHBOARD_FILE", "files"]

DASHBOARD_FILE = "mlproducer-dashboard.json"
ALERTS_FILE = "mlproducer-alerts.yml"


def files() -> dict[str, str]:
    """Give the text of each file by its name; the same texts each time."""
    return {
        DASHBOARD_FILE: json.dumps(dashboard(), indent=2) + "\n",
        ALERTS_FILE: rules(),
    }
