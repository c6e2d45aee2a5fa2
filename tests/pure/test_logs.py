"""What is logged: one line per change, few in a storm, and nothing that others could forge."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlproducer._core import events
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.errors import MessageTooLargeError, NackError, StoreError
from mlproducer.observe.callbacks import Callbacks, CallbackSink, Dispatcher, Event
from mlproducer.observe.limited_logger import LimitedLogger, Limiter
from mlproducer.observe.log import LOGGERS, MAX_WORDS, LogSink
from mlproducer.observe.sinks import Fanout, Sink, Table
from tests.helpers import make_delivery
from tests.pure.witnesses import Clock

STORM = 10_000
PERIOD = 10.0
EVIL = "\x1b[2J\r\nCRITICAL forged \u202eline\u2028" + "x" * 1000


@pytest.fixture
def clock() -> Clock:
    """Time that stands still until the test moves it."""
    return Clock()


@pytest.fixture
def sink(clock: Clock, caplog: pytest.LogCaptureFixture) -> LogSink:
    """A sink whose lines are caught, all of them."""
    caplog.set_level(logging.DEBUG, "mlproducer")
    return LogSink(clock.monotonic)


# --- the limiter -------------------------------------------------------------------------------


def test_limit_per_kind() -> None:
    """Each kind has its own limit, and has it again in the next period."""
    limiter = Limiter(2, PERIOD)
    assert [limiter.admits("a", 1.0) for _ in range(4)] == [True, True, False, False]
    assert limiter.admits("b", 1.0)
    assert limiter.suppressed(10.9) == []
    assert limiter.suppressed(11.0) == [("a", 2)]
    assert limiter.suppressed(11.0) == []
    assert limiter.admits("a", 11.0)


def test_nothing_suppressed_nothing_told() -> None:
    """A kind that kept within its limit is not spoken of."""
    limiter = Limiter(2, PERIOD)
    assert limiter.admits("a", 0.0)
    assert limiter.admits("a", 0.0)
    assert limiter.suppressed(math.inf) == []


# --- storms ------------------------------------------------------------------------------------

LOSS = Loss("h:5672: connection refused", kind=LossKind.REFUSED)

STORMS: dict[str, Callable[[LogSink], None]] = {
    "dead letters": lambda sink: sink.take(events.DeadLettered(make_delivery())),
    "letters too long": lambda sink: sink.take(
        events.LetterKept(make_delivery(), MessageTooLargeError("too long"))
    ),
    "failed attempts": lambda sink: sink.take(events.ConnectFailed(LOSS)),
    "lost connections": lambda sink: sink.take(events.Disconnected(LOSS)),
    "lost channels": lambda sink: sink.take(events.ChannelLost(Loss("gone", 404))),
    "stray confirms": lambda sink: sink.take(events.UnknownTag(7)),
    "failing store": lambda sink: sink.take(events.StoreFailed(StoreError("locked"))),
    "crashes": lambda sink: sink.take(events.LoopFailed(RuntimeError("bug"))),
    "breaker": lambda sink: sink.take(events.CircuitChanged(CircuitState.OPEN)),
}


@pytest.mark.parametrize("storm", STORMS)
def test_storm(storm: str, sink: LogSink, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Ten thousand events within a minute give fewer than 100 lines, which tell of the rest."""
    for _ in range(STORM):
        STORMS[storm](sink)
        clock.now += 60.0 / STORM
    sink.take(events.StateChanged(ConnectionState.CLOSED))
    assert len(caplog.messages) < 100
    counts = [re.fullmatch(r".* suppressed=(\d+)", line) for line in caplog.messages]
    told = [int(found[1]) for found in counts if found is not None]
    assert len(caplog.messages) - len(told) + sum(told) == STORM


