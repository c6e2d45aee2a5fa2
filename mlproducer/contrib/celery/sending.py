"""Hands each task that Celery has encoded to a producer, instead of to kombu.

Celery still does everything up to that point: routing, signals, serialisation, stamps. What is
replaced is the kombu producer to which its sender (``app.amqp.send_task_message``) hands the
message, and that only for a task that the rollout chooses.

Celery's settings are not read before the first task, so that `install` may stand anywhere in the
module that makes the app.

Runs on: the threads that send tasks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from celery import Celery
from celery.local import Proxy
from celery.signals import worker_before_create_process, worker_process_shutdown
from kombu.common import Broadcast
from kombu.compression import compress
from kombu.exceptions import OperationalError

from mlproducer import ConnectionState, MLProducer, Receipt
from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._foreign_calls import guarded
from mlproducer.contrib.celery import brokers
from mlproducer.contrib.celery.declaring import DELAYED, declarations_of, delayed_delivery
from mlproducer.contrib.celery.lazy_producer import LazyProducer, given_producer, real_producer
from mlproducer.contrib.celery.task_message import TaskMessage, encode, fields_of, plain_headers
from mlproducer.errors import ConfigurationError, MLProducerError, ProducerClosedError
from mlproducer.observe import metric_families as catalog
from mlproducer.observe.limited_logger import LimitedLogger
from mlproducer.topology import Declaration

logger = logging.getLogger(__name__)

T = TypeVar("T")
Rollout = float | Callable[[str], bool]

KEY = "_mlproducer"
"""The attribute by which an app is known to have this installed."""

DEAD_LETTERS = "dead letters"
"""Under which it is noted that their exchange and queue have been declared."""

EVENT_LIMIT = 1.0
"""Seconds at most for the declaration of the events' exchange; without it an event is left out."""

LATE = ("mlproducer._engine.runtime", "mlproducer.observe.metrics", "mlproducer.stores.memory")
"""Modules that a producer imports once it publishes: pika alone takes a tenth of a second."""

SHUTDOWN_LIMIT = 5.0
"""Seconds that a worker's child process may take to deliver what it has sent."""


class PublishFailedError(OperationalError):
    """A task was not sent, and will not be sent later.

    Its ``__cause__`` is the `mlproducer.errors.MLProducerError` that says why. Code that catches
    ``kombu.exceptions.OperationalError`` catches it too.

    :ivar possibly_sent: whether the broker may have the task nevertheless
    """

    def __init__(self, text: str = "", *, possibly_sent: bool = False) -> None:
        super().__init__(text)
        self.possibly_sent = possibly_sent


def install(
    app: Celery, producer: MLProducer | None = None, *, rollout: Rollout | None = None
) -> None:
    """Send the app's tasks through a producer; called again, it changes producer and rollout.

    :param producer: ``None`` makes one with the first task, from the app's own broker settings
        (``broker_write_url`` or ``broker_url``, ``broker_use_ssl``) and, for everything else, from
        the environment; see `producer_of`. A producer that was passed before stays, unless it has
        been closed
    :param rollout: the share of tasks that goes through the producer, from 0.0 to 1.0, chosen by
        task id; or a callable that takes the task's name. The rest is sent by Celery's own way.
        ``None`` is the producer's ``settings.rollout`` (``ML_ROLLOUT``)
    :raises ConfigurationError: ``rollout`` is out of range, or the app's broker is not RabbitMQ;
        if the app's settings are not loaded yet, the first task raises that
    """
    _check_rollout(rollout)
    app = _itself(app)
    if producer is None:
        # Of settings that are not loaded, only what is known without loading them.
        known = app.conf if app.configured else app._preconf  # noqa: SLF001 - there is no other way
        brokers.check_transport(known)
    installed = _installed(app)
    if installed is None:
        installed = app.__dict__[KEY] = Installed(app)
        app.__dict__["producer_or_acquire"] = installed.producer_or_acquire
        _all.add(installed)
    if producer is not None:
        installed.use(producer)
    elif installed.given is not None and _is_closed(installed.given):
        installed.use(None)
    installed.rollout = rollout


