"""Metrics for Prometheus: one set of families in each registry, however many producers share it.

In the usual mode a collector gives the counts and readings of this process whenever it is asked.
Where the variable ``PROMETHEUS_MULTIPROC_DIR`` names a directory, prometheus-client adds up what
the processes of one machine write into files there, and each process has one set. Its gauges are
then written each second; ``connection_state`` not before a producer is in use, since a process that
merely has one, such as the master of prefork workers, says nothing about any connection.

Runs on: the threads that count, and the one that scrapes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from mlproducer import forks
from mlproducer.observe.catalog import (
    CONNECTION_STATE,
    FAMILIES,
    PREFIX,
    Family,
    Kind,
    Merge,
)
from mlproducer.observe.meter import Meter
from mlproducer.observe.tally import Labels, Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR" in os.environ
"""Whether prometheus-client, which looks once, has found itself in multiprocess mode."""


def meter(registry: CollectorRegistry | None = None) -> Meter:
    """Give the meter of a registry, with its families registered.

    :param registry: ``None`` is prometheus-client's default one
    :raises ValueError: somebody else has registered a metric of one of our names
    """
    if MULTIPROCESS:
        return _file_meter()
    registry = REGISTRY if registry is None else registry
    fresh = _Collector(Tally())
    collector = _collectors.setdefault(registry, fresh)
    if collector is fresh:
        try:
            registry.register(fresh)
        except ValueError:
            del _collectors[registry]
            raise
    return collector.meter


def exposition(registry: CollectorRegistry | None = None) -> bytes:
    """Give everything in a registry, or in all processes' files, in Prometheus's text format."""
    return generate_latest(_source(registry))


def samples(
    registry: CollectorRegistry | None = None,
) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Give the name, labels and value of each of our series."""
    for metric in _source(registry).collect():
        if metric.name.startswith(PREFIX):
            for sample in metric.samples:
                yield sample.name, sample.labels, sample.value


def _source(registry: CollectorRegistry | None) -> CollectorRegistry:
    if not MULTIPROCESS:
        return REGISTRY if registry is None else registry
    source = CollectorRegistry()
    MultiProcessCollector(source)  # type: ignore[no-untyped-call]
    return source


class _Collector:
    """Gives the counts and readings of this process when it is asked."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.meter = Meter(tally)

    def describe(self) -> Iterable[Metric]:
        """Give the families without their series."""
        return [_metric(family, {}) for family in FAMILIES]

    def collect(self) -> Iterable[Metric]:
        """Give the families."""
        found = {**self._tally.totals(), **self._readings()}
        return [_metric(family, found[family]) for family in FAMILIES]

    def forked(self) -> None:
        """Start from zero, in a child process whose parent goes on counting."""
        self._tally.clear()
        self.meter.forked()

    def _readings(self) -> Mapping[Family, Mapping[Labels, list[float]]]:
        readings = self.meter.readings()
        return {
            family: {labels: [value] for labels, value in series.items()}
            for family, series in readings.items()
        }


def _metric(family: Family, series: Mapping[Labels, list[float]]) -> Metric:
    if family.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, cells in series.items():
            histogram.add_metric(labels, _cumulated(family, cells), cells[-1])
        return histogram
    simple = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    metric = simple(family.name, family.help, labels=family.labels)
    for labels, cells in series.items():
        metric.add_metric(labels, cells[0])
    return metric


def _cumulated(family: Family, cells: list[float]) -> list[tuple[str, float]]:
    bounds = [*map(floatToGoString, family.buckets), "+Inf"]
    return [(bound, sum(cells[: n + 1])) for n, bound in enumerate(bounds)]


class _Files:
    """Series in the files of prometheus-client's multiprocess mode.

    A gauge that shows the least of all is made when it is first written, since its file says 0
    until then.
    """

    def __init__(self) -> None:
        self._families = {
            family: _shared(family) for family in FAMILIES if family.merge is not Merge.LEAST
        }
        self._series: dict[tuple[Family, Labels], _File] = {}

    def series(self, family: Family, labels: Labels = ()) -> _File:
        """Give the series with these labels, the same one each time."""
        found = self._series.get((family, labels))
        if found is None:
            parent = self._families.get(family)
            if parent is None:
                parent = self._families.setdefault(family, _shared(family))
            child = parent.labels(*labels) if labels else parent
            found = self._series.setdefault((family, labels), _File(child))
        return found


class _File:
    """A series in a file.

    :param child: prometheus-client's counter, histogram or gauge
    """

    def __init__(self, child: Any) -> None:
        self._child = child

    def inc(self, amount: int = 1) -> None:
        """Add to a counter."""
        self._child.inc(amount)

    def observe(self, amount: float) -> None:
        """Add a value to a histogram."""
        self._child.observe(amount)

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Add values to a histogram."""
        for amount in amounts:
            self._child.observe(amount)

    def set(self, value: float) -> None:
        """Say what a gauge shows."""
        self._child.set(value)


def _shared(family: Family) -> Any:
    if family.kind is Kind.COUNTER:
        return Counter(family.name, family.help, family.labels, registry=None)
    if family.kind is Kind.HISTOGRAM:
        return Histogram(
            family.name, family.help, family.labels, registry=None, buckets=family.buckets
        )
    mode: Any = f"live{family.merge.value}"
    return Gauge(family.name, family.help, family.labels, registry=None, multiprocess_mode=mode)


class _FileMeter(Meter):
    """The meter of a process, whose gauges are written down."""

    def __init__(self, files: _Files) -> None:
        super().__init__(files)
        self._files = files

    def refresh(self) -> None:
        """Write the gauges, again if a connection has moved meanwhile.

        Who moved it has written that before; ours would stand above it for a second.
        """
        written, readings = None, self.readings()
        while readings[CONNECTION_STATE] != written:
            for family, series in readings.items():
                for labels, value in series.items():
                    self._files.series(family, labels).set(value)
            written, readings = readings[CONNECTION_STATE], self.readings()


@lru_cache(1)
def _file_meter() -> _FileMeter:
    return _FileMeter(_Files())


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()


def _in_child() -> None:
    for collector in list(_collectors.values()):
        collector.forked()
    if _file_meter.cache_info().currsize:
        _file_meter().forked()


forks.in_child(_in_child)
