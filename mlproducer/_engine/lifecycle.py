"""When a producer's running part begins and ends: at its first use, and once.

Four things happen to it, each of which an interrupt, or the end of a thread, may cut anywhere, and
which the next caller finishes:

- *start* is made on a thread of its own, which no signal interrupts; callers only wait for it;
- *close* is steps that may be taken again, and by several threads at once: the shortest limit of
  those who close decides how long is waited, and all have the same report;
- *exit* takes the same steps for all producers of the process, on the main thread;
- *fork* makes it new in the child, on the thread that forked.

No lock is held on the way, so that a signal handler or a finaliser may call in at any moment.

Runs on: the users' threads; the start on a thread ``mlproducer-start``.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._core.states import ConnectionState
from mlproducer._engine import threads
from mlproducer._engine.threads import CLOSE_MARGIN, REST_LIMIT
from mlproducer._foreign_calls import write
from mlproducer._synchronization import Watch
from mlproducer.errors import (
    ConfigurationError,
    MLProducerError,
    NotConnectedError,
    ProducerClosedError,
    WouldDeadlockError,
)
from mlproducer.observe.recent_history import Recorder
from mlproducer.status import CloseReport, Status

if TYPE_CHECKING:
    from mlproducer._engine.runtime import Runtime
    from mlproducer.observe.callbacks import Callbacks
    from mlproducer.observe.producer_metrics import ProducerMetrics
    from mlproducer.settings import Settings
    from mlproducer.stores.protocol import Store
    from mlproducer.topology import Declaration

logger = logging.getLogger(__name__)

START_LIMIT = 30.0
"""Seconds for which a call waits for the start, which takes a few milliseconds."""

CLAIM_LIMIT = 0.1
"""Seconds after which a thread that was to start it, and has not begun, is taken for lost."""

CLOSE_TIMEOUT = 10.0
"""Seconds that a close may take to deliver what is inside, unless it is told otherwise."""

ENDED = "the process ends: producers have been closed"

_inherited: list[object] = []
"""What ran in parent processes: kept, so that nothing of theirs is collected, closed or flushed."""


@lru_cache(1)
def _runtime_class() -> type[Runtime]:
    """Import the runtime, once: after a re-import of the package the name means another copy."""
    with forks.importing():
        from mlproducer._engine.runtime import Runtime  # noqa: PLC0415 - pika is slow to import

    return Runtime


class RuntimeFactory:
    """Makes a producer's runtime, and after a fork another; it has no reference to the producer.

    :ivar lifecycle: a weak reference to the one whose status the metrics read
    :ivar added: declarations besides the topology
    """

    lifecycle: Callable[[], Lifecycle | None]

    def __init__(
        self, settings: Settings, store: Store | None, registry: Any, callbacks: Callbacks
    ) -> None:
        self.registry = registry
        self.added: list[Declaration] = []
        self.exit_timeout = settings.exit_timeout
        self.recorder = Recorder()
        self._settings = settings
        self._store = store
        self._callbacks = callbacks
        self._meter: ProducerMetrics | None = None

    def prepare(self) -> None:
        """Import what is needed, on the caller's thread, which may be in an import itself."""
        _runtime_class()
        self.meter()

    def make(self, tend: Callable[[], None]) -> Runtime:
        """Return a runtime that is not started."""
        return _runtime_class()(
            self._settings,
            self._store,
            self._callbacks,
            self.meter(),
            self.recorder,
            tend,
            self.added,
        )

    def meter(self) -> ProducerMetrics:
        """Return the meter of the registry, with its families registered."""
        if self._meter is None:
            with forks.importing():
                from mlproducer.observe import metrics  # noqa: PLC0415 - slow, not needed before

            meter, lifecycle = metrics.meter(self.registry), self.lifecycle()
            if lifecycle is not None:
                meter.watch(lifecycle.status, durable=self.stores_durably())
            self._meter = meter
        return self._meter

    def forked(self) -> None:
        """Forget the parent's recordings, in a forked child."""
        self.recorder = Recorder()

    def stores_durably(self) -> bool:
        """Return whether the store may have rows of other processes."""
        if self._store is not None:
            return self._store.durable
        return not self._settings.store_url.startswith("memory:")


