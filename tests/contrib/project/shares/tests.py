"""The project's own tests, run by ``manage.py test`` with a broker's URL in the environment."""

import asyncio
import copy
import logging
import os
import pickle
import threading
import unittest
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import skipUnless

from django.conf import settings
from django.contrib.auth.models import User
from django.core import checks
from django.core.management import CommandError, call_command
from django.db import transaction
from django.http import JsonResponse
from django.test import (
    RequestFactory,
    SimpleTestCase,
    TestCase,
    TransactionTestCase,
    override_settings,
)
from django.urls import include, path
from django.utils import timezone
from prometheus_client import REGISTRY

from mlproducer import MLProducer, SummarizationTask
from mlproducer.contrib import django as contrib
from mlproducer.contrib.configured_producer import settings_of
from mlproducer.contrib.django import producer, publish_in_transaction, publish_on_commit
from mlproducer.contrib.django.process import one
from mlproducer.errors import (
    ConfigurationError,
    InvalidMessageError,
    NackError,
    RetriesExhaustedError,
    StoreError,
)
from mlproducer.testing import RecordingProducer
from shares.models import Share
from tests.pages import run, snippets

RUN = "mlproducer.django.run"
ON_COMMIT = {"OPTIONS": {"on_commit": True}}
TASK = SummarizationTask(1, {"text": "some"})
NO_BROKER = {"PRODUCER": "mlproducer.MLProducer", "EXIT_TIMEOUT": 0, "PUBLISH_TIMEOUT": 0.2}


class Published(TestCase):
    """A ``TestCase`` never commits, and so publishes only what is captured."""

    def setUp(self) -> None:
        """Start with nothing published."""
        producer.clear()

    def test_nothing_without_capture(self) -> None:
        """The transaction of a test is rolled back."""
        assert self.client.post("/shares", {"text": "some"}).status_code == 201
        assert producer.published == []

    def test_captured(self) -> None:
        """With ``captureOnCommitCallbacks(execute=True)`` it is published."""
        with self.captureOnCommitCallbacks(execute=True):
            response = self.client.post("/shares", {"text": ["some", "more"]})
        first = response.json()["id"] - 1
        assert producer.published == [
            SummarizationTask(first, {"text": "some"}),
            SummarizationTask(first + 1, {"text": "more"}),
        ]

    def test_rolled_back_savepoint(self) -> None:
        """What a savepoint took back is not published."""
        with self.captureOnCommitCallbacks(execute=True):
            publish_on_commit(TASK)
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                publish_on_commit(SummarizationTask(2, {"text": "gone"}))
                1 / 0  # noqa: B018 - fails
        assert producer.published == [TASK]


