"""An app whose tasks go through a producer: what is handed over, refused, counted, left alone."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import celery
import pytest
from celery import Celery, chain, group
from celery.signals import after_task_publish, before_task_publish
from kombu import Connection, Exchange, Queue
from kombu.common import Broadcast
from kombu.exceptions import OperationalError
from pika import spec
from prometheus_client import CollectorRegistry

from mlproducer import MLProducer, Settings
from mlproducer.contrib.celery import (
    PublishFailedError,
    TaskMessage,
    brokers,
    install,
    producer_of,
    uninstall,
)
from mlproducer.errors import (
    CircuitOpenError,
    ConfigurationError,
    ConfirmTimeoutError,
    NotConnectedError,
)
from mlproducer.testing import RecordingProducer
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT
from tests.stopwatch import in_time

NOWHERE = "amqp://u:p@192.0.2.1:1//"
"""No test here connects: what would be sent is only noted."""

WAY = "ml_producer_celery_tasks_total"


class Noting(RecordingProducer):
    """Notes with what options tasks were published too."""

    def __init__(self) -> None:
        super().__init__(Settings(), registry=CollectorRegistry())
        self.options: list[tuple[float | None, Any]] = []

    def publish(self, task: Any, *, timeout: float | None = None, retry: Any = True) -> Any:
        """Note them."""
        self.options.append((timeout, retry))
        return super().publish(task, timeout=timeout, retry=retry)

    @property
    def tasks(self) -> list[TaskMessage]:
        """What was published, but for events."""
        found = [each for each in self.published if isinstance(each, TaskMessage)]
        return [each for each in found if each.name != "celery.event"]


@pytest.fixture
def producer() -> Iterator[Noting]:
    """A producer that notes."""
    with Noting() as noting:
        yield noting


@pytest.fixture
def app(producer: Noting) -> Iterator[Celery]:
    """An app with a task, sent through it."""
    app = Celery("shop", broker=NOWHERE, set_as_current=False)
    app.conf.task_ignore_result = True

    @app.task(name="shop.add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    install(app, producer)
    yield app
    uninstall(app)


def test_a_task_is_handed_over(app: Celery, producer: Noting) -> None:
    """As Celery has made it, under its id, persistent, and refused where no queue gets it."""
    result = app.tasks["shop.add"].delay(1, 2)
    [task] = producer.tasks
    assert (task.name, task.args, task.kwargs) == ("shop.add", [1, 2], {})
    assert task.message_id == task.correlation_id == result.id
    assert (task.exchange, task.routing_key) == ("", "celery")
    assert (task.persistent, task.mandatory) == (True, True)
    assert json.loads(task.payload())[0] == [1, 2]
    assert task.headers is not None
    assert (task.headers["task"], task.headers["id"]) == ("shop.add", result.id)
    assert task.task_type == "shop.add"
    assert "1" not in repr(task).partition("args")[2]


def test_a_closed_producer_is_not_kept(app: Celery, producer: Noting) -> None:
    """A test's fixture closes it; what is installed next goes by the app's settings again."""
    install(app)
    assert producer_of(app) is producer
    producer.close()
    with pytest.raises(PublishFailedError, match="closed"):
        app.tasks["shop.add"].delay(1, 2)
    install(app)
    assert producer_of(app) is not producer
    assert "192.0.2.1" in producer_of(app).settings.url


def test_options_reach_the_message(app: Celery, producer: Noting) -> None:
    """Properties, headers of every type, serialiser, compression and stamps."""
    app.tasks["shop.add"].apply_async(
        (1, 2),
        priority=3,
        expires=60,
        compression="zlib",
        serializer="json",
        reply_to="answers",
        headers={"a": "b", "f": 1.5, "t": (1, 2)},
        task_id="mine",
        app_id="shop",
        delivery_mode="transient",
        shadow="sum",
    )
    app.send_task("other.task", (), message_id="own", type="kind")
    first, second = producer.tasks
    assert (first.priority, first.expiration, first.reply_to) == (3, 60, "answers")
    assert (first.app_id, first.persistent, first.message_id) == ("shop", False, "mine")
    assert first.headers is not None
    assert first.headers["compression"] == "application/x-gzip"
    assert (first.headers["f"], first.headers["t"]) == (1.5, [1, 2])
    assert first.headers["shadow"] == "sum"
    assert (second.message_id, second.type, second.priority) == ("own", "kind", 0)


def test_a_kombu_producer_of_the_senders(app: Celery, producer: Noting) -> None:
    """What it was made with holds where the task says nothing, as in stock Celery."""
    with Connection(NOWHERE) as connection:
        jobs = Exchange("jobs", "direct")
        chosen = app.amqp.Producer(connection, jobs, compression="bzip2", auto_declare=False)
        app.send_task("shop.add", (1, 2), producer=chosen)
        other = {"exchange": "other", "routing_key": "x", "compression": "zlib"}
        app.send_task("shop.add", (1, 2), producer=chosen, **other)
    first, second = producer.tasks
    assert (first.exchange, first.routing_key) == ("jobs", "celery")
    assert (second.exchange, second.routing_key) == ("other", "x")
    compressed = [each.headers["compression"] for each in (first, second) if each.headers]
    assert compressed == ["application/x-bz2", "application/x-gzip"]


def test_an_exchange_tells_the_delivery_mode(app: Celery, producer: Noting) -> None:
    """Where neither the task nor Celery's settings do."""
    app.conf.task_default_delivery_mode = None
    for jobs in (Exchange("jobs", delivery_mode="transient"), Exchange("jobs")):
        app.send_task("shop.add", (1, 2), exchange=jobs, routing_key="x")
    assert [each.persistent for each in producer.tasks] == [False, True]


