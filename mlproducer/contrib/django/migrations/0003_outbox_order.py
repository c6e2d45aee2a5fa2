"""The columns that keep a transaction's rows in order, for a table that 0001 made without them.

Runs on: the main thread.
"""

from __future__ import annotations

from django.db import migrations

from mlproducer.contrib.django.outbox_table import make


class Migration(migrations.Migration):
    """Backwards it leaves them, as they do no harm."""

    dependencies = (("mlproducer", "0002_outboxmessage"),)
    operations = (migrations.RunPython(make, migrations.RunPython.noop),)