def uninstall(app: Celery) -> None:
    """Let Celery send the app's tasks itself again, and close a producer that was made here."""
    app = _itself(app)
    installed = _installed(app)
    if installed is not None:
        _all.discard(installed)
        del app.__dict__[KEY], app.__dict__["producer_or_acquire"]
        installed.unhook()


def producer_of(app: Celery) -> MLProducer:
    """Return the producer through which an app sends; for its status, metrics and callbacks.

    :raises ConfigurationError: none is installed, or none can be made from the app's settings
    """
    installed = _installed(app)
    if installed is None:
        raise ConfigurationError("no producer is installed for this app: install(app)")
    return installed.producer()


def _is_closed(producer: MLProducer) -> bool:
    return producer.status().connection_state is ConnectionState.CLOSED


def _installed(app: Celery) -> Installed | None:
    installed: Installed | None = _itself(app).__dict__.get(KEY)
    return installed


def _itself(app: Celery) -> Celery:
    """Return the app for which a proxy stands: ``celery.current_app``, which may change."""
    if isinstance(app, Proxy):
        app = app._get_current_object()  # noqa: SLF001 - Celery's own way
    return app


def _check_rollout(rollout: object) -> None:
    is_share = (
        isinstance(rollout, (int, float)) and not isinstance(rollout, bool) and 0 <= rollout <= 1
    )
    if not (rollout is None or callable(rollout) or is_share):
        raise ConfigurationError("rollout must be a share from 0.0 to 1.0, or a callable")


@worker_before_create_process.connect
def _before_child(**_: Any) -> None:
    """Import in the worker what the first task that a child sends would import in each child."""
    if _all:
        for name in LATE:
            import_module(name)
        if "opentelemetry.trace" in sys.modules:
            guarded(import_module, "mlproducer.observe.otel")  # an unsuitable version may raise


@worker_process_shutdown.connect
def _end_of_child(**_: Any) -> None:
    """Deliver what a worker's child has sent: it runs no exit functions when it ends."""
    for installed in list(_all):
        installed.close()