class Start:
    """One attempt to start, carried out once by the first of the threads that come to do it."""

    def __init__(self, make: Callable[[], Runtime]) -> None:
        self._make = make
        self._unclaimed = [None]
        self._runtime: Runtime | None = None
        self.error: Exception | None = None
        self.threads: list[threading.Thread] = []
        self.over = Watch()

    def is_over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self._runtime is not None or self.error is not None

    def wait(self, owner: object) -> Runtime | None:
        """Wait until it is over; ``None`` where it failed.

        A caller may be interrupted before it has a thread do it, or in the middle of having one do
        it; so each caller sees to it that there is one.
        """
        deadline = time.monotonic() + START_LIMIT
        while not self.is_over() and time.monotonic() < deadline:
            if self._unclaimed:
                try:
                    self.threads.append(threads.spawn("start", 1, self._run, owner))
                except RuntimeError as error:  # Python 3.12 and later at the end of the interpreter
                    self._fail(NotConnectedError(f"no thread can be started: {error}"))
                    break
            self.over.wait_for(self.is_over, time.monotonic() + CLAIM_LIMIT)
        return self._runtime

    def withdraw(self) -> bool:
        """Have it not made any more; false if it is under way, or over."""
        if not self._claim():
            return False
        self._fail(ProducerClosedError("the producer is closed"))
        self.over.changed()
        return True

    def _claim(self) -> bool:
        """Decide what becomes of it; true for one thread only."""
        try:
            self._unclaimed.pop()
        except IndexError:
            return False
        return True

    def _run(self) -> None:
        if not self._claim():
            return
        try:
            self._runtime = self._make()
        except MLProducerError as error:
            self._fail(error)
        except RuntimeError as error:
            self._fail(NotConnectedError(f"no thread can be started: {error}"))
        except OSError as error:
            why = error.strerror or "out of descriptors"
            self._fail(NotConnectedError(f"the producer cannot be started: {why}"))
        except BaseException as error:  # noqa: BLE001 - the callers have to be told whatever it is
            self._fail(NotConnectedError(f"the producer cannot be started: {type(error).__name__}"))
        self.over.changed()

    def _fail(self, error: Exception) -> None:
        self.error = error


def fresh(error: Exception | None) -> Exception:
    """Give an error of its own to each caller."""
    if isinstance(error, (ConfigurationError, NotConnectedError, ProducerClosedError)):
        return type(error)(str(error))
    if error is not None:
        return error.with_traceback(None)
    return NotConnectedError("the start takes too long")


