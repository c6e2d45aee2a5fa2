"""System checks, for what would otherwise fail with the first COMMIT.

Runs on: the thread that runs the checks.
"""

from __future__ import annotations

from django.core import checks

from mlproducer.contrib.django.process import one
from mlproducer.errors import ConfigurationError


def check_broker(**_: object) -> list[checks.CheckMessage]:
    """Check that the settings parse and name a broker.

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
            'Set MLPRODUCER = {"URL": ...}, or RABBITMQ_URL in the environment. To publish no '
            'tasks at all: MLPRODUCER = {"PRODUCER": '
            '"mlproducer.testing.RecordingProducer"}.'
        )
        return [checks.Error(str(error), hint=hint, id="mlproducer.E002")]
    return []


def check_store(**_: object) -> list[checks.CheckMessage]:
    """Warn, with ``--deploy``, of a store that is lost with the process.

    ``mlproducer.W003``: the store is ``memory://``.
    """
    try:
        made = one.current()
    except ConfigurationError:
        return []  # check_broker reports it
    if not made.settings.store_url.startswith("memory:"):
        return []
    hint = "Set STORE_URL, or ML_STORE_URL in the environment, to a durable store."
    text = "Tasks that wait for the broker are lost with the process: the store is memory://."
    return [checks.Warning(text, hint=hint, id="mlproducer.W003")]
