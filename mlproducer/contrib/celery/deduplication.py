"""Skips, on the workers' side, tasks that have been completed before.

At-least-once delivery means that a worker may get a task twice: after a lost connection it is sent
again, and after a lost worker the broker delivers it again. Both copies have the same id.

A task is noted as completed once Celery has stored its result and sent its callbacks, and before
the message is acknowledged (with ``acks_late``). A task that was cut off before that runs again.

Runs on: the threads that run tasks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.exceptions import Ignore
from celery.signals import celeryd_after_setup, task_failure, task_retry, task_success

from mlproducer import _clock as time
from mlproducer._foreign_calls import write
from mlproducer._synchronization import seconds
from mlproducer.contrib.celery.completed_tasks import CompletedTasks, completed_tasks_at
from mlproducer.errors import ConfigurationError

logger = logging.getLogger(__name__)

KEY = "_mlproducer_completed"
"""The attribute by which an app, or a task, is known to have this installed."""

PAUSE = 5.0
"""Seconds for which notes that could not be reached are not asked, so that no task waits."""


def deduplicate(app: Celery, url: str, ttl: float = 86400) -> None:
    """Let workers skip a task that has been completed: it is acknowledged, and not run.

    Call it beside the app, in the module that workers load; it has no effect where tasks are only
    sent.

    :param url: where completed tasks are noted: ``redis://host:port/db`` (``rediss://``,
        ``redis+sentinel://``, ``unix://``), ``postgresql://host/database``, or
        ``sqlite:///file.db`` for workers of one machine
    :param ttl: seconds for which a task is known; as long as a duplicate may be late
    :raises ConfigurationError: the URL or the number cannot be used
    """
    if not seconds(ttl, "ttl"):
        raise ConfigurationError("ttl must be above 0")
    before = app.__dict__.get(KEY)
    if before is not None:
        before.notes, before.ttl = completed_tasks_at(url), ttl
        return
    completed = app.__dict__[KEY] = Completed(app, completed_tasks_at(url), ttl)
    app.on_after_finalize.connect(completed.watch)


class Completed:
    """Checks and notes the tasks of one app."""

    def __init__(self, app: Celery, notes: CompletedTasks, ttl: float) -> None:
        self._app = app
        self.notes = notes
        self.ttl = ttl
        self._away_until = 0.0
        self._away = False

    def watch(self, *_: Any, **__: Any) -> None:
        """Let each task check, before it runs, whether it has been completed."""
        for task in list(self._app.tasks.values()):
            if KEY not in task.__dict__ and not task.name.startswith("celery."):
                setattr(task, KEY, self)
                task.run = self._checked(task, task.run)

    def _checked(self, task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def checked(*args: Any, **kwargs: Any) -> Any:
            key = _key(task)
            if key is not None and self._is_completed(key):
                text = "task %s[%s] has been completed before, and is not run again"
                write(logger, logging.INFO, text, task.name, task.request.id)
                raise Ignore
            return run(*args, **kwargs)

        return checked

    def note(self, task: Any) -> None:
        """Note the run of a task that has ended."""
        key = _key(task)
        if key is not None:
            self._reach(lambda: self.notes.add(key, self.ttl))

    def _is_completed(self, key: str) -> bool:
        return bool(self._reach(lambda: self.notes.has(key)))

    def _reach(self, ask: Callable[[], Any]) -> Any:
        """Call the notes; return ``None`` while they cannot be reached, which is logged once."""
        if time.monotonic() < self._away_until:
            return None
        try:
            answer = ask()
        except self.notes.errors as error:
            self._away_until = time.monotonic() + PAUSE
            if not self._away:
                self._away = True
                text = "duplicates are not skipped while %s cannot be reached: %s"
                write(logger, logging.WARNING, text, self.notes.name, type(error).__name__)
            return None
        if self._away:
            self._away = False
            write(logger, logging.INFO, "duplicates are skipped again: %s", self.notes.name)
        return answer


# Connected once, not for each app: Celery 5.5 takes the method of an object for that of an
# earlier one which has ended, where both had the same address.


@celeryd_after_setup.connect
def _on_worker(instance: Any, **_: Any) -> None:
    """Watch tasks that were made after the app was finalised."""
    completed = instance.app.__dict__.get(KEY)
    if completed is not None:
        completed.watch()


@task_success.connect
@task_retry.connect
def _on_end(sender: Any = None, **_: Any) -> None:
    """Note a task that has ended, or whose retry has been sent."""
    completed = getattr(sender, KEY, None)
    if completed is not None:
        completed.note(sender)


@task_failure.connect
def _on_failure(sender: Any = None, **_: Any) -> None:
    """Note a task that has failed, unless its message is going to be delivered again."""
    completed = getattr(sender, KEY, None)
    if completed is not None and (sender.acks_on_failure_or_timeout or not sender.acks_late):
        completed.note(sender)


def _key(task: Any) -> str | None:
    """Return the name of one run of a task; ``None`` if no worker runs it.

    A retry has the id of the task, and what replaces a task has it too.
    """
    request = task.request
    if request.id is None or request.called_directly or request.is_eager:
        return None
    nesting = getattr(request, "replaced_task_nesting", None) or 0
    return f"{request.id}:{task.name}:{request.retries or 0}:{nesting}"
