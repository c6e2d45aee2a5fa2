"""`RedisServer`: a private Redis on a port of its own.

Owns one server's configuration and process, and the commands that tests send. Must not know what is
stored in it. Facts were checked on Redis 7.0.15.

Runs on: the caller's thread.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlproducer.testing.erlang import free_port
from mlproducer.testing.server import Server
from mlproducer.testing.workspace import Program, Workspace

if TYPE_CHECKING:
    from mlproducer.testing.certificates import ServerTLS

__all__ = ["SERVICE", "RedisError", "RedisNotInstalled", "RedisServer"]

SERVICE = "main"
"""The name by which a Sentinel knows the master that it watches."""

_HOST = "127.0.0.1"
_CALL_LIMIT = 30.0


class RedisError(Exception):
    """The private Redis failed; the text has its output."""


class RedisNotInstalled(RedisError):  # noqa: N818 - says what is missing
    """No Redis server on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "redis-server was not found: Redis is not installed on this machine. "
            "On Debian or Ubuntu: apt-get install -y redis-server"
        )


class RedisServer(Server):
    """A Redis server of your own, as a context manager; it needs the package ``redis``.

    ``with RedisServer() as server:`` starts it (about 0.1 s) and at the end kills it and removes
    its files. `stop` and `kill` keep what it wrote to disk for `restart`: every write, before it
    is answered (``appendonly yes``, ``appendfsync always``).

    Args:
        tls: certificates for a second, encrypted listener.
        password: what a client must give; none by default.
        config: further lines of ``redis.conf``, such as ``{"maxmemory": "1mb"}``
            (https://redis.io/docs/latest/operate/oss_and_stack/management/config); may be changed
            before the next start.
        watches: makes it a Sentinel that watches this master under the name `SERVICE`, and
            promotes a replica half a second after the master has fallen silent.

    """

    error = RedisError

    def __init__(
        self,
        *,
        tls: ServerTLS | None = None,
        password: str | None = None,
        config: Mapping[str, str] = MappingProxyType({}),
        watches: RedisServer | None = None,
    ) -> None:
        super().__init__()
        self.host = _HOST
        self.port = free_port()
        self.tls_port = free_port() if tls is not None else None
        self.password = password
        self._tls = tls
        self.config = dict(config)
        self._watches = watches
        self._workspace: Workspace | None = None

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<RedisServer {self.host}:{self.port} {state}>"

    # -- life ------------------------------------------------------------------------------------

    def _spawn(self) -> Program:
        program = shutil.which("redis-server")
        if program is None:
            raise RedisNotInstalled
        if self._workspace is None:
            self._workspace = Workspace("mlproducer-redis-")
        settings = self._workspace.path / "redis.conf"
        settings.write_text(self._configuration(self._workspace.path))
        argv = [program, str(settings), *(["--sentinel"] if self._watches is not None else [])]
        return self._workspace.spawn("redis", argv, os.environ)

    def _clean_up(self) -> None:
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None

    # -- addresses and commands ------------------------------------------------------------------

    @property
    def url(self) -> str:
        """``redis://127.0.0.1:port``, with the password where there is one."""
        secret = "" if self.password is None else f":{self.password}@"
        return f"redis://{secret}{self.host}:{self.port}"

    @property
    def tls_url(self) -> str:
        """The encrypted listener, by the name ``localhost``."""
        if self.tls_port is None:
            raise RedisError(f"{self!r} has no TLS listener: give RedisServer(tls=...)")
        secret = "" if self.password is None else f":{self.password}@"
        return f"rediss://{secret}localhost:{self.tls_port}"

    def call(self, *command: str | bytes | float) -> Any:
        """Send a command, and return its answer as redis-py's plain types.

        Raises:
            RedisError: the server did not answer, or answered with an error.

        """
        redis = importlib.import_module("redis")
        connection = redis.Connection(
            host=self.host,
            port=self.port,
            password=self.password,
            socket_timeout=_CALL_LIMIT,
            protocol=2,
        )
        try:
            connection.send_command(*command)
            return connection.read_response()
        except redis.RedisError as error:
            raise RedisError(f"{self!r}: {error}") from error
        finally:
            connection.disconnect()

    def configure(self, name: str, value: str) -> None:
        """Change a setting of the running server."""
        self.call("CONFIG", "SET", name, value)

    # -- parts -----------------------------------------------------------------------------------

    def _answers(self) -> bool:
        try:
            return bool(self.call("PING") == b"PONG")
        except RedisError:
            return False

    def _configuration(self, directory: Path) -> str:
        lines = {
            "bind": self.host,
            "port": str(self.port),
            "dir": str(directory),
        }
        if self._watches is None:
            lines |= {
                "save": '""',
                "appendonly": "yes",
                "appendfsync": "always",
                "repl-diskless-sync-delay": "0",
            }
        else:
            lines |= self._sentinel(self._watches)
        if self.password is not None:
            lines["requirepass"] = f'"{self.password}"'
        if self._tls is not None:
            lines["tls-port"] = str(self.tls_port)
            lines["tls-cert-file"] = str(self._tls.cert)
            lines["tls-key-file"] = str(self._tls.key)
            lines["tls-ca-cert-file"] = str(self._tls.ca)
            lines["tls-auth-clients"] = "yes" if self._tls.fail_if_no_peer_cert else "no"
        lines |= self.config
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def _sentinel(self, master: RedisServer) -> dict[str, str]:
        lines = {
            f"sentinel monitor {SERVICE}": f"{master.host} {master.port} 1",
            f"sentinel down-after-milliseconds {SERVICE}": "500",
            f"sentinel failover-timeout {SERVICE}": "3000",
        }
        if master.password is not None:
            lines[f"sentinel auth-pass {SERVICE}"] = master.password
        return lines