FIRST_TASK = """
import sys
from celery import Celery, signals
from mlproducer.contrib.celery import PublishFailedError, install
app = Celery(broker="amqp://127.0.0.1:1//")
install(app)
signals.worker_before_create_process.send(sender=None)
before = set(sys.modules)
try:
    app.send_task("shop.add", ignore_result=True, retry=False, confirm_timeout=0.1)
except PublishFailedError:
    print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] in OURS))
"""


def test_children_import_nothing_of_their_own() -> None:
    """With ``worker_max_tasks_per_child`` each would spend more on that than on its tasks."""
    script = FIRST_TASK.replace("OURS", "('mlproducer', 'pika', 'prometheus_client')")
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT * 2, check=True)
    assert done.stdout.split("\n") == ["", ""], done.stdout + done.stderr


def test_what_the_caller_says_about_waiting(app: Celery, producer: Noting) -> None:
    """``retry`` and ``confirm_timeout`` are the producer's; without them, its settings hold."""
    add = app.tasks["shop.add"]
    add.delay(1, 2)
    add.apply_async((1, 2), retry=False, confirm_timeout=2.0)
    app.conf.task_publish_retry = False
    add.delay(1, 2)
    (usual, kept), (short, given_back), (_, by_settings) = producer.options
    assert usual == pytest.approx(5.0, abs=0.5)
    assert short == pytest.approx(2.0, abs=0.5)
    assert (kept, given_back, by_settings) == (True, False, False)


def test_a_refusal_is_an_operational_error(app: Celery, producer: Noting) -> None:
    """Existing ``except`` clauses hold; the cause says why, and what may have become of it."""
    for error in (CircuitOpenError("open", retry_after=1.0), ConfirmTimeoutError("late")):
        producer.fail_next(error)
        with pytest.raises(OperationalError, match=r"shop\.add") as caught:
            app.tasks["shop.add"].delay(1, 2)
        assert isinstance(caught.value, PublishFailedError)
        assert caught.value.__cause__ is error
        assert caught.value.possibly_sent is error.possibly_sent
    with pytest.raises(PublishFailedError):
        app.tasks["shop.add"].apply_async((1, 2), headers={"bad": object()})
    assert producer.tasks == []


