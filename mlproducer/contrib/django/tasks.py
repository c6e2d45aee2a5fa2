"""The ``django.tasks`` backend of Django 6, and the Celery task that runs what it sends.

Settings::

    TASKS = {"default": {"BACKEND": "mlproducer.contrib.django.tasks.Backend"}}

A Celery worker of the project finds `run` by ``app.autodiscover_tasks()``, as any other task.
Without Django 6 this module has no backend, and without Celery no `run`.

Runs on: Django's threads; `run` in a Celery worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from traceback import format_exception
from typing import Any
from uuid import uuid4

from django.utils import timezone

from mlproducer import CeleryTask
from mlproducer.contrib.django.process import producer
from mlproducer.contrib.django.publishing import publish_on_commit
from mlproducer.errors import ConfigurationError

try:
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import Task, TaskContext, TaskError, TaskResult, TaskResultStatus
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
    from django.utils.module_loading import import_string
except ImportError:  # Django 5 and before; a worker looks into this module all the same
    BaseTaskBackend = None

try:
    from celery import shared_task
except ImportError:  # a web process needs none
    shared_task = None

RUN = "mlproducer.django.run"
"""The Celery task that runs any of Django's tasks."""

QUEUE = "celery"
"""The queue that a Celery worker consumes by default."""

OPTIONS = {"exchange", "routing_keys", "on_commit"}


def __getattr__(name: str) -> Any:
    if name == "Backend":
        raise ImportError("mlproducer.contrib.django.tasks.Backend needs Django 6 or later")
    raise AttributeError(name)


if BaseTaskBackend is not None:

    class Backend(BaseTaskBackend):
        """Publishes Django's tasks for Celery workers.

        ``OPTIONS``:

        - ``exchange`` (``""``, by which a routing key is a queue's name);
        - ``routing_keys``: for names of queues; ``{"default": "celery"}`` unless it says otherwise,
          and a queue's own name where it has none;
        - ``on_commit`` (False): publish after the COMMIT, as `publish_on_commit`.

        A priority from 1 to 100 becomes 1 to 10 of AMQP, a negative one 0. Results are not kept.

        :raises ConfigurationError: an option is unknown
        """

        supports_defer = True
        supports_async_task = True
        supports_priority = True

        def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
            super().__init__(alias, params)
            unknown = self.options.keys() - OPTIONS
            if unknown:
                raise ConfigurationError(f"TASKS: no option {', '.join(sorted(unknown))}")
            self._exchange: str = self.options.get("exchange", "")
            keys = self.options.get("routing_keys", {})
            self._routing_keys: Mapping[str, str] = {"default": QUEUE, **keys}

        def enqueue(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TaskResult:
            """Publish a task; a call that returns has the promise of `MLProducer.publish`.

            :raises PublishError: the task is not sent, now or later
            """
            result, message = self._prepared(task, args, kwargs)
            if self.options.get("on_commit"):
                publish_on_commit(message)
            else:
                producer.publish(message)
            return self._enqueued(result)

        async def aenqueue(
            self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> TaskResult:
            """Publish a task from an event loop, at once.

            :raises PublishError: the task is not sent, now or later
            """
            result, message = self._prepared(task, args, kwargs)
            await producer.apublish(message)
            return self._enqueued(result)

        def _prepared(
            self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> tuple[TaskResult, CeleryTask]:
            self.validate_task(task)
            result = _result(task, str(uuid4()), args, kwargs, TaskResultStatus.READY)
            about = {
                "backend": self.alias,
                "queue_name": task.queue_name,
                "priority": task.priority,
                "enqueued_at": timezone.now().isoformat(),
            }
            message = CeleryTask(
                RUN,
                args=(task.module_path, result.args, result.kwargs, about),
                kwargs={},
                routing_key=self._routing_keys.get(task.queue_name, task.queue_name),
                exchange=self._exchange,
                eta=task.run_after,
                priority=_amqp_priority(task.priority),
                argsrepr=f"({task.module_path})",  # what monitors and a worker's log show
                task_id=result.id,
            )
            return result, message

        def _enqueued(self, result: TaskResult) -> TaskResult:
            object.__setattr__(result, "enqueued_at", timezone.now())
            task_enqueued.send(type(self), task_result=result)
            return result

    def _result(
        task: Task,
        result_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        status: TaskResultStatus,
        **more: Any,
    ) -> TaskResult:
        fields = {
            "enqueued_at": None,
            "started_at": None,
            "last_attempted_at": None,
            "finished_at": None,
            "errors": [],
            "worker_ids": [],
            **more,
        }
        return TaskResult(
            task=task,
            id=result_id,
            status=status,
            args=list(args),
            kwargs=dict(kwargs),
            backend=task.backend,
            **fields,
        )

    def _amqp_priority(priority: int) -> int | None:
        return None if priority == 0 else max(0, math.ceil(priority / 10))


if BaseTaskBackend is not None and shared_task is not None:

    @shared_task(name=RUN, bind=True)
    def run(
        self: Any, path: str, args: list[Any], kwargs: dict[str, Any], about: dict[str, Any]
    ) -> Any:
        """Run one of Django's tasks in a worker; what it returns is the Celery task's result.

        :raises TypeError: the path is not one of a Django task
        """
        task = import_string(path)
        if not isinstance(task, Task):
            raise TypeError(f"{path} is not a Django task")
        enqueued_at = about.pop("enqueued_at")
        now = timezone.now()
        result = _result(
            task.using(**about),
            self.request.id,
            args,
            kwargs,
            TaskResultStatus.RUNNING,
            enqueued_at=datetime.fromisoformat(enqueued_at),
            started_at=now,
            last_attempted_at=now,
            worker_ids=[str(self.request.hostname)],
        )
        sender = type(result.task.get_backend())
        task_started.send(sender, task_result=result)
        try:
            context = (TaskContext(task_result=result),) if task.takes_context else ()
            returned = normalize_json(task.call(*context, *result.args, **result.kwargs))
        except Exception as error:
            kind = type(error)
            path = f"{kind.__module__}.{kind.__qualname__}"
            result.errors.append(TaskError(exception_class_path=path, traceback=_text(error)))
            _finish(result, TaskResultStatus.FAILED)
            task_finished.send(sender, task_result=result)
            raise
        object.__setattr__(result, "_return_value", returned)
        _finish(result, TaskResultStatus.SUCCESSFUL)
        task_finished.send(sender, task_result=result)
        return returned

    def _text(error: Exception) -> str:
        return "".join(format_exception(error))

    def _finish(result: TaskResult, status: TaskResultStatus) -> None:
        object.__setattr__(result, "finished_at", timezone.now())
        object.__setattr__(result, "status", status)
