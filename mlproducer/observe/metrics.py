"""Metrics for Prometheus: one set of families in each registry, however many producers share it.

Usually a collector returns the counts and gauges of this process when it is scraped. Where the
variable ``PROMETHEUS_MULTIPROC_DIR`` named a directory when prometheus-client was imported, that
library adds up what the processes of one machine write into files there, and each process has one
set of families. Gauges are then written each second; ``connection_state`` only once a producer is
in use: a process that merely has one, such as the master of prefork workers, has no connection to
report.

Runs on: the threads that count, and the one that scrapes.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from threading import get_ident
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    values,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from mlproducer import _forks as forks
from mlproducer.errors import ConfigurationError
from mlproducer.observe.counters import Labels, Tally
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.observe.metric_families import (
    CONNECTION_STATE,
    FAMILIES,
    PREFIX,
    Family,
    Kind,
    Merge,
)
from mlproducer.observe.producer_metrics import ProducerMetrics
from mlproducer.status import Status

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

MAX_WAITING = 100_000
"""Counts that may wait for the files; if more wait, their lock may never be released."""

MULTIPROCESS = bool(
    getattr(values.ValueClass, "_multiprocess", False)
    and (os.environ.get(DIRECTORY) or os.environ.get(DIRECTORY.lower()))
)
"""Whether prometheus-client writes into files, which it decided when it was imported."""


def meter(registry: CollectorRegistry | None = None) -> ProducerMetrics:
    """Return the meter of a registry, with its families registered, again where need be.

    :param registry: ``None`` is prometheus-client's default one
    :raises ValueError: another library has registered a metric of the same name
    :raises ConfigurationError: the directory of multiprocess mode cannot be used
    """
    if MULTIPROCESS:
        return _file_metrics()
    registry = REGISTRY if registry is None else registry
    fresh = _Collector(Tally())
    collector = _collectors.setdefault(registry, fresh)
    if collector is fresh:
        try:
            fresh.register(registry)
        except ValueError:
            del _collectors[registry]
            raise
    elif collector.was_unregistered(registry):
        collector.register(registry)
    return collector.meter


class UnreadableError(Exception):
    """The files of multiprocess mode cannot be read; the text says why."""


def exposition(registry: CollectorRegistry | None = None) -> bytes:
    """Return everything in a registry, or in all processes' files, in Prometheus' text format.

    :raises UnreadableError: the files cannot be read
    """
    with _source(registry) as source:
        return generate_latest(source)


def samples(
    registry: CollectorRegistry | None = None,
) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Yield name, labels and value of each series of this library.

    :raises UnreadableError: the files cannot be read
    """
    with _source(registry) as source:
        for metric in source.collect():
            if metric.name.startswith(PREFIX):
                for sample in metric.samples:
                    yield sample.name, sample.labels, sample.value


@contextmanager
def _source(registry: CollectorRegistry | None) -> Iterator[CollectorRegistry]:
    if not MULTIPROCESS:
        yield REGISTRY if registry is None else registry
        return
    if _file_metrics.cache_info().currsize:
        _file_metrics().catch_up()
    try:
        source = CollectorRegistry()
        MultiProcessCollector(source)  # type: ignore[no-untyped-call]
        yield source
    except (OSError, ValueError) as error:  # the directory was removed, or a file of it meanwhile
        raise UnreadableError(f"{DIRECTORY} cannot be read: {type(error).__name__}") from error


class _Collector:
    """Returns the counts and gauges of this process when it is scraped.

    Test runners and notebooks import the package a second time into a process, and a registry
    accepts each name once. So the collector of a later import replaces the earlier one, and adds
    that one's counts to its own.

    :ivar collects: marks a collector of this library, whichever import its class comes from
    """

    collects = PREFIX

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._earlier: Any = None
        self.meter = ProducerMetrics(tally)

    def register(self, registry: CollectorRegistry) -> None:
        """Register, in place of an earlier import's collector, if there is one.

        :raises ValueError: another library has registered a metric of the same name
        """
        earlier = _registered(registry)
        if getattr(earlier, "collects", None) == self.collects and earlier is not self:
            registry.unregister(earlier)
            self._earlier = earlier
        try:
            registry.register(self)
        except ValueError:
            if _registered(registry) is not self:  # else another thread was first
                raise

    def was_unregistered(self, registry: CollectorRegistry) -> bool:
        """Return whether nothing shows these metrics: fixtures of tests empty whole registries."""
        names = getattr(registry, "_names_to_collectors", None)
        return names is not None and CONNECTION_STATE.name not in names

    def describe(self) -> Iterable[Metric]:
        """Return the families without their series."""
        return [_metric(family, {}) for family in FAMILIES]

    def collect(self) -> Iterable[Metric]:
        """Return the families with their series."""
        found = {**self._tally.totals(), **self._readings()}
        metrics = [_metric(family, found[family]) for family in FAMILIES]
        if self._earlier is not None:
            before = {metric.name: metric for metric in self._earlier.collect()}
            for family, metric in zip(FAMILIES, metrics, strict=True):
                _join(metric, before.get(metric.name), family.merge)
        return metrics

    def forked(self) -> None:
        """Start from zero, in a forked child, whose parent continues counting."""
        self._tally.clear()
        self.meter.forked()

    def _readings(self) -> Mapping[Family, Mapping[Labels, list[float]]]:
        readings = self.meter.readings()
        return {
            family: {labels: [value] for labels, value in series.items()}
            for family, series in readings.items()
        }


