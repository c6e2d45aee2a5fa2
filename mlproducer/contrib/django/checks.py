"""System checks: what would otherwise come out with the first COMMIT.

Runs on: the thread that runs the checks.
"""

from __future__ import annotations

from django.core import checks

from mlproducer.contrib.django.process import one
from mlproducer.errors import ConfigurationError


def check_broker(**_: object) -> list[checks.CheckMessage]:
    """Say what is wrong with the settings, and whether a broker is named.

    ``mlproducer.E001``: the settings do not parse. ``mlproducer.E002``: they name no broker.
    """
    from mlproducer.testing import RecordingProducer  # noqa: PLC0415 - a server needs none of it

    try:
        made = one.current()
    except ConfigurationError as error:
        return [checks.Error(str(error), id="mlproducer.E001")]
    if isinstance(made, RecordingProducer):
        return []
    try:
        made.settings.brokers  # noqa: B018 - reads all that names a broker
    except ConfigurationError as error:
        hint = (
            'Set MLPRODUCER = {"URL": ...}, or RABBITMQ_URL in the environment. Where tasks are '
            'not to be published at all: MLPRODUCER = {"PRODUCER": '
            '"mlproducer.testing.RecordingProducer"}.'
        )
        return [checks.Error(str(error), hint=hint, id="mlproducer.E002")]
    return []


def check_store(**_: object) -> list[checks.CheckMessage]:
    """Say, with ``--deploy``, that what is deferred is lost with the process.

    ``mlproducer.W003``: the store is ``memory://``.
    """
    try:
        made = one.current()
    except ConfigurationError:
        return []  # which check_broker tells
    if not made.settings.store_url.startswith("memory:"):
        return []
    hint = "Name a durable one: STORE_URL, or ML_STORE_URL in the environment."
    text = "Tasks that wait for the broker are lost with the process: the store is memory://."
    return [checks.Warning(text, hint=hint, id="mlproducer.W003")]
