"""Django: tasks that are published after COMMIT, or stored by the transaction itself.

Add ``"mlproducer.contrib.django"`` to ``INSTALLED_APPS``, and the broker to the settings::

    MLPRODUCER = {"URL": "amqp://user:password@localhost/"}

In a view::

    from mlproducer.contrib.django import publish_on_commit
    publish_on_commit(SummarizationTask(share.pk, {"text": share.text}))

Runs on: Django's threads.
"""

from __future__ import annotations

from mlproducer.contrib.django.process import producer
from mlproducer.contrib.django.publishing import publish_in_transaction, publish_on_commit

__all__ = ["producer", "publish_in_transaction", "publish_on_commit"]
