"""The rows of the outbox as a model, which the admin site shows; nothing is written through it.

Runs on: Django's threads.
"""

from __future__ import annotations

from datetime import datetime, timezone

from django.db import models

from mlproducer._store_url import TABLE


class OutboxMessage(models.Model):
    """A message that waits in the table ``mlproducer_messages``; without its body.

    The table is the store's, and made by the first migration: Django does not manage it.
    """

    class State(models.IntegerChoices):
        """What the row is."""

        AHEAD = 0, "stored ahead"
        WAITING = 1, "waiting"
        DEAD = 2, "dead letter"
        ASIDE = 3, "put aside, damaged"

    key = models.BigAutoField(primary_key=True)
    message_id = models.TextField("message id")
    task_type = models.TextField()
    exchange = models.TextField()
    routing_key = models.TextField()
    state = models.SmallIntegerField(choices=State.choices)
    ready = models.BooleanField()
    due = models.DateTimeField()
    owner = models.BigIntegerField()
    attempts = models.IntegerField()
    doubtful = models.BooleanField("possibly sent")
    reason = models.TextField("last failure")
    accepted_at = models.BigIntegerField()

    class Meta:
        """Made by the store."""

        managed = False
        app_label = "mlproducer"
        db_table = TABLE
        verbose_name = "message in the outbox"
        verbose_name_plural = "messages in the outbox"

    def __str__(self) -> str:
        return str(self.message_id)

    @property
    def accepted(self) -> datetime | None:
        """When it was added; ``None`` where that is not known."""
        if not self.accepted_at:
            return None
        return datetime.fromtimestamp(self.accepted_at / 1e6, timezone.utc)
