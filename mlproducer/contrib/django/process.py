"""The process's one producer, made from ``settings.MLPRODUCER`` when it is first used.

Modules import a stand-in, which looks the current producer up at each use. Another one is made
when settings are overridden, and when a test run begins or ends.

Runs on: Django's threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

from django.conf import settings

from mlproducer import MLProducer
from mlproducer.contrib import configured_producer
from mlproducer.errors import ConfigurationError

SETTING = "MLPRODUCER"


def in_tests() -> bool:
    """Return whether tests run: by Django's runners, pytest-django, pytest or unittest."""
    state = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
    return hasattr(state, "saved_data") or configured_producer.in_test_run()


class ProcessProducer:
    """Stands for the producer of this process, with all attributes of an `MLProducer`."""

    def __init__(self) -> None:
        self._made: dict[bool, MLProducer] = {}
        self._additions: list[tuple[str, tuple[Any, ...]]] = []

    @property
    def __class__(self) -> Any:
        return type(self.current())

    @__class__.setter
    def __class__(self, other: Any) -> None:
        raise TypeError("the class is that of the producer, and cannot be set")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current(), name)

    def __repr__(self) -> str:
        return repr(self.current())

    def __reduce__(self) -> str:
        return "one"  # there is one in a process, also for copies and pickles

    def __enter__(self) -> MLProducer:
        return self.current()

    def __exit__(self, *_: object) -> None:
        self.current().close()

    def current(self) -> MLProducer:
        """Return the current producer; make it if there is none.

        :raises ConfigurationError: ``settings.MLPRODUCER``, or the environment, does not parse
        """
        testing = in_tests()
        made = self._made.get(testing)
        if made is None:  # of two threads at once, one makes a producer in vain
            made = self._made.setdefault(testing, self._make(testing=testing))
        return made

    def on(self, event: str, callback: Callable[..., object]) -> None:
        """Call ``callback`` at an event, as `MLProducer.on`, also for producers made later."""
        self._add("on", event, callback)

    def before_publish(self, hook: Callable[..., object]) -> None:
        """Add a hook, as `MLProducer.before_publish`, also for producers made later."""
        self._add("before_publish", hook)

    def reset(self) -> None:
        """Close the producer; the next use makes another one."""
        made, self._made = self._made, {}
        for each in made.values():
            each.close()

    def _add(self, method: str, *arguments: Any) -> None:
        getattr(self.current(), method)(*arguments)
        self._additions.append((method, arguments))

    def _make(self, *, testing: bool) -> MLProducer:
        given = getattr(settings, SETTING, {})
        if not isinstance(given, dict):
            raise ConfigurationError(f"{SETTING} must be a dict, got {type(given).__name__}")
        made = configured_producer.make(given, SETTING, testing=testing)
        for method, arguments in self._additions:
            getattr(made, method)(*arguments)
        return made


one = ProcessProducer()
producer = cast(MLProducer, one)
"""The producer of this process."""


def setting_changed(*, setting: str, **_: object) -> None:
    """Close the producer when a test overrides its settings."""
    if setting == SETTING:
        one.reset()
