"""Erlang's part of a private RabbitMQ: where it is installed, its cookie, its port mapper.

Owns the lookup of the installed programs, and `ErlangNetwork`: the directory, the cookie and the
epmd that the nodes of one cluster share. Must not know AMQP. `ErlangNetwork.evaluate` reaches a
node with ``erl_call`` (milliseconds) or, if that is missing, with ``rabbitmqctl`` (a second of CPU
for each call, since it starts an Erlang machine).

Runs on: the caller's thread.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlproducer.testing.workspace import Workspace

__all__ = ["ErlangNetwork", "RabbitMQError", "RabbitMQNotInstalled", "free_port"]

# The Debian wrapper in /usr/sbin switches user; the scripts below /usr/lib run as they stand.
_DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/opt/homebrew/opt/rabbitmq/sbin")
# Below Linux's ephemeral ports, so that a client which tries a stopped broker's port again and
# again cannot be given that very port as its own, and so connect to itself.
_PORTS = range(20_000, 32_000)
_BLOCK_SIZE = 100
_ANSWER = re.compile(r'"([A-Za-z0-9+/=]+)"\}?\s*\Z')
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


class RabbitMQError(Exception):
    """The private broker failed; the text has its output."""


class RabbitMQNotInstalled(RabbitMQError):  # noqa: N818 - says what is missing
    """No RabbitMQ server on this machine."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"{missing} was not found: RabbitMQ is not installed on this machine. "
            "On Debian or Ubuntu: apt-get install -y rabbitmq-server"
        )


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens, and that no other call returns.

    Between this call and the start of the server another test process could be given the same
    port, or this one for another of its servers. So each process takes its ports from blocks of its
    own, and each port once.
    """
    while True:
        port = _BLOCKS.take()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if _binds(probe, ("127.0.0.1", port)):
                return port


class _Blocks:
    """The blocks of ports that this process has reserved, one after the other.

    A reservation is a name in Linux's abstract socket namespace: it is there for all processes,
    leaves no file, and ends with the process that holds it. Elsewhere nothing is reserved.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._left: list[int] = []
        self._held: list[int] = []  # bare descriptors, which the process's end closes silently

    def take(self) -> int:
        """Return a port that was not taken before; a forked child has blocks of its own."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._left, self._held = [], []
        while True:
            if not self._left:
                self._left = list(self._reserve())
                secrets.SystemRandom().shuffle(self._left)
            try:
                return self._left.pop()
            except IndexError:  # another thread has taken the last one
                continue

    def _reserve(self) -> range:
        starts = list(_PORTS[::_BLOCK_SIZE])
        if not sys.platform.startswith("linux"):
            return _PORTS
        for _ in range(10 * len(starts)):
            start = secrets.choice(starts)
            holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            if _binds(holder, f"\0mlproducer-ports-{start}"):
                self._held.append(holder.detach())
                return range(start, start + _BLOCK_SIZE)
            holder.close()
        return _PORTS


_BLOCKS = _Blocks()


def _binds(probe: socket.socket, address: str | tuple[str, int]) -> bool:
    try:
        probe.bind(address)
    except OSError:
        return False
    return True


def find_script(name: str) -> str:
    """Return the path of one of RabbitMQ's own scripts, or raise `RabbitMQNotInstalled`."""
    path = shutil.which(name, path=os.pathsep.join(_DIRECTORIES)) or shutil.which(name)
    if path is None:
        raise RabbitMQNotInstalled(name)
    return path


class ErlangNetwork:
    """Directory, cookie and port mapper (epmd) of one node, or of the nodes of one cluster.

    The nodes of a cluster share their users, so the first user's password is here too.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        find_script("rabbitmq-server")
        epmd = shutil.which("epmd")
        if epmd is None:
            raise RabbitMQNotInstalled("epmd")
        self.password = secrets.token_urlsafe(16)
        self.workspace = Workspace("rabbitmq-", directory)
        cookie = self.workspace.path / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)
        self.environ = self._clean_environ()
        self.workspace.spawn("epmd", [epmd, "-address", "127.0.0.1"], self.environ)

    def _clean_environ(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RABBITMQ_", "ERL_", "ML_"))
        }
        return inherited | {
            "HOME": str(self.workspace.path),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }

    def ctl(self, node: str, arguments: Sequence[str], timeout: float) -> str:
        """Run ``rabbitmqctl`` against ``node`` and return what it printed."""
        argv = [find_script("rabbitmqctl"), "--node", node, *arguments]
        return self._run(argv, None, timeout)

    def evaluate(self, node: str, expression: str, timeout: float, *, form: str = "~tp") -> str:
        """Evaluate an Erlang expression on ``node``; return its value, printed by ``form``."""
        # erl_call reads bytes as Latin-1, so other characters are written as Erlang's escapes.
        ascii_only = _NOT_ASCII.sub(lambda found: f"\\x{{{ord(found[0]):x}}}", expression)
        body = ascii_only.strip().rstrip(".")
        wrapped = (
            "base64:encode_to_string(unicode:characters_to_binary("
            f'io_lib:format("={form}", [begin {body} end]))).\n'
        )
        erl_call = shutil.which("erl_call")
        if erl_call is None:
            answer = self.ctl(node, ["--quiet", "eval", wrapped], timeout)
        else:
            answer = self._run(
                [erl_call, "-h", f"c{secrets.token_hex(4)}", "-n", node, "-e"], wrapped, timeout
            )
        found = _ANSWER.search(answer)
        if found is None:
            raise RabbitMQError(f"{node} could not evaluate the expression: {answer.strip()}")
        return base64.b64decode(found.group(1)).decode().removeprefix("=")

    def _run(self, argv: Sequence[str], text: str | None, timeout: float) -> str:
        program = Path(argv[0]).name
        try:
            done = subprocess.run(
                argv,
                input=text,
                stdin=subprocess.DEVNULL if text is None else None,
                env=self.environ,
                capture_output=True,
                encoding="utf-8",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RabbitMQError(f"{program} had no answer within {timeout:g} s") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise RabbitMQError(f"{program} failed with code {done.returncode}: {said}")
        return done.stdout

    def close(self) -> None:
        """Kill the nodes and epmd, and remove the directory."""
        self.workspace.close()