def test_the_rest_is_told_by_the_next_line(
    sink: LogSink, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the storm's period is over, a line of another kind brings its number along."""
    for _ in range(8):
        sink.take(events.ConnectFailed(LOSS))
    clock.now += PERIOD
    sink.take(events.Connected("h:5672"))
    assert caplog.messages[5:] == ["cannot connect suppressed=3", "connected broker=h:5672"]


def test_a_change_is_never_hidden_by_another_kind(
    sink: LogSink, caplog: pytest.LogCaptureFixture
) -> None:
    """A storm of one kind leaves the lines of the others alone."""
    delivery = make_delivery()
    for _ in range(STORM):
        sink.take(events.DeadLettered(delivery))
    sink.take(events.Connected("h:5672"))
    assert caplog.messages[-1] == "connected broker=h:5672"


# --- lines -------------------------------------------------------------------------------------


def test_fields(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """Each change is one line with its fields, at a level that says whether to look."""
    delivery = make_delivery("m")
    delivery.attempts, delivery.reason = 4, NackError("the broker nacked the message")
    sink.take(events.Connected("h:5672"))
    sink.take(events.Disconnected(LOSS))
    sink.take(events.Disconnected(Loss("closed by us", kind=LossKind.CLOSED)))
    sink.take(events.ConnectFailed(LOSS))
    sink.take(events.FlowChanged(blocked=True, reason="low on memory"))
    sink.take(events.FlowChanged(blocked=False, reason=""))
    sink.take(events.CircuitChanged(CircuitState.OPEN))
    sink.take(events.CircuitChanged(CircuitState.CLOSED))
    sink.take(events.HealthChecked(alive=True))
    sink.take(events.HealthChecked(alive=False))
    sink.take(events.TopologyFault("ml.embed", Loss("PRECONDITION_FAILED", 406)))
    sink.take(events.DeadLettered(delivery))
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("INFO", "connected broker=h:5672"),
        ("WARNING", "disconnected kind=refused reason='h:5672: connection refused'"),
        ("INFO", "disconnected kind=closed reason='closed by us'"),
        ("WARNING", "cannot connect kind=refused reason='h:5672: connection refused'"),
        ("WARNING", "blocked by the broker reason='low on memory'"),
        ("INFO", "unblocked by the broker"),
        ("WARNING", "circuit breaker state=open"),
        ("INFO", "circuit breaker state=closed"),
        ("WARNING", "no answer to the health check; reconnecting"),
        (
            "ERROR",
            (
                "cannot declare target=ml.embed code=406 reason='PRECONDITION_FAILED' "
                'hint="mlproducer topology"'
            ),
        ),
        ("ERROR", "dead-lettered message_id='m' attempts=4 reason=NackError"),
    ]


def test_nothing_per_message(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """What happens to every message, or to many, is counted and not logged."""
    delivery, error = make_delivery(), NackError("the broker nacked the message")
    sink.take(events.Confirmed([delivery], 0.0))
    sink.take(events.AttemptFailed(delivery, error))
    sink.take(events.Deferred(delivery))
    sink.take(events.Retried(delivery))
    sink.take(events.LateConfirm(delivery))
    sink.take(events.PossibleDuplicate(delivery))
    sink.take(events.Failed(delivery, error))
    assert caplog.messages == []


def test_foreign_words(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """What a broker or a publisher says is escaped and cut: one line stays one line."""
    sink.take(events.Disconnected(Loss(EVIL)))
    sink.take(events.ConnectFailed(Loss(EVIL)))
    sink.take(events.ChannelLost(Loss(EVIL, 404)))
    sink.take(events.FlowChanged(blocked=True, reason=EVIL))
    sink.take(events.TopologyFault("ml.embed", Loss(EVIL, 406)))
    sink.take(events.HealthFault("ml.embed", Loss(EVIL, 404)))
    sink.take(events.GaveUp(10, Loss(EVIL)))
    sink.take(events.StoreFailed(StoreError(EVIL)))
    sink.take(events.DeadLettered(make_delivery(EVIL)))
    assert len(caplog.messages) == 9
    for line in caplog.messages:
        assert line.isprintable()
        assert len(line) < MAX_WORDS + 150


def test_traceback_of_a_crash(caplog: pytest.LogCaptureFixture, sink: LogSink) -> None:
    """A failure of the loop, which is a bug, is logged with its traceback."""
    sink.take(events.LoopFailed(RuntimeError("bug")))
    [record] = caplog.records
    assert record.levelno == logging.CRITICAL
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


def test_lines_go_to_the_logger_they_are_given(caplog: pytest.LogCaptureFixture) -> None:
    """Other modules limit their own lines, on their own loggers."""
    lines = LimitedLogger(logging.getLogger("mlproducer.other"), Clock().monotonic)
    lines.log(logging.ERROR, "a callback raised")
    assert caplog.record_tuples == [("mlproducer.other", logging.ERROR, "a callback raised")]


def test_lines_speak_for_their_modules(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of line comes from the logger of a module that there is: the one it speaks of."""
    assert all(importlib.util.find_spec(f"mlproducer.{name}") for name in LOGGERS.values())
    for _ in range(6):
        sink.take(events.ConnectFailed(LOSS))
        sink.take(events.CircuitChanged(CircuitState.OPEN))
    sink.take(events.StateChanged(ConnectionState.CLOSED))
    told = [(each.name, each.getMessage()) for each in caplog.records]
    assert {name for name, _ in told} == {
        "mlproducer._engine.connector",
        "mlproducer._core.breaker",
    }
    assert told[-2:] == [
        ("mlproducer._engine.connector", "cannot connect suppressed=1"),
        ("mlproducer._core.breaker", "circuit breaker suppressed=1"),
    ]


class Raising(logging.Handler):
    """Raises at each line, as a broken handler does, or one that ends the process."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        """Raise."""
        raise self._error


@pytest.fixture
def raising() -> Iterator[Callable[[BaseException], None]]:
    """Have a handler of ours raise: ``raising(error)``."""
    root, handlers = logging.getLogger("mlproducer"), list[logging.Handler]()

    def add(error: BaseException) -> None:
        handlers.append(Raising(error))
        root.addHandler(handlers[-1])

    yield add
    for handler in handlers:
        root.removeHandler(handler)


@pytest.mark.parametrize("error", [ValueError(), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_handlers_that_raise(
    sink: LogSink, raising: Callable[[BaseException], None], error: BaseException
) -> None:
    """What a handler raises ends where the line is written, on any thread but the main one."""
    raising(error)
    passed: list[str] = []

    def tell() -> None:
        sink.take(events.Connected("h:5672"))
        passed.append("the line")

    thread = threading.Thread(target=tell)
    thread.start()
    thread.join(30.0)
    assert passed == ["the line"]
    if isinstance(error, Exception):
        sink.take(events.Connected("h:5672"))
    else:
        with pytest.raises(type(error)):
            sink.take(events.Connected("h:5672"))


def test_an_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, not a thousand times, and the observers after it are told all the same."""
    seen: list[str] = []

    class Failing(Sink):
        def table(self) -> Table:
            return {events.Connected: self.connected}

        def connected(self, event: events.Connected) -> None:
            raise OSError(event.address)

    class Seeing(Sink):
        def table(self) -> Table:
            return {events.Connected: lambda event: seen.append(event.address)}

    fanout = Fanout([Failing(), Seeing()])
    for n in range(1000):
        fanout.emit(events.Connected(str(n)))
    assert seen == [str(n) for n in range(1000)]
    assert 0 < len(caplog.records) < 10
    assert {each.getMessage() for each in caplog.records} == {"an observer failed"}


def test_refused(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be handed over after a COMMIT is a line, and an event for callbacks."""
    callbacks, told = Callbacks(), list[Any]()
    callbacks.add("refused", told.append)
    dispatcher = Dispatcher(lambda _role, run: threading.Thread(target=run, daemon=True))
    fanout = Fanout([sink, CallbackSink(callbacks, dispatcher)])
    fanout.emit(events.Refused("m-1", StoreError("full")))
    dispatcher.stop()
    dispatcher.events._run()
    assert told == [Event("refused", "m-1", "StoreError")]
    assert caplog.messages == ["cannot hand over message_id='m-1' reason=StoreError"]
