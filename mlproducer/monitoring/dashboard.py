"""The dashboard as Grafana imports it (Grafana documentation, *JSON model*).

Knows Grafana's words and the grid; what is shown stands in `mlproducer.monitoring.panels`. Panels
ask the data source that the reader has chosen, by a variable. A second variable is Grafana's own
filter, which adds conditions on labels, such as the job or the instance, to every query.

Runs on: any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlproducer.monitoring.panels import ROWS, Panel, Query

TITLE = "ML Producer Monitoring"
UID = "mlproducer-monitoring"

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
PANEL_HEIGHT = 8

SCHEMA_VERSION = 36
"""Grafana 9.0's; later ones convert it when they load the dashboard."""


def dashboard() -> dict[str, Any]:
    """Give the JSON model."""
    return {
        "title": TITLE,
        "uid": UID,
        "description": "RabbitMQ producers of the Python library mlproducer.",
        "tags": ["mlproducer", "rabbitmq"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "options": [],
        "regex": "",
        "refresh": 1,
        "hide": 0,
        "includeAll": False,
        "multi": False,
    }
    filters = {
        "name": "filters",
        "label": "Filters",
        "type": "adhoc",
        "datasource": SOURCE,
        "filters": [],
        "hide": 0,
    }
    return [source, filters]


def _panels() -> Iterator[dict[str, Any]]:
    """Give rows and panels with numbers of their own, and places that do not overlap."""
    number, top = 0, 0
    for row in ROWS:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            "panels": [],
        }
        top, left = top + 1, 0
        for panel in row.panels:
            number += 1
            if left + panel.width > COLUMNS:
                top, left = top + PANEL_HEIGHT, 0
            place = {"x": left, "y": top, "w": panel.width, "h": PANEL_HEIGHT}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            left += panel.width
        top += PANEL_HEIGHT


def _panel(panel: Panel) -> dict[str, Any]:
    queries = zip("ABCDEFGH", panel.queries, strict=False)
    return {
        "type": "timeseries" if panel.words is None else "state-timeline",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "targets": [_target(letter, query) for letter, query in queries],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(letter: str, query: Query) -> dict[str, Any]:
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "editorMode": "code",
        "range": True,
    }


def _field(panel: Panel) -> dict[str, Any]:
    limits = ((None, "green"), *panel.limits)
    steps = [{"color": colour, "value": value} for value, colour in limits]
    field: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": _mappings(panel),
    }
    if panel.words is not None:
        return field
    style = "dashed" if panel.limits else "off"
    custom = {"fillOpacity": 10, "showPoints": "never", "thresholdsStyle": {"mode": style}}
    return {**field, "min": 0, "custom": custom}


def _mappings(panel: Panel) -> list[dict[str, Any]]:
    if panel.words is None:
        return []
    options = {
        str(number): {"text": word, "color": colour, "index": place}
        for place, (number, (word, colour)) in enumerate(panel.words.items())
    }
    return [{"type": "value", "options": options}]


def _options(panel: Panel) -> dict[str, Any]:
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom"}
    if panel.words is None:
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "legend": legend,
        "tooltip": {"mode": "single"},
        "showValue": "auto",
        "mergeValues": True,
        "rowHeight": 0.9,
    }
