"""Parses lines of ``publish`` input to tasks, or to errors that say what is wrong with them.

A line is ``{"task": KIND, ...fields}``; the fields are those of the kind's class. Errors do not
quote the line, which holds users' texts.

Runs on: the main thread; no I/O but the reading of the stream.
"""

from __future__ import annotations

import codecs
import inspect
import json
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any

from mlproducer import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    SummarizationTask,
    TranscriptionTask,
)
from mlproducer.errors import InvalidTaskError

Task = SummarizationTask | TranscriptionTask | EmbeddingTask | EmbeddingBatchTask | CeleryTask

MAX_LINE = 64 * 1024 * 1024
"""Bytes of a line that are kept; JSON's escapes make a line longer than the message it becomes."""

TASKS: dict[str, type[Task]] = {
    "summarization": SummarizationTask,
    "transcription": TranscriptionTask,
    "embedding": EmbeddingTask,
    "embedding_batch": EmbeddingBatchTask,
    "celery": CeleryTask,
}

_PARAMETERS = {kind: inspect.signature(kind).parameters for kind in TASKS.values()}
_REQUIRED = {
    kind: {
        name: None
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    for kind, parameters in _PARAMETERS.items()
}
_MOMENTS = ("eta", "expires")


def read_lines(stream: IO[bytes], limit: int = MAX_LINE) -> Iterator[bytes]:
    """Yield the lines of a stream; of one that is too long, ``limit`` + 1 bytes.

    A byte-order mark, with which some programs begin a file in UTF-8, belongs to no line.
    """
    first = True
    while line := stream.readline(limit + 1):
        rest = line
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = stream.readline(limit + 1)
        yield line.removeprefix(codecs.BOM_UTF8) if first else line
        first = False


def parse(line: bytes, limit: int = MAX_LINE) -> Task:
    """Make the task that a line describes.

    :raises InvalidTaskError: the line describes no task; the text says why
    """
    if len(line) > limit:
        raise InvalidTaskError(f"longer than {limit} bytes")
    fields = _object(line)
    kind = fields.pop("task", None)
    if not isinstance(kind, str) or kind not in TASKS:
        raise InvalidTaskError(f"task is missing or unknown; accepted are {', '.join(TASKS)}")
    return _build(TASKS[kind], fields)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict; refuse a key that is there twice, whose meaning JSON leaves open."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise InvalidTaskError("a key is there twice in an object")
    return made


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise InvalidTaskError("not UTF-8") from None
    except InvalidTaskError:
        raise
    except json.JSONDecodeError as error:
        raise InvalidTaskError(f"not JSON (column {error.colno})") from None
    except (ValueError, RecursionError):
        raise InvalidTaskError(
            "JSON with a number that is too long, or nested too deeply"
        ) from None
    if not isinstance(value, dict):
        raise InvalidTaskError(f"a JSON object is expected, got {type(value).__name__}")
    return value


def _build(kind: type[Task], fields: dict[str, Any]) -> Task:
    """Make a task; a missing field is passed as ``None``, which the task itself refuses."""
    parameters = _PARAMETERS[kind]
    if not fields.keys() <= parameters.keys():
        raise InvalidTaskError(f"a field is unknown; accepted are task, {', '.join(parameters)}")
    moments = {name: _moment(name, fields[name]) for name in _MOMENTS if name in fields}
    arguments: dict[str, Any] = {**_REQUIRED[kind], **fields, **moments}
    return kind(**arguments)


def _moment(name: str, value: Any) -> Any:
    """Parse a point in time, which JSON has as text; numbers (seconds) are returned as they are."""
    if not isinstance(value, str):
        return value
    try:
        return datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 knows no Z
    except ValueError:
        raise InvalidTaskError(
            f"{name} is not a date and time such as 2030-01-31T12:00:00+00:00"
        ) from None
