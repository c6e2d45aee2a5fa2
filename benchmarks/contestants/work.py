"""What is published: the same task for everyone, a text of 1,000 bytes with the rest around it.

Our own contestant builds a `SummarizationTask` for each message. For the others, `message` does the
same work with the standard library: a new id, the headers of Celery's protocol 2 that ours has (not
those with its defaults, which the broker would have to decode), a JSON body. What does not change
from message to message is made once.

Runs on: any thread.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from typing import Any

EXCHANGE = "bookmarkai.ml"
ROUTING_KEY = "ml.summarize"
TASK_NAME = "llm_service.tasks.summarize_content"

STRIDE = 10_000
"""Messages after which our own contestant notes the time."""

_SENTENCE = 'The quick brown fox jumps over the lazy dog, and "nobody" minds; it\'s Tuesday.\n'
TEXT = (_SENTENCE * 20)[:1000]

_CONSTANT = {
    "lang": "py",
    "task": TASK_NAME,
    "argsrepr": "(...)",
    "kwargsrepr": "{...}",
    "origin": f"gen{os.getpid()}@{socket.gethostname()}",
}
_EMBED: dict[str, None] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def arguments(number: int) -> dict[str, Any]:
    """Give the keyword arguments of one task."""
    return {
        "share_id": f"share-{number}",
        "content": {"text": TEXT},
        "options": {"backend": "api"},
    }


def header(task_id: str) -> dict[str, Any]:
    """Give the AMQP headers of one task."""
    return {**_CONSTANT, "id": task_id, "root_id": task_id}


def payload(number: int) -> list[Any]:
    """Give the body of one task before it is encoded."""
    return [[], arguments(number), _EMBED]


def message(number: int) -> tuple[str, dict[str, Any], bytes]:
    """Make one message: its id, its headers, its body."""
    task_id = str(uuid.uuid4())
    return task_id, header(task_id), _encode(payload(number)).encode()