class Committed(TransactionTestCase):
    """Real COMMITs and ROLLBACKs."""

    def setUp(self) -> None:
        """Start with nothing published."""
        producer.clear()

    def test_after_commit(self) -> None:
        """It is published once the row is there for others."""
        seen: list[int] = []
        one.current().on("confirmed", lambda: seen.append(Share.objects.count()))
        response = self.client.post("/shares", {"text": "some"})
        assert producer.published == [SummarizationTask(response.json()["id"], {"text": "some"})]
        assert seen == [1]

    def test_rolled_back(self) -> None:
        """After a ROLLBACK there is neither row nor task."""
        self.client.raise_request_exception = False
        assert self.client.post("/shares/broken").status_code == 500
        assert (Share.objects.count(), producer.published) == (0, [])

    def test_behind_a_callback_that_raises(self) -> None:
        """Django calls none behind it, as the page says; behind a robust one it is published."""

        def fails() -> None:
            raise LookupError

        with self.assertRaises(LookupError), transaction.atomic():
            transaction.on_commit(fails)
            publish_on_commit(TASK)
        assert producer.published == []
        with self.assertLogs("django.db.backends.base"), transaction.atomic():
            transaction.on_commit(fails, robust=True)
            publish_on_commit(TASK)
        assert producer.published == [TASK]

    def test_without_transaction(self) -> None:
        """In autocommit it is published at once."""
        publish_on_commit(TASK)
        assert producer.published == [TASK]

    def test_in_transaction(self) -> None:
        """In tests a task of the outbox is noted at COMMIT, and not after a ROLLBACK."""
        self.client.post("/shares/outbox", {"text": "gone", "broken": "1"})
        assert producer.published == []
        self.client.post("/shares/outbox", {"text": "some"})
        assert [task.payload()["content"]["text"] for task in producer.published] == ["some"]
        with self.assertRaises(ConfigurationError):
            publish_in_transaction(TASK)
        with transaction.atomic():
            receipt = publish_in_transaction(TASK)
            assert not receipt.confirmed
        assert receipt.result(0).confirmed

    def test_checked_when_called(self) -> None:
        """What could never be sent fails before the COMMIT, and takes it back."""
        with override_settings(MLPRODUCER={"MAX_MESSAGE_BYTES": 300}):
            with self.assertRaises(InvalidMessageError), transaction.atomic():
                Share.objects.create(text="x")
                publish_on_commit(SummarizationTask(1, {"text": "x" * 300}))
        assert Share.objects.count() == 0

    def test_refused_after_commit(self) -> None:
        """The request goes on; the log, the metrics and ``refused`` tell."""
        told: list[object] = []
        one.current().on("refused", told.append)
        for error in (StoreError("no disk"), NackError(message_id="m")):
            producer.fail_next(error)
        with self.assertLogs("mlproducer.contrib.django", logging.ERROR) as logs:
            assert self.client.post("/shares", {"text": ["a", "b"]}).status_code == 201
        assert [each.detail for each in told] == ["StoreError", "NackError"]
        assert (
            "SummarizationTask was not published after COMMIT: StoreError: no disk"
            in (logs.output[0])
        )
        assert Share.objects.count() == 2

    def test_refused_after_the_request(self) -> None:
        """What is handed over when its time is up, and refused later, is told all the same."""
        told: list[str] = []
        with override_settings(MLPRODUCER={"PUBLISH_TIMEOUT": 1e-6}):
            recording = one.current()
            assert isinstance(recording, RecordingProducer)
            recording.on("refused", lambda event: told.append(event.detail))
            with self.assertLogs("mlproducer.contrib.django", logging.ERROR) as logs:
                with transaction.atomic():
                    publish_on_commit(TASK)
                    publish_on_commit(TASK)
                    publish_on_commit(TASK)
                    transaction.on_commit(partial(recording.fail_next, NackError(message_id="m")))
                    publish_on_commit(TASK)
                    transaction.on_commit(partial(recording.fail_next, RetriesExhaustedError()))
                    publish_on_commit(TASK)
                recording.close()
        assert told == ["NackError"]
        assert "SummarizationTask was not published after COMMIT: NackError" in logs.output[0]
        assert len(recording.published) == 3

    def test_no_url(self) -> None:
        """A URL that is missing is no reason for a 500 after the COMMIT."""
        given = {**NO_BROKER, "URL_FILE": os.devnull}
        labels = {"task_type": "summarize_llm", "status": "rejected"}

        def counted() -> float:
            name = "ml_producer_tasks_sent_total"
            return REGISTRY.get_sample_value(name, labels) or 0.0

        before = counted()
        with override_settings(MLPRODUCER=given):
            with self.assertLogs("mlproducer.contrib.django", logging.ERROR) as logs:
                assert self.client.post("/shares", {"text": "a"}).status_code == 201
        assert "ConfigurationError" in logs.output[0]
        assert counted() == before + 1

    def test_anything_that_is_raised(self) -> None:
        """Whatever is raised after the COMMIT, by a producer of one's own too, is no 500."""
        with override_settings(MLPRODUCER={"PRODUCER": "shares.tests.Broken"}):
            with self.assertLogs("mlproducer.contrib.django", logging.ERROR) as logs:
                assert self.client.post("/shares", {"text": "a"}).status_code == 201
        assert "ZeroDivisionError" in logs.output[0]


class Broken(RecordingProducer):
    """Raises what no producer raises."""

    def publish(self, *_: object, **__: object) -> None:
        """Fail."""
        1 / 0  # noqa: B018 - fails


