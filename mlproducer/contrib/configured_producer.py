"""A process's own producer, from the settings of the framework that hosts it.

Runs on: the framework's threads.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mlproducer import MLProducer, Settings
from mlproducer.errors import ConfigurationError, MLProducerError

logger = logging.getLogger(__name__)

PRODUCER = "PRODUCER"
"""The key that names what makes the producer."""


def settings_of(given: Mapping[str, Any], name: str) -> Settings:
    """Read fields of `Settings` in upper case; those that are missing come from the environment.

    :param given: may also have the key `PRODUCER`, which is ignored
    :param name: the name of the setting in the text of errors
    :raises ConfigurationError: there is no such field, or a value does not parse
    """
    odd = [str(key) for key in given if not (isinstance(key, str) and key.isupper())]
    if odd:
        raise ConfigurationError(f"{name}: keys must be text in upper case, got {', '.join(odd)}")
    fields = {key.lower(): value for key, value in given.items() if key != PRODUCER}
    try:
        return Settings.from_mapping(fields)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def make(given: Mapping[str, Any], name: str, *, testing: bool) -> MLProducer:
    """Make the producer that settings describe.

    In a test run it is a `RecordingProducer` unless `PRODUCER` is given, whatever broker settings
    and environment name: a test must not publish by accident.

    :param given: fields of `Settings` in upper case, and `PRODUCER`: a callable that takes the
        `Settings`, its dotted name, or a producer
    :param name: the name of the setting in the text of errors
    :raises ConfigurationError: it cannot be made; the text has the reason
    """
    settings = settings_of(given, name)
    maker = given.get(PRODUCER) or MLProducer
    if testing and PRODUCER not in given:
        from mlproducer.testing import RecordingProducer  # noqa: PLC0415 - only tests need it

        maker = RecordingProducer
        text = "in a test run tasks are recorded and not published, unless %s has a PRODUCER"
        logger.info(text, name)
    if isinstance(maker, str):
        maker = _imported(maker, name)
    if isinstance(maker, MLProducer):
        return maker
    if not callable(maker):
        raise ConfigurationError(f"{name}: PRODUCER must be a callable, or the dotted name of one")
    try:
        made = maker(settings)
    except MLProducerError:
        raise
    except Exception as error:
        reason = f"PRODUCER raised {type(error).__name__} when it was called with the settings"
        raise ConfigurationError(f"{name}: {reason}") from error
    if not isinstance(made, MLProducer):
        raise ConfigurationError(
            f"{name}: PRODUCER must return an MLProducer, got {type(made).__name__}"
        )
    return made


_PYTEST = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}


def in_test_run() -> bool:
    """Whether pytest, or ``python -m unittest``, runs tests in this process.

    It is false in a process that such a test has started. Between two tests it is true: a thread
    that the first one left may publish then.
    """
    # pytest 8.2 and later set the second for as long as they run, which starts before any test.
    if "pytest" in sys.modules and not _PYTEST.isdisjoint(os.environ):
        return True
    program = getattr(sys.modules.get("__main__"), "__spec__", None)
    return program is not None and program.name == "unittest.__main__"


def _imported(dotted: str, name: str) -> Any:
    module, _, attribute = dotted.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{name}: PRODUCER {dotted!r} cannot be imported: {error}"
        ) from None
