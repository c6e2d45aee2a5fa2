"""A process of its own for what a fork changes; it needs no thread and no broker."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers import LIMIT

FORK = """
import os
from mlproducer import Settings, SummarizationTask
from mlproducer.wire.encode import Encoder

encode = Encoder(Settings(url="amqp://localhost/")).encode
task = SummarizationTask("s", {"text": "t"})
parents = encode(task).properties
if os.fork() == 0:
    assert b"gen%d@" % os.getpid() in encode(task).properties
    os._exit(0)
assert b"gen%d@" % os.getpid() in parents
assert os.wait()[1] == 0
"""


def test_origin_follows_a_fork() -> None:
    """A process's messages name it, and a child's the child."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=LIMIT)