def test_celery_routes(app: Celery, producer: Noting) -> None:
    """By its settings, names and arguments; its queues are declared once, with its arguments."""
    app.conf.task_queues = [
        Queue("fast", Exchange("jobs", type="topic"), "fast.#", queue_arguments={"x-max-length": 9})
    ]
    app.conf.task_routes = {"shop.*": {"queue": "fast", "routing_key": "fast.add"}}
    add = app.tasks["shop.add"]
    add.delay(1, 2)
    add.delay(1, 2)
    add.apply_async((1, 2), queue="new")
    first, _, third = producer.tasks
    assert (first.exchange, first.routing_key) == ("jobs", "fast.add")
    assert third.routing_key == "new"
    named = [(each.method, dict(each.arguments)) for each in producer.declared]
    assert named[:3] == [
        ("exchange_declare", {"exchange": "jobs", "exchange_type": "topic", "durable": True}),
        ("queue_declare", {"queue": "fast", "durable": True, "arguments": {"x-max-length": 9}}),
        ("queue_bind", {"queue": "fast", "exchange": "jobs", "routing_key": "fast.#"}),
    ]
    assert [each.target for each in producer.declared[3:]].count("new") >= 1
    assert sum(method == "queue_declare" for method, _ in named) == 2


def test_a_broadcast_may_reach_nobody(app: Celery, producer: Noting) -> None:
    """It is sent to those that listen, and is no failure where nothing does."""
    app.conf.task_queues = [Broadcast("news"), Queue("celery")]
    app.tasks["shop.add"].apply_async((1, 2), queue="news")
    [task] = producer.tasks
    assert (task.exchange, task.mandatory) == ("news", False)


def test_a_delay_on_quorum_queues(app: Celery, producer: Noting) -> None:
    """Celery's delayed delivery is there before the task, also on a fresh virtual host."""
    if celery.VERSION[:2] < (5, 5):
        pytest.skip("this Celery has none")
    topic = Exchange("jobs", type="topic")
    app.conf.task_queues = [
        Queue("slow", topic, "slow", queue_arguments={"x-queue-type": "quorum"})
    ]
    app.conf.task_default_queue = "slow"
    app.tasks["shop.add"].apply_async((1, 2), countdown=5)
    [task] = producer.tasks
    assert task.exchange == "celery_delayed_27"
    assert task.routing_key.endswith("1.0.1.slow")
    targets = [each.target for each in producer.declared]
    assert {"slow", "celery_delayed_0", "celery_delayed_delivery"} <= set(targets)
    count = len(targets)
    app.tasks["shop.add"].apply_async((1, 2), countdown=5)
    assert len(producer.declared) == count


def test_signals_and_events(app: Celery, producer: Noting) -> None:
    """Both signals, around the confirm; the event is published beside, and harms nothing."""
    app.conf.task_send_sent_event = True
    told: list[Any] = []

    def before(**given: Any) -> None:
        told.append(("before", len(producer.tasks)))
        given["headers"]["from_signal"] = 1

    def after(**_: Any) -> None:
        told.append(("after", len(producer.tasks)))

    before_task_publish.connect(before)
    after_task_publish.connect(after)
    try:
        app.tasks["shop.add"].delay(1, 2)
    finally:
        before_task_publish.disconnect(before)
        after_task_publish.disconnect(after)
    assert told == [("before", 0), ("after", 1)]
    assert producer.tasks[0].headers is not None
    assert producer.tasks[0].headers["from_signal"] == 1
    event = producer.published[1]
    assert isinstance(event, TaskMessage)
    assert (event.exchange, event.routing_key) == ("celeryev", "task.sent")
    assert json.loads(event.body)["type"] == "task-sent"
    assert not event.mandatory


class Deaf(Behaviour):
    """Answers nothing once it has let the client in."""

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, but for declarations."""
        if not isinstance(method, spec.Exchange.Declare):
            super().on_method(connection, channel, method)

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Confirm nothing."""


