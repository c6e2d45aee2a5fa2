"""The rows of the outbox as a model, for the admin site; nothing is done to the database.

Runs on: the main thread.
"""

from __future__ import annotations

from django.db import migrations, models

from mlproducer._store_url import TABLE


class Migration(migrations.Migration):
    """Tell Django of a table that it does not manage."""

    dependencies = (("mlproducer", "0001_outbox"),)
    operations = (
        migrations.CreateModel(
            name="OutboxMessage",
            fields=[
                ("key", models.BigAutoField(primary_key=True, serialize=False)),
                ("message_id", models.TextField(verbose_name="message id")),
                ("task_type", models.TextField()),
                ("exchange", models.TextField()),
                ("routing_key", models.TextField()),
                (
                    "state",
                    models.SmallIntegerField(
                        choices=[
                            (0, "stored ahead"),
                            (1, "waiting"),
                            (2, "dead letter"),
                            (3, "put aside, damaged"),
                        ]
                    ),
                ),
                ("ready", models.BooleanField()),
                ("due", models.DateTimeField()),
                ("owner", models.BigIntegerField()),
                ("attempts", models.IntegerField()),
                ("doubtful", models.BooleanField(verbose_name="possibly sent")),
                ("reason", models.TextField(verbose_name="last failure")),
                ("accepted_at", models.BigIntegerField()),
            ],
            options={
                "verbose_name": "message in the outbox",
                "verbose_name_plural": "messages in the outbox",
                "db_table": TABLE,
                "managed": False,
            },
        ),
    )