class Page(TransactionTestCase):
    """What the page of `mlproducer.contrib.django` shows."""

    def test_snippets(self) -> None:
        """Each piece runs, in its order, in one module."""
        page = Path(contrib.__file__).with_name("README.rst")
        told: list[str] = []
        module = {
            "INSTALLED_APPS": [],
            "BASE_DIR": "/srv",
            "urlpatterns": [],
            "path": path,
            "include": include,
            "transaction": transaction,
            "Share": Share,
            "JsonResponse": JsonResponse,
            "TestCase": TestCase,
            "StoreError": StoreError,
            "notify": lambda _message_id, detail: told.append(detail),
        }
        for snippet in snippets(page.read_text()):
            run(snippet, page, module)
        [noted] = producer.published
        assert noted.payload()["content"] == {"text": "some text"}
        module["create"](RequestFactory().post("/shares", {"text": "some"}))
        assert len(producer.published) == 2
        settings_of(module["MLPRODUCER"], "MLPRODUCER")
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(module["Shares"]).run(result)
        assert (result.testsRun, result.errors, result.failures) == (2, [], []), str(
            [text for _, text in result.errors + result.failures]
        )
        assert told == ["StoreError"]

    def setUp(self) -> None:
        """Start with nothing published."""
        producer.clear()


class TheProducer(SimpleTestCase):
    """One for the process, and a recording one in tests."""

    def test_there_is_one(self) -> None:
        """Copies, and pickles from other processes, are the producer of this one."""
        assert copy.copy(producer) is producer
        assert copy.deepcopy({"producer": producer})["producer"] is producer
        assert pickle.loads(pickle.dumps(producer)) is producer

    @override_settings(MLPRODUCER={"HEARTBEAT": 30})
    def test_a_context_manager(self) -> None:
        """It is closed at the end, as any producer."""
        with producer as entered:
            entered.publish(SummarizationTask(1, {"text": "a"}))
        assert producer.closed

    def test_it_records(self) -> None:
        """Although the environment names a broker, a test run does not know it."""
        assert "RABBITMQ_URL" in os.environ
        assert isinstance(producer, RecordingProducer)
        assert isinstance(producer, MLProducer)
        assert "RecordingProducer" in repr(producer)

    def test_one(self) -> None:
        """Each thread has the same."""
        seen = []
        threads = [threading.Thread(target=lambda: seen.append(one.current())) for _ in range(9)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30.0)
        assert len(set(map(id, seen))) == 1

    def test_overridden(self) -> None:
        """Settings that are overridden make another one, and are taken back."""
        before = one.current()
        with override_settings(MLPRODUCER={"PUBLISH_TIMEOUT": 0.7, "CONNECTIONS": None}):
            assert producer.settings.publish_timeout == 0.7
            assert one.current() is not before
        assert producer.settings.publish_timeout == 5.0

    def test_hooks_outlive_it(self) -> None:
        """What was added is told by the next one too."""
        told: list[object] = []
        producer.on("confirmed", told.append)
        with override_settings(MLPRODUCER={}):
            producer.publish(TASK)
        assert len(told) == 1


class Checks(SimpleTestCase):
    """What ``manage.py check`` finds."""

    def _ids(self, **given: object) -> list[str]:
        with override_settings(MLPRODUCER=given):
            found = checks.run_checks(tags=["mlproducer"], include_deployment_checks=True)
        return [each.id for each in found]

    def test_bad_settings(self) -> None:
        """A key that is wrong, in spelling or value, and a producer that cannot be imported."""
        assert self._ids(STORE_ULR="memory://") == ["mlproducer.E001"]
        assert self._ids(store_url="memory://") == ["mlproducer.E001"]
        assert self._ids(CONNECTIONS="many") == ["mlproducer.E001"]
        assert self._ids(PRODUCER="nowhere.Producer") == ["mlproducer.E001"]
        assert self._ids(PRODUCER="json.dumps") == ["mlproducer.E001"]
        with override_settings(MLPRODUCER="amqp://"):
            assert checks.run_checks(tags=["mlproducer"])[0].id == "mlproducer.E001"

    def test_no_url(self) -> None:
        """A broker that is not named, or by a file that cannot be read."""
        nowhere = {**NO_BROKER, "URL_FILE": "/nowhere", "STORE_URL": "sqlite:////tmp/x.db"}
        assert self._ids(**nowhere) == ["mlproducer.E002"]

    def test_store(self) -> None:
        """With ``--deploy``, a store that forgets."""
        assert self._ids(**NO_BROKER) == ["mlproducer.W003"]
        assert self._ids(**NO_BROKER, STORE_URL="sqlite:////tmp/x.db") == []

    def test_error_names_the_setting(self) -> None:
        """So that it can be found."""
        with override_settings(MLPRODUCER={"STORE_ULR": "x"}):
            with self.assertRaisesRegex(ConfigurationError, "MLPRODUCER: .*store_url"):
                producer.publish(TASK)


