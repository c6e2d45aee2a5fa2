"""What the scripts have in common: how they talk to the test, and what they publish."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mlproducer import Message

QUEUE = "ml.embed"


def tell(**report: Any) -> None:
    """Report something, in one write, so that processes do not mix their lines."""
    os.write(1, json.dumps(report).encode() + b"\n")


def wait_for_go() -> None:
    """Wait until the test says so, or is gone."""
    sys.stdin.buffer.raw.read(1)


def message(message_id: str) -> Message:
    """A small message that the test can find again."""
    return Message(body=b"x", routing_key=QUEUE, message_id=message_id)