class Installed:
    """Connects one app and its producer.

    :ivar given: the user's producer, if one was given
    :ivar rollout: which tasks go through the producer; ``None`` for the setting
    :ivar lines: what is logged while tasks are sent, of which there may be many
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self.lines = LimitedLogger(logger)
        self.given: MLProducer | None = None
        self.rollout: Rollout | None = None
        self._made: MLProducer | None = None
        self._replaced: weakref.WeakSet[MLProducer] = weakref.WeakSet()
        self.unlock()
        self._hooked: Any = None
        self._stock: Callable[..., Any] | None = None
        self._pid = os.getpid()
        self._declared: set[Any] = set()
        self._places: frozenset[brokers.Place] | None = None

    def unlock(self) -> None:
        """Start with a free lock, in a child too, where the thread that may hold it is missing."""
        # guards: _made, _hooked; never held while anything is sent. A signal handler may send a
        # task while its thread holds it.
        self._lock = threading.RLock()

    # --- the producer --------------------------------------------------------------------------

    def producer(self) -> MLProducer:
        """Return the user's producer, or the one that is made from the app's settings."""
        producer = self.given or self._made
        if producer is not None:
            return producer
        with self._lock:
            if self._made is None:
                made = brokers.producer_of_settings(self._app)
                self._made = self._made or made
            return self._made

    def with_producer(self, call: Callable[[MLProducer], T]) -> T:
        """Call a function with the producer, and with the next one where this was closed amid it.

        `install` and `uninstall` may replace it while other threads send.
        """
        while True:
            producer = self.producer()
            try:
                return call(producer)
            except ProducerClosedError as error:
                if error.possibly_sent or self.producer() is producer:
                    raise

    def use(self, producer: MLProducer | None) -> None:
        """Use this producer, or with ``None`` one made from the app's settings.

        One that was made here before delivers what it has and is closed.
        """
        self.given = producer
        self._declared = set()
        with self._lock:
            # A producer without references is closed once it has delivered everything.
            made, self._made = self._made, None
            if made is not None:
                self._replaced.add(made)

    def close(self) -> None:
        """Deliver what this process has sent, and close the producers."""
        deadline = time.monotonic() + SHUTDOWN_LIMIT
        for producer in (self.given, self._made, *self._replaced):
            if producer is not None:
                producer.close(max(0.0, deadline - time.monotonic()))
        self.lines.close()

    # --- what Celery calls ---------------------------------------------------------------------

    def producer_or_acquire(self, producer: Any = None) -> Any:
        """Return a kombu producer that takes a connection from its pool only when it needs one.

        Stock Celery holds a slot of the pool (``broker_pool_limit``) while it sends, which would
        leave the eleventh thread waiting for the confirms of ten others.
        """
        forks.notice()
        amqp = self._app.amqp
        if self._hooked is not amqp:
            self._hook(amqp)
        return producer if isinstance(producer, LazyProducer) else LazyProducer(self._app, producer)

    def _hook(self, amqp: Any) -> None:
        with self._lock:
            if self._hooked is not amqp:
                stock = amqp.send_task_message
                if stock != self.send_task_message:
                    self._stock = stock
                amqp.__dict__["send_task_message"] = self.send_task_message
                self._hooked = amqp

    def unhook(self) -> None:
        """Put Celery's own sender back."""
        with self._lock:
            if self._hooked is not None:
                self._hooked.__dict__["send_task_message"] = self._stock
            made, self._made, self._hooked = self._made, None, None
        if made is not None:
            made.close()
        self.lines.close()

    def send_task_message(self, producer: Any, name: str, message: Any, **options: Any) -> Any:
        """Send a task as Celery does, with the last step replaced where the rollout says so."""
        if self._stock is None:
            raise ConfigurationError("no producer is installed for this app")
        if self._leads_elsewhere(producer):
            return self._stock(real_producer(producer), name, message, **options)
        task_id = str(message.headers.get("id") or message.body["id"])  # protocol 2, or 1
        ours = self._chooses(name, task_id)
        self._count("producer" if ours else "celery")
        if not ours:
            return self._stock(real_producer(producer), name, message, **options)
        retry = options.get("retry")
        if retry is None:
            retry = self._app.conf.task_publish_retry
        stands_in = TaskProducer(
            self,
            producer,
            message.body,
            task_id,
            name,
            retry=bool(retry),
            mandatory=not self._is_broadcast(options.get("queue")),
        )
        return self._stock(stands_in, name, message, **options)

    def _chooses(self, name: str, task_id: str) -> bool:
        rollout = self.rollout
        if callable(rollout):
            try:
                return bool(rollout(name))
            except Exception as error:  # noqa: BLE001 - the user's own; a task is sent all the same
                text = "the rollout callable raised: Celery's own way is taken:"
                self.lines.log(logging.WARNING, text, "%s", type(error).__name__)
                return False
        if rollout is None:
            rollout = self.producer().settings.rollout
        # crc32 spreads ids evenly, and is the same in every process: a task that is retried
        # keeps its id, and so its way.
        return zlib.crc32(task_id.encode()) < rollout * 2**32

    def _count(self, way: str) -> None:
        try:
            meter = self.producer()._meter()  # noqa: SLF001 - counted where the producer counts
        except ConfigurationError:
            if way == "producer":
                raise
        else:
            meter.counts.series(catalog.CELERY_TASKS, (way,)).inc()

    def _leads_elsewhere(self, producer: Any) -> bool:
        """Whether a producer was given by the sender that leads to a broker that is not the app's.

        A task that is sent on a connection of its own choice must not arrive at another broker.
        """
        connection = getattr(given_producer(producer), "connection", None)
        if connection is None:
            return False
        if self._places is None:
            self._places = brokers.places_of(self._app)
        return brokers.place_of(connection) not in self._places

    def _is_broadcast(self, queue: Any) -> bool:
        if isinstance(queue, str):
            queue = self._app.amqp.queues.get(queue)
        return isinstance(queue, Broadcast)

    # --- queues and exchanges ------------------------------------------------------------------

    def declare(self, entities: Iterable[Any], stock: Any, timeout: float) -> bool:
        """Have declared what Celery wants to be there: once, and on each later connection.

        Where the broker is away it is declared before the messages that wait for it are sent.

        :returns: false where the broker has not answered within ``timeout`` seconds
        """
        self._notice_fork()
        wanted = [each for each in entities if hash(each) not in self._declared]
        if not wanted:
            return True
        kept = [each for each in wanted if each.can_cache_declaration]
        good = not kept or self._have_declared(declarations_of(kept), timeout)
        if good:
            self._declared.update(map(hash, kept))
        for each in wanted:
            if not each.can_cache_declaration:
                self._declare_at_once(each, stock)
        return good

    def declare_delays(self, timeout: float) -> None:
        """Have declared what Celery's workers declare for delayed delivery, for a fresh broker."""
        self._notice_fork()
        known = DELAYED, frozenset(self._app.amqp.queues)
        if known not in self._declared and self._have_declared(
            delayed_delivery(self._app), timeout
        ):
            self._declared.add(known)

    def declare_dead_letters(self, receipt: Receipt) -> None:
        """Have declared, not waiting, where dead letters go, once there may be some.

        That is when a task is deferred, and with the first one where others may have left tasks in
        the store. A producer of the user's own has a topology, and declares it or not.
        """
        producer = self.producer()
        none_yet = receipt.confirmed and producer.settings.store_url.startswith("memory:")
        if none_yet or producer is self.given or DEAD_LETTERS in self._declared:
            return
        self._declared.add(DEAD_LETTERS)
        error = guarded(self._have_declared, brokers.dead_letters(producer.settings), 0.0)
        if error is not None:  # the task is ours all the same
            self.lines.log(logging.WARNING, "not declared:", "%s", type(error).__name__)

    def _have_declared(self, declarations: list[Declaration], timeout: float) -> bool:
        return self.with_producer(lambda made: made.declare(declarations, timeout=timeout))

    def _declare_at_once(self, entity: Any, stock: Any) -> None:
        """Declare what ends with its last consumer, and so each time, by Celery's own way."""
        if not self.producer().is_healthy():
            return  # that way would wait for the broker, without a limit
        try:
            real_producer(stock).maybe_declare(entity)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the task is to be sent
            self.lines.log(logging.WARNING, "not declared:", "%s", type(error).__name__)

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():  # a child has connections of its own to be asked
            self._pid, self._declared = os.getpid(), set()


