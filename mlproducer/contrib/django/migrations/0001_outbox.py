"""The table of the outbox, in PostgreSQL; other databases are left as they are.

Runs on: the main thread.
"""

from __future__ import annotations

from django.db import migrations

from mlproducer.contrib.django.outbox_table import make


class Migration(migrations.Migration):
    """Backwards it leaves the table, in which tasks may wait."""

    initial = True
    dependencies: tuple[tuple[str, str], ...] = ()
    operations = (migrations.RunPython(make, migrations.RunPython.noop),)
