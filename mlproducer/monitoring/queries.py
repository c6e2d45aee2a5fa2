"""Words of PromQL, put together from families of the catalog.

A label that a family does not have, or a word that is not in a label's closed set, is refused when
the query is made. Every query answers wherever a producer is scraped: what has series only once
something has happened falls back to "none so far" (0), or to "not known" (NaN), and never where no
producer is scraped at all.

Runs on: any thread.
"""

from __future__ import annotations

from mlproducer.observe import metric_families as catalog
from mlproducer.observe.metric_families import Family, Kind

WINDOW = "$__rate_interval"
"""Grafana's own choice: long enough for four scrapes, and for one point of the graph."""

NONE, UNKNOWN = "0", "NaN"
"""What is shown where a family has no series yet."""

_ALWAYS_THERE = catalog.NACKS
"""Has no label, and so has its series from a process's start, with prefork workers too."""


def gauge(family: Family) -> str:
    """Give the readings of every scraped process."""
    _check(family, Kind.GAUGE)
    return family.name


def greatest(family: Family, *by: str) -> str:
    """Give a gauge's greatest reading for each value of the labels ``by``."""
    _check(family, Kind.GAUGE, *by)
    return _or_else(family, UNKNOWN, f"max{_by(by)}({family.name})")


def grown(family: Family, within: str, *apart: str, status: str = "") -> str:
    """Give what a counter has grown by within a time, in each scraped process.

    :param within: such as ``1m``
    :param apart: all labels of the family, whose series are added up
    """
    increase = f"increase({_counted(family, apart, status)}[{within}])"
    return f"sum without ({', '.join(apart)}) ({increase})" if apart else increase


def rate(family: Family, *by: str, status: str = "") -> str:
    """Give what a counter, or a histogram's count, has grown by per second.

    :param by: a series for each value of these labels
    :param status: a condition on the label ``status``, such as ``!="success"``
    """
    return _or_else(family, NONE, f"sum{_by(by)}(rate({_counted(family, by, status)}[{WINDOW}]))")


def increase(family: Family, *by: str) -> str:
    """Give what a counter has grown by within the window; not whole, since it is extrapolated."""
    return _or_else(family, NONE, f"sum{_by(by)}(increase({_counted(family, by, '')}[{WINDOW}]))")


def total_rate(family: Family) -> str:
    """Give what the sum of a histogram has grown by per second, in its unit."""
    _check(family, Kind.HISTOGRAM)
    return _or_else(family, NONE, f"sum(rate({family.name}_sum[{WINDOW}]))")


def quantile(share: float, family: Family, *by: str, status: str = "") -> str:
    """Give the value of a histogram that a share of the observations stays below."""
    _check(family, Kind.HISTOGRAM, *by)
    buckets = f"{family.name}_bucket{_condition(family, status)}"
    within = f"sum{_by((*by, 'le'))}(rate({buckets}[{WINDOW}]))"
    return _or_else(family, UNKNOWN, f"histogram_quantile({share:g}, {within})")


def share(part: str, whole: str) -> str:
    """Divide, where there is something to divide by; give 0 where there is not."""
    return f"({part}) / (({whole}) > 0) or on() ({_placeholder(NONE)})"


def _counted(family: Family, by: tuple[str, ...], status: str) -> str:
    _check(family, family.kind, *by)
    if family.kind is Kind.GAUGE:
        raise ValueError(f"{family.name} is a gauge, which has no rate")
    suffix = "_count" if family.kind is Kind.HISTOGRAM else ""
    return f"{family.name}{suffix}{_condition(family, status)}"


def _condition(family: Family, status: str) -> str:
    if not status:
        return ""
    _check(family, family.kind, "status")
    word = status.lstrip("!=").strip('"')
    if word not in family.words["status"]:
        raise ValueError(f"{family.name} has no status {word!r}")
    return f"{{status{status}}}"


def _check(family: Family, kind: Kind, *labels: str) -> None:
    if family.kind is not kind:
        raise ValueError(f"{family.name} is a {family.kind.value}, and not a {kind.value}")
    for label in labels:
        if label not in family.labels:
            raise ValueError(f"{family.name} has no label {label!r}")


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _or_else(family: Family, nothing: str, query: str) -> str:
    return f"{query} or on() ({_placeholder(nothing)})" if family.labels else query


def _placeholder(value: str) -> str:
    return f"{value} * sum({_ALWAYS_THERE.name})"