class Lifecycle:
    """The life of a producer's running part in one process.

    :param is_held: whether something of the program still holds the producer
    :ivar runtime: ``None`` until the first use
    :ivar closed: nothing is taken any more
    """

    def __init__(self, factory: RuntimeFactory, is_held: Callable[[], bool]) -> None:
        self._factory = factory
        self._is_held = is_held
        self.closed = False
        self._left: Runtime | None = None
        self._begin()
        _producers.remember(self)

    def _begin(self) -> None:
        self.runtime: Runtime | None = None
        self._made: Runtime | None = None  # the same, from before it is started, for a fork
        self._starts: dict[str, Start] = {}  # the one under way, if there is one
        self._reports: list[CloseReport] = []  # the first counts

    # --- start ---------------------------------------------------------------------------------

    def started(self, *, blocking: bool = True) -> Runtime:
        """Return the running part, started.

        :param blocking: the caller is going to wait, which it must not on one of our threads
        :raises ProducerClosedError: it is closed
        :raises WouldDeadlockError: the wait would never end
        """
        if not forks.begun[0]:
            forks.notice()
        runtime = self.runtime
        if runtime is None or self.closed:
            runtime = self._start()
        if blocking and threads.here.owners.get(threading.get_ident()) is runtime:
            raise WouldDeadlockError("a blocking call on the producer's own thread")
        return runtime

    def _start(self) -> Runtime:
        self._check_open()
        if threads.here.owner is self:
            raise WouldDeadlockError("called by a finaliser while the producer starts")
        try:
            self._factory.prepare()
        except ImportError as error:  # by a signal handler in the middle of the same import
            raise WouldDeadlockError(f"the library is being imported: {error}") from None
        # setdefault() is one step under the GIL: all who come meanwhile wait for the same start.
        start = self._starts.setdefault("now", Start(self._make_and_start))
        runtime = start.wait(self)
        if runtime is None:
            if self._starts.get("now") is start:
                del self._starts["now"]
            if start.is_over():  # which is the last thing that its thread does: wait for its end
                threads.join_all(start.threads, time.monotonic() + CLAIM_LIMIT)
            raise fresh(start.error)
        self._check_open()
        return runtime

    def _check_open(self) -> None:
        if self.closed:
            raise ProducerClosedError("the producer is closed")
        if _producers.over:
            raise ProducerClosedError(ENDED)

    def _make_and_start(self) -> Runtime:
        """Make and start it; on a thread that no signal interrupts."""
        _finish_in_children()
        with forks.importing():  # the store's modules
            runtime = self._made = self._factory.make(self._tend)
        _producers.hold(self)
        try:
            runtime.start()
        except BaseException:
            self._made = None
            _producers.release(self)
            raise
        self.runtime = runtime
        if self.closed or _producers.over:  # by one who did not wait, and may not have seen it
            runtime.close(0.0)
            _producers.release(self)
        return runtime

    def _tend(self) -> None:
        """Close what has delivered everything, and is held by nothing of the program."""
        runtime = self.runtime
        if runtime is not None and not self._is_held() and runtime.is_idle():
            self.close(0.0)

    # --- close ---------------------------------------------------------------------------------

    def close(self, timeout: float | None) -> CloseReport:
        """Drain and close, or finish what another caller has begun; give the one report.

        :param timeout: ``None`` is `CLOSE_TIMEOUT`, or less where there is no broker
        """
        forks.notice()
        now = time.monotonic()
        deadline = now + (CLOSE_TIMEOUT if timeout is None else timeout)
        self.drain(deadline, deadline if timeout is not None else now + self.exit_timeout)
        self.end(deadline)
        return self.join(deadline + CLOSE_MARGIN)

    def drain(self, deadline: float, in_vain: float | None = None) -> None:
        """Take nothing more, and deliver what is inside until a monotonic deadline.

        :param in_vain: monotonic time after which this ends where there is no broker
        """
        # Set before the runtime is read below. A start sets the runtime before it reads this: so
        # one of the two sees the other, and the runtime is closed.
        self.closed = True
        start = self._starts.get("now")
        if start is not None and not start.withdraw() and threads.here.owner is not self:
            start.over.wait_for(start.is_over, deadline)
        runtime = self.runtime
        if runtime is not None and not self._reports and threads.here.owner is not runtime:
            runtime.drain(deadline, deadline if in_vain is None else in_vain)

    def end(self, deadline: float) -> None:
        """Have connections and threads end, and every publisher told how it stands."""
        self.closed = True
        if self.runtime is not None and not self._reports:
            self.runtime.end(deadline + REST_LIMIT)

    def join(self, deadline: float) -> CloseReport:
        """Wait for the threads until a monotonic deadline."""
        if not self._reports:
            report = CloseReport() if self.runtime is None else self.runtime.join(deadline)
            self._reports.append(report)  # of several that close, the first to come here counts
        start = self._starts.get("now")
        # Callbacks do not wait: a start that found the producer closed waits for their threads.
        if start is not None and threads.here.owner is None:
            threads.join_all(start.threads, deadline)
        _producers.release(self)
        return self._reports[0]

    # --- what the process tells ----------------------------------------------------------------

    @property
    def running(self) -> bool:
        """It has been started, and is not closed to the end."""
        return self._made is not None and not self._reports

    @property
    def exit_timeout(self) -> float:
        """Seconds for which the end of the process waits for it."""
        return self._factory.exit_timeout

    def lost(self) -> int:
        """Count the messages that are lost with this process."""
        return sum(len(report.abandoned) for report in self._reports[:1])

    def forked(self) -> None:
        """Begin afresh in a child, which must touch nothing of its parent's."""
        self._left = self._made
        _inherited.append((self._left, self._starts))
        self._begin()
        self._factory.forked()

    def disown(self) -> None:
        """Close, in a child, the parent's descriptors."""
        left, self._left = self._left, None
        if left is not None:
            left.disown()

    # --- state ---------------------------------------------------------------------------------

    def status(self) -> Status:
        """Say how things stand, without asking the broker."""
        runtime = self.runtime
        if runtime is not None:
            return runtime.status()
        closed = ConnectionState.CLOSED if self.closed else ConnectionState.DISCONNECTED
        return Status(connection_state=closed)


