"""How tasks that were published differ from those that were expected, as lines of text.

A task's ``repr`` hides its content: right for logs, but of no help when a test fails.

Runs on: the caller's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import ndiff
from pprint import pformat
from typing import Any

from attrs import NOTHING, fields

from mlproducer._wire.encode import TASKS
from mlproducer.message import Message

KINDS = (*TASKS, Message)
WIDTH = 88


def is_task(value: object) -> bool:
    """Return whether it is something that a producer publishes."""
    return isinstance(value, KINDS)


def are_tasks(value: object) -> bool:
    """Return whether it is a list of tasks, and not empty."""
    return isinstance(value, list) and bool(value) and all(map(is_task, value))


def differences(found: Sequence[Any], expected: Sequence[Any]) -> list[str]:
    """Return lines that show where they differ: ``-`` was not published, ``+`` was not expected."""
    lines = []
    for number in range(max(len(found), len(expected))):
        ours, theirs = found[number : number + 1], expected[number : number + 1]
        if ours == theirs:
            lines.append(f"[{number}] {ours[0]!r}, as expected")
            continue
        lines.append(f"[{number}]")
        one, other = ("\n".join(map(shown, some)).splitlines() for some in (theirs, ours))
        lines += [line.rstrip() for line in ndiff(one, other)]
    return lines


def shown(task: Any) -> str:
    """Format a task with its content: all fields that differ from their default."""
    given = {
        each.name: _plain(value)
        for each in fields(type(task))
        if each.eq and (value := getattr(task, each.name)) not in (None, each.default, NOTHING)
        if value != {}
    }
    return f"{type(task).__name__}\n{pformat(given, width=WIDTH, sort_dicts=False)}"


def _plain(value: Any) -> Any:
    """Copy containers as those that ``pprint`` writes over several lines."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value
