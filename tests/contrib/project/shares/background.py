"""Tasks of Django 6, which report what they are run with."""

import json
import os
from pathlib import Path
from typing import Any

from django.tasks import task


def report(**record: Any) -> None:
    """Write down a run."""
    with Path(os.environ["REPORTS"]).open("a") as file:
        file.write(json.dumps(record) + "\n")


@task
def add(a: int, b: int) -> int:
    """Add."""
    report(sum=a + b)
    return a + b


@task(takes_context=True, priority=10)
async def tell(context: Any, text: str) -> None:
    """Tell of the run itself."""
    result = context.task_result
    report(text=text, id=result.id, attempt=context.attempt, priority=result.task.priority)