class _Producers:
    """The producers of this process: told when it forks, and closed when it ends.

    One that runs is held until it is closed: its messages are delivered, also at the end of the
    process, although nothing of the program holds it any more.

    :ivar over: the process ends, and starts nothing any more
    """

    def __init__(self) -> None:
        self._known: dict[weakref.ref[Lifecycle], None] = {}
        self._running: dict[Lifecycle, None] = {}
        self.over = False

    def remember(self, lifecycle: Lifecycle) -> None:
        self._known[weakref.ref(lifecycle, self._forget)] = None

    def _forget(self, lifecycle: weakref.ref[Lifecycle]) -> None:
        self._known.pop(lifecycle, None)

    def hold(self, lifecycle: Lifecycle) -> None:
        self._running[lifecycle] = None

    def release(self, lifecycle: Lifecycle) -> None:
        self._running.pop(lifecycle, None)

    def forked(self) -> None:
        """Begin afresh in a child: all of them first, since letting go may fail."""
        known = [reference() for reference in list(self._known)]
        every = dict.fromkeys(each for each in [*known, *self._running] if each is not None)
        self._running = {}
        self.over = False
        for step in ("forked", "disown"):
            for each in every:
                _take(getattr(each, step))

    def exiting(self) -> None:
        """Close all that run, within one limit: drain all, end all, then join all."""
        self.over = True
        started = time.monotonic()
        running = [each for each in list(self._running) if each.running]
        deadlines = {each: started + each.exit_timeout for each in running}
        interrupt: BaseException | None = None
        for step, grace in (("drain", 0.0), ("end", 0.0), ("join", CLOSE_MARGIN)):
            for each in running:
                deadline = started if interrupt else deadlines[each]
                late = time.monotonic() if interrupt else 0.0
                try:
                    _take(getattr(each, step), max(deadline, late) + grace)
                except BaseException as error:  # noqa: BLE001 - Ctrl-C: wait no longer, but end all
                    interrupt = error
        lost = sum(each.lost() for each in running)
        if lost:
            text = "the process ends: messages lost that lived in memory: %d"
            write(logger, logging.ERROR, text, lost)
        if interrupt is not None:
            raise interrupt


def _take(step: Callable[..., object], *arguments: float) -> None:
    """Take a step; one that fails must not keep other producers from theirs."""
    try:
        step(*arguments)
    except Exception as error:  # noqa: BLE001 - see the docstring
        text = "a producer could not be %s; going on with the others"
        write(logger, logging.ERROR, text, step.__name__, error=error)


_producers = _Producers()

_finalizers: dict[str, Any] = {}
"""By module: one is enough for all producers; a child's are its own."""


def _finish_in_children() -> None:
    """Be told of the end also where the process ends without ``atexit``.

    A process of multiprocessing, or of Celery's billiard, leaves by ``os._exit`` after finalizers
    of its own. A child of Celery's prefork pool runs neither: it has a signal for its end.
    """
    for name in ("multiprocessing.util", "billiard.util"):
        module, finalizer = sys.modules.get(name), _finalizers.get(name)
        # Both forget all of them when the target of a process begins.
        if module is not None and (finalizer is None or not finalizer.still_active()):
            _finalizers[name] = module.Finalize(None, _producers.exiting, exitpriority=100)


forks.in_child(_producers.forked)
forks.in_child(_finalizers.clear)
atexit.register(_producers.exiting)