class Pages(TestCase):
    """Health and metrics for all, the page for staff."""

    def test_health(self) -> None:
        """503 before the first use, with a reason for staff; then 200."""
        with override_settings(MLPRODUCER={}):
            cold = self.client.get("/ml/health")
            assert cold.status_code == 503
            assert "reason" not in cold.json()
            self._log_in()
            assert "reason" in self.client.get("/ml/health").json()
            producer.start()
            warm = self.client.get("/ml/health")
            assert (warm.status_code, warm.json()["healthy"]) == (200, True)

    def test_metrics(self) -> None:
        """As Prometheus reads them, and summed up."""
        producer.publish(TASK)
        assert b"ml_producer_connection_state" in self.client.get("/ml/metrics").content
        assert "tasks" in self.client.get("/ml/metrics/json").json()
        assert self.client.post("/ml/metrics").status_code == 405
        assert self.client.head("/ml/metrics").content == b""

    def test_page(self) -> None:
        """Others are sent to log in, or refused."""
        away = self.client.get("/ml/")
        assert (away.status_code, away["Location"]) == (302, "/accounts/login/?next=/ml/")
        assert self.client.get("/ml/page.json").status_code == 403
        self._log_in(is_staff=False)
        assert self.client.get("/ml/").status_code == 403
        self._log_in()
        page = self.client.get("/ml/")
        assert "script-src 'sha256-" in page["Content-Security-Policy"]
        assert b"page.json" in page.content
        assert self.client.get("/ml/page.json").status_code == 200

    def _log_in(self, *, is_staff: bool = True) -> None:
        user = User.objects.create_user(f"user-{is_staff}", is_staff=is_staff)
        self.client.force_login(user)


class Commands(SimpleTestCase):
    """``manage.py mlproducer ...``."""

    def test_settings_are_djangos(self) -> None:
        """The broker is the one in Django's settings; the exit code is the command's."""
        given = {"URL": "amqp://u:p@127.0.0.1:1/", "CONNECTION_TIMEOUT": 1.0}
        with override_settings(MLPRODUCER=given), self.assertRaises(CommandError) as raised:
            call_command("mlproducer", "check", "--json")
        assert raised.exception.returncode == 1


try:
    import django.tasks as django_tasks
except ImportError:
    django_tasks = None


@skipUnless(django_tasks, "django.tasks came with Django 6")
class Tasks(TestCase):
    """``django.tasks``."""

    def setUp(self) -> None:
        """Start with nothing published."""
        from shares import background

        self.background = background
        producer.clear()

    def test_enqueue(self) -> None:
        """It is published when it is enqueued, for the queue where Celery's workers look."""
        result = self.background.add.enqueue(1, b=2)
        [message] = producer.published
        assert (message.name, message.task_id) == (RUN, result.id)
        assert (message.exchange, message.routing_key) == ("", "celery")
        path, args, kwargs, _ = message.payload()["args"]
        assert (path, args, kwargs) == ("shares.background.add", [1], {"b": 2})
        assert result.enqueued_at is not None

    def test_queue_priority_and_time(self) -> None:
        """They go with it."""
        later = timezone.now() + timedelta(hours=1)
        task = self.background.add.using(queue_name="slow", priority=55, run_after=later)
        task.enqueue(1, 2)
        task.using(priority=-5).enqueue(1, 2)
        first, second = producer.published
        assert (first.routing_key, first.priority, first.eta) == ("slow", 6, later)
        assert second.priority == 0

    def test_from_an_event_loop(self) -> None:
        """It is awaited."""
        assert asyncio.run(self.background.add.aenqueue(1, 2)).id
        assert len(producer.published) == 1

    def test_refused(self) -> None:
        """What is not ours is raised."""
        producer.fail_next(StoreError("no disk"))
        with self.assertRaises(StoreError):
            self.background.add.enqueue(1, 2)

    def test_on_commit(self) -> None:
        """As an option, after the COMMIT."""
        with override_settings(TASKS={"default": {**settings.TASKS["default"], **ON_COMMIT}}):
            with self.captureOnCommitCallbacks() as callbacks:
                self.background.add.enqueue(1, 2)
                assert producer.published == []
            [publish] = callbacks
            publish()
        assert len(producer.published) == 1