def _registered(registry: CollectorRegistry) -> Any:
    """Return the collector that shows metrics of these names; ``None`` where that is not known."""
    return getattr(registry, "_names_to_collectors", {}).get(CONNECTION_STATE.name)


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


def _join(metric: Metric, before: Metric | None, merge: Merge) -> None:
    """Add an earlier import's samples to a metric: gauges by their merge, all others as a sum."""
    joined = {(each.name, *sorted(each.labels.items())): each for each in metric.samples}
    of_both = _MERGED[merge if metric.type == "gauge" else Merge.SUM]
    for sample in before.samples if before is not None else ():
        key = (sample.name, *sorted(sample.labels.items()))
        known = joined.get(key)
        value = sample.value if known is None else of_both((known.value, sample.value))
        joined[key] = Sample(sample.name, sample.labels, value)
    metric.samples = list(joined.values())


_MERGED: Mapping[Merge, Callable[[Iterable[float]], float]] = {
    Merge.SUM: sum,
    Merge.LEAST: min,
    Merge.GREATEST: max,
    Merge.BY_STORE: max,
}


def _cumulated(family: Family, cells: list[float]) -> list[tuple[str, float]]:
    bounds = [*map(floatToGoString, family.buckets), "+Inf"]
    return [(bound, sum(cells[: n + 1])) for n, bound in enumerate(bounds)]