def test_an_event_takes_no_time_of_its_own() -> None:
    """A call is back when its time is up, also where the events' exchange cannot be declared."""
    settings = {"declare_topology": "off", "publish_timeout": 10.0}
    with FakeBroker(Deaf()) as broker:
        producer = MLProducer(Settings(url=broker.url, **settings), registry=CollectorRegistry())
        app = Celery("shop", broker=broker.url, set_as_current=False)
        app.conf.update(task_ignore_result=True, task_send_sent_event=True)
        install(app, producer)
        assert producer.wait_connected(LIMIT)
        with in_time(0.2 + 0.25, 0.2):
            app.send_task("shop.add", queue=Queue("", no_declare=True), confirm_timeout=0.2)
        uninstall(app)
        producer.close(0.0)


def test_an_event_that_fails_is_logged(
    app: Celery,
    producer: Noting,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task has been sent."""
    app.conf.task_send_sent_event = True
    monkeypatch.setattr(producer, "submit", lambda *_, **__: 1 / 0)
    assert app.tasks["shop.add"].delay(1, 2).id
    assert "an event was not sent: ZeroDivisionError" in caplog.messages


def test_protocol_1(app: Celery, producer: Noting) -> None:
    """Its message is a dictionary, and has the id inside."""
    app.conf.task_protocol = 1
    result = app.tasks["shop.add"].delay(1, 2)
    [task] = producer.tasks
    assert (task.message_id, task.args) == (result.id, [1, 2])
    assert json.loads(task.payload())["task"] == "shop.add"


def test_canvas(app: Celery, producer: Noting) -> None:
    """A group is as many tasks; a chain is its first one, which carries the rest."""
    add = app.tasks["shop.add"]
    group([add.s(i, i) for i in range(3)], app=app).apply_async()
    chain(add.s(1, 2), add.s(3), app=app).apply_async()
    assert [task.args for task in producer.tasks] == [[0, 0], [1, 1], [2, 2], [1, 2]]


def test_eager_tasks_are_left_alone(app: Celery, producer: Noting) -> None:
    """They run at once, and nothing is sent."""
    app.conf.task_always_eager = True
    app.conf.task_store_eager_result = False
    assert app.tasks["shop.add"].delay(1, 2).get() == 3
    assert producer.published == []


# --- the share that goes through ---------------------------------------------------------------


def ways(producer: Noting) -> list[float]:
    """How many tasks went through the producer, and how many by Celery's own way."""
    value = producer.registry.get_sample_value
    return [value(WAY, {"way": way}) or 0.0 for way in ("producer", "celery")]


@pytest.fixture
def stock(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of tasks that Celery's own sender was given a producer of Celery's for."""
    sent: list[str] = []
    app.producer_or_acquire()  # Celery's sender is replaced with the first task
    installed = app.__dict__["_mlproducer"]
    monkeypatch.setattr(
        "mlproducer.contrib.celery.sending.real_producer", lambda producer: producer
    )
    before = installed._stock

    def send(producer: Any, name: str, message: Any, **options: Any) -> Any:
        if type(producer).__name__ == "TaskProducer":
            return before(producer, name, message, **options)
        sent.append(message.headers["id"])
        return None

    installed._stock = send
    return sent


def test_a_share_by_id(app: Celery, producer: Noting, stock: list[str]) -> None:
    """About that share, the same ids each time, both counted; 0 at run time is the way back."""
    add = app.tasks["shop.add"]
    ids = [f"id-{number}" for number in range(400)]
    for task_id in ids:
        add.apply_async((1, 2), task_id=task_id)
    assert stock == []
    producer.clear()
    install(app, rollout=0.25)
    for task_id in ids:
        add.apply_async((1, 2), task_id=task_id)
    chosen = [task.message_id for task in producer.tasks]
    assert 60 < len(chosen) < 140
    assert sorted([*chosen, *stock]) == sorted(ids)
    for task_id in ids:
        add.apply_async((1, 2), task_id=task_id)
    assert [task.message_id for task in producer.tasks] == chosen * 2
    producer.clear()
    stock.clear()
    install(app, rollout=0.0)
    add.delay(1, 2)
    assert (len(producer.tasks), len(stock)) == (0, 1)
    install(app, rollout=lambda name: name == "shop.add")
    add.delay(1, 2)
    app.send_task("shop.other")
    assert (len(producer.tasks), len(stock)) == (1, 2)
    assert ways(producer) == [400 + 2 * len(chosen) + 1, 2 * (400 - len(chosen)) + 2]


def test_a_share_by_the_settings(stock: list[str], app: Celery) -> None:
    """``ML_ROLLOUT`` holds where nothing is given."""
    with RecordingProducer(Settings(rollout=0.0)) as producer:
        install(app, producer)
        app.tasks["shop.add"].delay(1, 2)
        assert (len(producer.published), len(stock)) == (0, 1)


def test_a_callable_that_raises(
    app: Celery, producer: Noting, stock: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The tasks are sent, by Celery's own way; a few lines tell, however many there are."""
    install(app, rollout=lambda _: 1 / 0)
    for _ in range(20):
        app.tasks["shop.add"].delay(1, 2)
    assert len(stock) == 20
    assert len([each for each in caplog.messages if "ZeroDivisionError" in each]) == 5


@pytest.mark.parametrize("rollout", [-0.1, 1.1, "1", True, float("nan")])
def test_a_share_that_is_none(app: Celery, rollout: Any) -> None:
    """It is refused, and nothing changes."""
    with pytest.raises(ConfigurationError, match="rollout"):
        install(app, rollout=rollout)


def test_another_broker_of_the_callers_own(app: Celery, producer: Noting, stock: list[str]) -> None:
    """A task that is sent on a connection to it does not go to the app's broker."""
    with Connection("amqp://u:p@192.0.2.2:1//") as other, Connection(NOWHERE) as same:
        app.tasks["shop.add"].apply_async((1, 2), connection=other)
        app.tasks["shop.add"].apply_async((1, 2), connection=same)
    assert (len(stock), len(producer.tasks)) == (1, 1)


# --- the producer that is made from the app's settings -----------------------------------------


def make(monkeypatch: pytest.MonkeyPatch, **conf: Any) -> Settings:
    """Return the settings of the producer that is made for an app."""
    for name in ("RABBITMQ_URL", "ML_ROLLOUT", "ML_STORE_URL"):
        monkeypatch.delenv(name, raising=False)
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    install(app)
    try:
        return producer_of(app).settings
    finally:
        uninstall(app)


def test_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's broker; it declares nothing; the rest is the environment's."""
    monkeypatch.setenv("ML_PUBLISH_TIMEOUT", "1500")
    monkeypatch.setenv("ML_DECLARE_TOPOLOGY", "active")
    settings = make(monkeypatch, broker_url="pyamqp://us%40er:p%2Fw@example.org:5673/v%2Fh")
    [broker] = settings.brokers
    assert (broker.host, broker.port, broker.virtual_host) == ("example.org", 5673, "v/h")
    assert (broker.user, broker.password, broker.tls) == ("us@er", "p/w", False)
    assert (settings.publish_timeout, settings.declare_topology) == (1.5, "off")


def test_several_brokers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failover list, in either of Celery's forms; what is written to counts."""
    both = ["amqp://u:p@a.example//", "amqp://u:p@b.example:5673/v"]
    for urls in (both, ";".join(both)):
        settings = make(monkeypatch, broker_url="redis://x", broker_write_url=urls)
        found = [(each.host, each.port, each.virtual_host) for each in settings.brokers]
        assert found == [("a.example", 5672, "/"), ("b.example", 5673, "v")]


def test_several_brokers_that_know_the_client_by_its_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``broker_login_method`` holds for each; no password is made up."""
    urls = ["amqps://a.example//", "amqps://b.example//"]
    for given in (urls[0], urls):
        settings = make(monkeypatch, broker_url=given, broker_login_method="EXTERNAL")
        assert settings.auth_mechanism == "EXTERNAL"
        assert {each.user for each in settings.brokers} == {""}


def test_tls(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """``broker_use_ssl`` in its forms, and ``amqps://``; certificates are checked unless told."""
    url = "amqp://u:p@example.org:5671//"
    [plain] = make(monkeypatch, broker_url=url, broker_use_ssl=True).brokers
    assert plain.tls
    assert plain.tls_settings is not None
    assert plain.tls_settings.verify_peer
    options = {"ca_certs": "ca.pem", "certfile": "c.pem", "keyfile": "k.pem", "ciphers": "x"}
    [full] = make(monkeypatch, broker_url=url, broker_use_ssl=options).brokers
    assert full.tls_settings is not None
    assert (full.tls_settings.ca_certs, full.tls_settings.keyfile) == ("ca.pem", "k.pem")
    assert "broker_use_ssl: ciphers has no meaning here" in caplog.messages
    loose = make(monkeypatch, broker_url=url, broker_use_ssl={"cert_reqs": ssl.CERT_NONE})
    assert loose.brokers[0].tls_settings is not None
    assert not loose.brokers[0].tls_settings.verify_peer
    assert make(monkeypatch, broker_url="amqps://u:p@example.org//").brokers[0].tls


@pytest.mark.parametrize("url", ["redis://:secret@h", "memory://", "amqp://h;redis://h"])
def test_no_rabbitmq(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Another broker is refused, by install() or, where it knows none yet, by the first task."""
    with pytest.raises(ConfigurationError, match="must be RabbitMQ") as caught:
        install(Celery("shop", broker=url, set_as_current=False))
    assert "secret" not in str(caught.value)
    app = Celery("shop", set_as_current=False)
    install(app)
    app.conf.broker_url = url
    with pytest.raises(ConfigurationError, match="must be RabbitMQ"):
        app.send_task("t", ignore_result=True)


def test_settings_are_read_with_the_first_task() -> None:
    """So that these two lines may stand before the app's settings can be loaded."""
    loaded: list[str] = []

    class Source:
        @property
        def broker_url(self) -> str:
            loaded.append("now")
            return NOWHERE

    app = Celery("shop", set_as_current=False)
    app.config_from_object(Source())
    install(app)
    assert loaded == []
    uninstall(app)


def test_uninstall(app: Celery, producer: Noting) -> None:
    """Celery sends by itself again; install() may follow any number of times."""
    for _ in range(3):
        install(app, producer)
    app.tasks["shop.add"].delay(1, 2)
    before: Callable[..., Any] = app.amqp.send_task_message
    uninstall(app)
    uninstall(app)
    assert app.amqp.send_task_message != before
    assert "producer_or_acquire" not in app.__dict__
    with pytest.raises(ConfigurationError, match="no producer is installed"):
        producer_of(app)
    assert producer.publish(producer.tasks[0]).confirmed  # a given one stays open


@pytest.mark.parametrize("replace", [uninstall, install])
def test_a_producer_that_is_closed_amid_a_task(
    producer: Noting, replace: Callable[..., None]
) -> None:
    """The task is sent all the same, by the producer that has taken its place."""
    with FakeBroker() as broker:
        app = Celery("other", broker=broker.url, set_as_current=False)
        install(app)
        made = producer_of(app)

        def meanwhile(*_: Any) -> None:
            if replace is install:
                install(app, producer)
            else:
                uninstall(app)
            made.close()

        made.before_publish(meanwhile)
        sent = app.send_task("shop.add", ignore_result=True)
        ids = [each.properties.message_id for each in broker.messages if each.tag]
        assert [*ids, *(each.message_id for each in producer.tasks)] == [sent.id]
        uninstall(app)
        gc.collect()  # one that took its place after uninstall() is closed once nothing holds it
        broker.wait_for_connections(0, timeout=LIMIT)


def test_a_producer_given_later(app: Celery, producer: Noting) -> None:
    """The one that was made from the app's settings before ends once it has nothing to deliver."""
    with FakeBroker() as broker:
        other = Celery("other", broker=broker.url, set_as_current=False)
        install(other)
        other.send_task("shop.add", ignore_result=True)
        broker.wait_for_connections(1, timeout=LIMIT)
        install(other, producer)
        other.send_task("shop.add", ignore_result=True)
        assert [each.name for each in producer.tasks] == ["shop.add"]
        gc.collect()
        broker.wait_for_connections(0, timeout=LIMIT)
        uninstall(other)


def test_no_connection_is_opened(
    app: Celery, producer: Noting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor a slot of Celery's pool held, whatever is sent."""

    def connects(*_: Any, **__: Any) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr("kombu.connection.Connection._connection_factory", connects)
    app.conf.broker_pool_limit = 1
    moment = datetime.now(timezone.utc) + timedelta(seconds=60)
    app.tasks["shop.add"].apply_async((1, 2), eta=moment)
    app.send_task("other", ignore_result=True)
    producer.fail_next(NotConnectedError("away"))
    with pytest.raises(PublishFailedError):
        app.tasks["shop.add"].delay(1, 2)
    assert len(producer.tasks) == 2
    assert logging.getLogger("mlproducer.contrib.celery").name not in caplog.text


def test_a_signal_handler_may_send(app: Celery, producer: Noting) -> None:
    """Also while its thread is in the middle of the app's first task."""
    installed = app.__dict__["_mlproducer"]
    with installed._lock:
        app.tasks["shop.add"].delay(1, 2)
    assert len(producer.tasks) == 1
    assert installed._stock != installed.send_task_message


def test_the_callers_error_is_small(app: Celery, producer: Noting) -> None:
    """It can be pickled, as a worker does with what a task raises, and shows no argument."""
    producer.fail_next(NotConnectedError("away"))
    with pytest.raises(PublishFailedError) as caught:
        app.tasks["shop.add"].delay("secret", 2)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == "task shop.add was not sent: away"
    assert copy.possibly_sent is False
    assert "secret" not in repr(caught.value.__cause__)


def test_the_current_app(producer: Noting) -> None:
    """Celery's proxy stands for the app that was the current one then."""
    with Celery("first", broker=NOWHERE) as first, Celery("second", broker=NOWHERE) as second:
        first.set_current()
        install(celery.current_app, producer)
        second.set_current()
        first.send_task("shop.add")
        assert [task.name for task in producer.tasks] == ["shop.add"]
        assert type(first.__dict__["_mlproducer"]._app) is Celery
        first.set_current()
        uninstall(celery.current_app)
        assert "_mlproducer" not in first.__dict__


def test_a_fork_while_another_thread_makes_the_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child does not wait for that thread, which it has not."""
    app = Celery("shop", broker=NOWHERE, set_as_current=False)
    install(app)
    begun, go_on = threading.Event(), threading.Event()
    make, parent = brokers.producer_of_settings, os.getpid()

    def slow(app: Celery) -> MLProducer:
        if os.getpid() == parent:
            begun.set()
            go_on.wait(LIMIT)
        return make(app)

    monkeypatch.setattr(brokers, "producer_of_settings", slow)
    thread = threading.Thread(target=producer_of, args=(app,))
    thread.start()
    assert begun.wait(LIMIT)
    child = multiprocessing.get_context("fork").Process(target=producer_of, args=(app,))
    child.start()
    child.join(LIMIT)
    ended = child.exitcode
    child.kill()
    go_on.set()
    thread.join(LIMIT)
    uninstall(app)
    assert ended == 0


def test_threads_that_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one producer made, and Celery's sender replaced once."""
    app = Celery("shop", broker=NOWHERE, set_as_current=False)
    install(app)
    installed = app.__dict__["_mlproducer"]
    found: list[Any] = []

    def work() -> None:
        app.producer_or_acquire()
        found.append(producer_of(app))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(set(map(id, found))) == 1
    assert installed._stock != installed.send_task_message
    uninstall(app)