_all: weakref.WeakSet[Installed] = weakref.WeakSet()


def _in_child() -> None:
    for installed in list(_all):
        installed.unlock()


forks.in_child(_in_child)


class TaskProducer:
    """A kombu producer as far as Celery's sender is concerned, for one task.

    What else the sender publishes, the ``task-sent`` event, must not fail or hold up a task that is
    on its way: it goes through the producer too, and is not waited for.

    :param mandatory: a task that no queue gets is an error; not so where it goes to any number
    """

    def __init__(
        self,
        installed: Installed,
        stock: Any,
        body: Any,
        task_id: str,
        name: str,
        *,
        retry: bool,
        mandatory: bool,
    ) -> None:
        self._installed = installed
        self._stock = stock
        self._body = body
        self._task_id = task_id
        self._name = name
        self._retry = retry
        self._mandatory = mandatory
        self._deadline = math.inf

    def publish(self, body: Any, **options: Any) -> Any:
        """Publish the task, and wait for the confirm; or an event, without waiting."""
        if body is not self._body:
            self._publish_event(body, **options)
            return
        try:
            self._publish_task(body, **options)
        except MLProducerError as error:
            raise PublishFailedError(
                f"task {self._name} was not sent: {error}", possibly_sent=error.possibly_sent
            ) from error

    def revive(self, _channel: Any) -> None:
        """Do nothing: a producer sees to its connection itself."""

    def _publish_task(
        self,
        body: Any,
        *,
        exchange: Any = None,
        routing_key: str | None = None,
        declare: Iterable[Any] | None = None,
        compression: str | None = None,
        delivery_mode: Any = None,
        retry: bool = True,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **options: Any,
    ) -> None:
        producer = self._installed.producer()
        patience = confirm_timeout if confirm_timeout is not None else timeout
        deadline = self._deadline = time.monotonic() + (
            producer.settings.publish_timeout if patience is None else patience
        )
        given = given_producer(self._stock)
        if given is not None:  # what it was made with holds where the task says nothing
            exchange = exchange or getattr(given, "exchange", None)
            routing_key = getattr(given, "routing_key", "") if routing_key is None else routing_key
            compression = compression or getattr(given, "compression", None)
        mode = delivery_mode or getattr(exchange, "delivery_mode", None)
        exchange = getattr(exchange, "name", exchange) or ""
        message = self._message(
            body,
            exchange,
            routing_key,
            compression=compression,
            persistent=mode not in (1, "transient"),
            **options,
        )
        if declare:
            self._installed.declare(declare, self._stock, deadline - time.monotonic())
        if exchange == DELAYED:
            self._installed.declare_delays(deadline - time.monotonic())

        def publish(producer: MLProducer) -> Receipt:
            left = max(0.0, deadline - time.monotonic())
            # Celery's sender may say retry=False and try again itself; what the caller said counts.
            return producer.publish(message, timeout=left, retry=self._retry)

        self._installed.declare_dead_letters(self._installed.with_producer(publish))

    def _message(
        self,
        body: Any,
        exchange: str,
        routing_key: str | None,
        *,
        headers: dict[str, Any] | None = None,
        compression: str | None,
        persistent: bool,
        **options: Any,
    ) -> TaskMessage:
        headers = {} if headers is None else headers
        encoded, content_type, encoding = encode(body, options)
        if compression:
            encoded, headers["compression"] = compress(encoded, compression)
        fields = fields_of(options)
        fields.setdefault("message_id", self._task_id)
        args, kwargs = (body["args"], body["kwargs"]) if isinstance(body, dict) else body[:2]
        return TaskMessage(
            name=self._name,
            args=list(args),
            kwargs=kwargs,
            body=encoded,
            exchange=exchange,
            routing_key=routing_key or "",
            headers=plain_headers(headers),
            content_type=content_type,
            content_encoding=encoding or "binary",
            persistent=persistent,
            mandatory=self._mandatory and options.get("mandatory") is not False,
            **fields,
        )

    def _publish_event(
        self,
        body: Any,
        *,
        exchange: Any = None,
        routing_key: str | None = None,
        declare: Iterable[Any] = (),
        headers: dict[str, Any] | None = None,
        delivery_mode: Any = None,
        **options: Any,
    ) -> None:
        try:
            left = max(0.0, self._deadline - time.monotonic())  # of the caller's time for the task
            if not self._installed.declare(declare, self._stock, min(left, EVENT_LIMIT)):
                return  # published to an exchange that is not there, it would cost the channel
            encoded, content_type, encoding = encode(body, options)
            message = TaskMessage(
                name="celery.event",
                body=encoded,
                exchange=getattr(exchange, "name", exchange) or "",
                routing_key=routing_key or "",
                headers=plain_headers(headers or {}),
                content_type=content_type,
                content_encoding=encoding or "binary",
                persistent=delivery_mode not in (1, "transient"),
                mandatory=False,
                **fields_of(options),
            )
            self._installed.producer().submit(message, timeout=0, retry=False)
        except Exception as error:  # noqa: BLE001 - the task is on its way, whatever this raises
            lines = self._installed.lines
            lines.log(logging.WARNING, "an event was not sent:", "%s", type(error).__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)