class _Writer:
    """Writes into the files, which a lock of prometheus-client guards, with all other metrics.

    The current thread may already hold that lock: a finalizer or signal handler may publish in the
    middle of a count, and would wait for ever. And while the handler waits for the broker's answer,
    the I/O thread must not wait for the lock. So a count that cannot be written at once is written
    before the next one.
    """

    def __init__(self) -> None:
        self._lock = _lock_of(values.ValueClass)
        self._lines = LimitedLogger(logger)
        self._busy: set[int] = set()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=MAX_WAITING)

    def write(self, step: Callable[[], object]) -> None:
        """Write now or soon; a failure is logged, and the count is lost."""
        own = get_ident()
        if own in self._busy or not self._is_free():
            self._waiting.append(step)
            return
        try:
            self._busy.add(own)
            while self._waiting:
                self._take(self._next)
            self._take(step)
        finally:
            self._busy.discard(own)

    def catch_up(self) -> None:
        """Write the counts that wait, if the lock is free."""
        if self._waiting:
            self.write(_nothing)

    def forked(self) -> None:
        """Start with a free lock in a child, where the thread that may hold it does not exist."""
        if self._lock is not None:
            # guards: prometheus-client's files
            self._lock.cell_contents = threading.Lock()
        self._busy, self._waiting = set(), deque(maxlen=MAX_WAITING)

    def failed(self, failure: Exception) -> None:
        """Log that the files cannot be written."""
        fields = f"{DIRECTORY}: %s"
        self._lines.log(logging.ERROR, "metrics cannot be written", fields, type(failure).__name__)

    def _is_free(self) -> bool:
        """Return whether no thread, this one included, is writing."""
        if self._lock is None:
            return True
        lock = self._lock.cell_contents
        if not lock.acquire(blocking=False):
            return False
        lock.release()
        return True

    def _next(self) -> None:
        with suppress(IndexError):  # another thread may be first
            self._waiting.popleft()()

    def _take(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as failure:  # noqa: BLE001 - the files may be in any state
            self.failed(failure)


def _nothing() -> None:
    """Write nothing."""


def _lock_of(value_class: Any) -> Any:
    """Return the cell of prometheus-client's lock, which is a local variable of ``MmapedValue``.

    ``None`` where a version keeps it elsewhere; then counts are written without a look at it.
    """
    inc = getattr(value_class, "inc", None)
    names = getattr(getattr(inc, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(inc, "__closure__", None) or (), strict=False))
    lock = cells.get("lock")
    return lock if hasattr(getattr(lock, "cell_contents", None), "acquire") else None


class _Files:
    """Series in the files of prometheus-client's multiprocess mode.

    A gauge that is merged as the least is made when it is first written, since its file has the
    value 0 until then; one that is merged by store, once it is known whether the store is shared.

    :ivar durable: processes share their store, so that the greatest of their numbers counts
    """

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        later = (Merge.LEAST, Merge.BY_STORE)
        self._families = {
            family: _shared(family, family.merge.value)
            for family in FAMILIES
            if family.merge not in later
        }
        self._series: dict[tuple[Family, Labels], _File] = {}
        self.durable = False

    def series(self, family: Family, labels: Labels = ()) -> _File:
        """Return the series with these labels, the same one each time."""
        found = self._series.get((family, labels))
        if found is None:
            child = partial(self._child, family, labels, self._merge(family))
            found = self._series.setdefault((family, labels), _File(child, self._writer))
        return found

    def _child(self, family: Family, labels: Labels, merge: str) -> Any:
        parent = self._families.get(family)
        if parent is None:
            parent = self._families.setdefault(family, _shared(family, merge))
        return parent.labels(*labels) if labels else parent

    def _merge(self, family: Family) -> str:
        if family.merge is not Merge.BY_STORE:
            return str(family.merge.value)
        return str(Merge.GREATEST.value if self.durable else Merge.SUM.value)


class _File:
    """A series in a file, made when it is first written.

    :param make: makes prometheus-client's counter, histogram or gauge
    """

    def __init__(self, make: Callable[[], Any], writer: _Writer) -> None:
        self._make = make
        self._write = writer.write
        self._child: Any = None

    def begin(self) -> None:
        """Show 0, unless it shows something already."""
        self._write(self._made)

    def inc(self, amount: int = 1) -> None:
        """Add to a counter."""
        self._write(lambda: self._made().inc(amount))

    def observe(self, amount: float) -> None:
        """Add a value to a histogram."""
        self._write(lambda: self._made().observe(amount))

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Add values to a histogram."""
        for amount in amounts:
            self.observe(amount)

    def set(self, value: float) -> None:
        """Set a gauge."""
        self._write(lambda: self._made().set(value))

    def _made(self) -> Any:
        if self._child is None:
            self._child = self._make()
        return self._child


def _shared(family: Family, merge: str) -> Any:
    if family.kind is Kind.COUNTER:
        return Counter(family.name, family.help, family.labels, registry=None)
    if family.kind is Kind.HISTOGRAM:
        return Histogram(
            family.name, family.help, family.labels, registry=None, buckets=family.buckets
        )
    mode: Any = f"live{merge}"
    return Gauge(family.name, family.help, family.labels, registry=None, multiprocess_mode=mode)


class _FileMetrics(ProducerMetrics):
    """The meter of a process in multiprocess mode, whose gauges are written to files.

    If the directory is emptied, or its disk is full, counts become wrong, and nothing else happens.
    """

    def __init__(self, files: _Files, writer: _Writer) -> None:
        super().__init__(files)
        self._files = files
        self._writer = writer
        self._shown: set[tuple[Family, Labels]] = set()

    def watch(self, status: Callable[[], Status], *, durable: bool = False) -> None:
        """Read a producer's gauges; the first producer decides how those of stores are merged."""
        if not self._statuses:
            self._files.durable = durable
            for family in FAMILIES:
                if family.merge is Merge.BY_STORE:
                    self._files.series(family).begin()
        super().watch(status, durable=durable)

    def refresh(self) -> None:
        """Write the gauges, and again if a connection changed its state meanwhile.

        The thread that changed it may have written the new state before this one wrote the old.
        """
        try:
            written, readings = None, self.readings()
            while readings[CONNECTION_STATE] != written:
                self._write(readings)
                written, readings = readings[CONNECTION_STATE], self.readings()
        except Exception as failure:  # noqa: BLE001 - the files may be in any state
            self._writer.failed(failure)

    def catch_up(self) -> None:
        """Write the counts that wait."""
        self._writer.catch_up()

    def forked(self) -> None:
        """Start from zero, in a child process, which writes files of its own."""
        super().forked()
        self._writer.forked()
        self._shown = set()

    def _write(self, readings: Mapping[Family, Mapping[Labels, float]]) -> None:
        shown = {(family, labels) for family, series in readings.items() for labels in series}
        for family, labels in shown | self._shown:
            # A series cannot be removed from a file; for a queue that is not read any more it is 0.
            self._files.series(family, labels).set(readings[family].get(labels, 0.0))
        self._shown |= shown


@lru_cache(1)
def _file_metrics() -> _FileMetrics:
    writer = _Writer()
    try:
        return _FileMetrics(_Files(writer), writer)
    except OSError as error:
        raise ConfigurationError(
            f"{DIRECTORY} must name a directory that can be written to: {error.strerror}"
        ) from error


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()


def _in_child() -> None:
    for registry in [REGISTRY, *_collectors]:
        # guards: prometheus-client's own state; a thread of the parent may hold it, in a scrape
        lock: Any = threading.RLock()
        registry._lock = lock  # noqa: SLF001 - it has no public way to release it
    for collector in list(_collectors.values()):
        collector.forked()
    if _file_metrics.cache_info().currsize:
        _file_metrics().forked()


forks.in_child(_in_child)
