"""A process of its own for what a fork changes; it needs no thread and no broker."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers import LIMIT

FORK = """
import os
from mlproducer import Settings, SummarizationTask
from mlproducer._wire.encode import Encoder

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


WITHOUT_POSIX = """
import os, sys

del os.fork, os.register_at_fork

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {"fcntl", "pwd", "grp", "resource", "termios"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import mlproducer, mlproducer.wsgi, mlproducer.cli
from mlproducer.errors import NotConnectedError

producer = mlproducer.MLProducer(mlproducer.Settings(url="amqp://u:p@127.0.0.1:1/"))
try:
    producer.publish(mlproducer.Message(body=b"", routing_key="k"), retry=False)
except NotConnectedError:
    producer.close(0)
    print("published")
"""


def test_where_there_is_no_fork() -> None:
    """It is imported, and publishes, where the operating system knows neither fork nor fcntl."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX],
        check=True,
        timeout=2 * LIMIT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "published\n"
