"""The app: registers the checks, and closes the producer at the end of a Celery child.

Runs on: the thread that sets Django up.
"""

from __future__ import annotations

import sys

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed

from mlproducer.contrib.django import process
from mlproducer.contrib.django.checks import check_broker, check_store


class MLProducerConfig(AppConfig):
    """``mlproducer.contrib.django``, with the label ``mlproducer``."""

    name = "mlproducer.contrib.django"
    label = "mlproducer"
    verbose_name = "ML producer"

    def ready(self) -> None:
        """Register the checks, and close the producer where no exit functions run."""
        checks.register(check_broker, "mlproducer")
        checks.register(check_store, "mlproducer", deploy=True)
        setting_changed.connect(process.setting_changed)
        if "celery" in sys.modules:  # a prefork child ends without running exit functions
            from celery.signals import worker_process_shutdown  # noqa: PLC0415 - see above

            worker_process_shutdown.connect(_close, weak=False)


def _close(**_: object) -> None:
    process.one.reset()
