"""Compiles `client.c`, where there is a compiler and librabbitmq's header, and says how to run it.

Runs on: the harness's thread.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

from benchmarks.contestants.work import EXCHANGE, ROUTING_KEY, TASK_NAME, message

SOURCE = Path(__file__).with_name("client.c")
COMPILE_LIMIT = 60.0


class NoCompilerError(Exception):
    """There is no C client; the text says why."""


def build(directory: Path) -> Path:
    """Compile the client into ``directory`` and give its path.

    :raises NoCompilerError: there is none, or librabbitmq's header is missing
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompilerError("no C compiler (cc, gcc)")
    program = directory / "client"
    command = [compiler, "-O2", "-o", str(program), str(SOURCE), "-lrabbitmq"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_LIMIT, check=False
    )
    if done.returncode != 0:
        first = next(iter(done.stderr.splitlines()), "")
        raise NoCompilerError(f"client.c does not compile (librabbitmq-dev missing?): {first}")
    return program


def command(program: Path, url: str, *, headers: bool = False) -> list[str]:
    """Give the command line of a client that publishes bodies as long as everyone's.

    :param headers: with the headers and properties of a Celery task, as our own contestant
    :raises NoCompilerError: the URL asks for TLS, which the client does not speak
    """
    parts = urlsplit(url)
    if parts.scheme != "amqp":
        raise NoCompilerError("the C client does not speak TLS")
    body = len(message(0)[2])
    return [
        str(program),
        parts.hostname or "localhost",
        str(parts.port or 5672),
        unquote(parts.username or "guest"),
        unquote(parts.password or "guest"),
        unquote(parts.path[1:]) or "/",
        EXCHANGE,
        ROUTING_KEY,
        str(body),
        *([TASK_NAME] if headers else []),
    ]
