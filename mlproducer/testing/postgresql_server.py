"""`PostgreSQLServer`: a private PostgreSQL on a port of its own.

Owns one server's directory and processes, and the statements that tests send. PostgreSQL refuses to
run as root; for root it runs as the user ``postgres`` or ``nobody``. Must not know what is stored
in it. Facts were checked on PostgreSQL 15.

Runs on: the caller's thread.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlproducer.testing.erlang import free_port
from mlproducer.testing.server import Server
from mlproducer.testing.workspace import Program, Workspace

__all__ = ["PostgreSQLError", "PostgreSQLNotInstalled", "PostgreSQLServer", "as_user"]

_HOST = "127.0.0.1"
_KILL_LIMIT = 60.0
_CALL_LIMIT = 30.0
_GONE_INTERVAL = 0.02
_USERS = ("postgres", "nobody")


class PostgreSQLError(Exception):
    """The private PostgreSQL failed; the text has its output."""


class PostgreSQLNotInstalled(PostgreSQLError):  # noqa: N818 - says what is missing
    """No PostgreSQL server on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "initdb and postgres were not found: PostgreSQL is not installed on this machine. "
            "On Debian or Ubuntu: apt-get install -y postgresql"
        )


class PostgreSQLServer(Server):
    """A PostgreSQL server of your own, as a context manager; it needs the package ``psycopg``.

    ``with PostgreSQLServer() as server:`` makes and starts it (about 2 s), and at the end kills it
    and removes its files. `kill` and `freeze` reach all of its processes; `restart` finds what was
    committed. Its user ``app`` owns the database ``app``, and has a password.

    Args:
        config: further settings, such as ``{"max_connections": "10"}``; may be changed before the
            next start.

    """

    error = PostgreSQLError

    def __init__(self, *, config: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__()
        self.host = _HOST
        self.port = free_port()
        self.user, self.password, self.database = "app", secrets.token_hex(8), "app"
        self.config = dict(config)
        self._workspace: Workspace | None = None
        self._programs = _programs()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<PostgreSQLServer {self.host}:{self.port} {state}>"

    # -- life ------------------------------------------------------------------------------------

    def _spawn(self) -> Program:
        if self._programs is None:
            raise PostgreSQLNotInstalled
        if self._workspace is None:
            self._workspace = self._made(self._programs)
        settings = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": str(self._workspace.path / "data"),
            "fsync": "off",  # the processes are killed, never the machine
            "shared_buffers": "16MB",
            "max_connections": "60",
        } | self.config
        argv = [str(self._programs / "postgres"), "-D", str(self._workspace.path / "data")]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        return self._workspace.spawn("postgres", [*as_user(), *argv], os.environ)

    def _terminate(self, program: Program, timeout: float) -> bool:
        if program.running:
            program.send(signal.SIGINT)  # a fast shutdown: SIGTERM waits for all sessions
            if not program.ended_within(timeout):
                self.kill()
                return False
        return True

    def _clean_up(self) -> None:
        if self._workspace is not None:
            self._workspace.close()
            self._workspace = None

    def kill(self) -> None:
        """SIGKILL to the server and all its processes, at once."""
        if self._program is not None and self._program.running:
            self._program.freeze()  # so that it has no further children
            children = _children(self._program.pid)
            for each in children:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            self._program.kill()
            _wait_until_gone(children)

    def freeze(self) -> None:
        """SIGSTOP to all its processes: the kernel still accepts connections, without an answer."""
        program = self._running_program()
        program.freeze()
        for each in _children(program.pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: end `freeze`."""
        program = self._running_program()
        for each in [*_children(program.pid), program.pid]:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)

    # -- a standby -------------------------------------------------------------------------------

    def standby(self) -> PostgreSQLServer:
        """Copy this server, and return the copy, which follows it once it is started.

        It refuses writes until `promote`.
        """
        made = PostgreSQLServer(config=self.config)
        if made._programs is None:
            raise PostgreSQLNotInstalled
        made.password, made._made_database = self.password, True
        made._workspace = made._followed(made._programs, self.port)
        return made

    def promote(self) -> None:
        """Have a standby take writes; this returns once it does."""
        self.call("SELECT pg_promote(wait => true)")

    # -- addresses and statements ----------------------------------------------------------------

    @property
    def url(self) -> str:
        """``postgresql://app:password@127.0.0.1:port/app``."""
        return self.url_for()

    def url_for(self, user: str | None = None, password: str | None = None) -> str:
        """Return the URL for another role, or with another password."""
        name = user or self.user
        secret = password or self.password
        return f"postgresql://{name}:{secret}@{self.host}:{self.port}/{self.database}"

    def call(self, statement: str, *parameters: Any, user: str | None = None) -> list[Any]:
        """Execute a statement as the superuser, and return its rows.

        Raises:
            PostgreSQLError: the server did not answer, or answered with an error.

        """
        psycopg: Any = importlib.import_module("psycopg")
        try:
            with psycopg.connect(
                host=self.host,
                port=self.port,
                user=user or "postgres",
                password=self.password,
                dbname=self.database if self._made_database else "postgres",
                connect_timeout=int(_CALL_LIMIT),
                autocommit=True,
            ) as connection:
                cursor = connection.execute(statement, parameters or None)
                return list(cursor.fetchall()) if cursor.description else []
        except psycopg.Error as error:
            raise PostgreSQLError(f"{self!r}: {error}") from error

    def end_sessions(self) -> None:
        """End all sessions of clients, as a failover does."""
        self.call(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    # -- parts -----------------------------------------------------------------------------------

    _made_database = False

    def _answers(self) -> bool:
        try:
            self.call("SELECT 1")
            if not self._made_database:
                self.call(f"CREATE ROLE {self.user} LOGIN PASSWORD '{self.password}'")
                self.call(f"CREATE DATABASE {self.database} OWNER {self.user}")
                self._made_database = True
        except PostgreSQLError:
            return False
        return True

    def _made(self, programs: Path) -> Workspace:
        """Make the server's directory."""
        workspace, data = _directory()
        secret = workspace.path / "password"
        secret.write_text(self.password)
        if os.geteuid() == 0:
            owner = _user()
            os.chown(secret, owner.pw_uid, owner.pw_gid)
        _fill(
            workspace,
            [
                str(programs / "initdb"),
                f"--pgdata={data}",
                "--no-sync",
                "--username=postgres",
                "--auth=scram-sha-256",
                f"--pwfile={secret}",
                "--encoding=UTF8",
                "--locale=C",
            ],
        )
        return workspace

    def _followed(self, programs: Path, port: int) -> Workspace:
        """Make the directory of a standby of the server on that port."""
        workspace, data = _directory()
        _fill(
            workspace,
            [
                str(programs / "pg_basebackup"),
                f"--pgdata={data}",
                f"--host={self.host}",
                f"--port={port}",
                "--username=postgres",
                "--checkpoint=fast",
                "--no-sync",
                "--write-recovery-conf",
            ],
            PGPASSWORD=self.password,
        )
        return workspace


def _directory() -> tuple[Workspace, Path]:
    """Make a directory for a server's data, which has to be its user's."""
    workspace = Workspace("mlproducer-postgresql-")
    data = workspace.path / "data"
    data.mkdir(0o700)
    if os.geteuid() == 0:
        owner = _user()
        workspace.path.chmod(0o711)
        os.chown(data, owner.pw_uid, owner.pw_gid)
    return workspace, data


def _fill(workspace: Workspace, command: list[str], **environ: str) -> None:
    """Run what fills a directory, as the server's user."""
    done = subprocess.run(
        [*as_user(), *command],
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=workspace.path,
        timeout=60.0,
        check=False,
    )
    if done.returncode:
        workspace.close()
        said = done.stdout.decode(errors="replace")
        raise PostgreSQLError(f"{Path(command[0]).name} failed: {said}")


def _programs() -> Path | None:
    """Return the directory of initdb and postgres; Debian's is not in PATH."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: each.parent.name)
    candidates = ([Path(found).resolve().parent] if found else []) + places[::-1]
    return next((each for each in candidates if (each / "postgres").exists()), None)


def _user() -> Any:
    pwd: Any = importlib.import_module("pwd")  # there is none on Windows
    known = {each.pw_name: each for each in pwd.getpwall()}
    return next(known[name] for name in _USERS if name in known)


def as_user() -> list[str]:
    """Return the command prefix that drops root's rights; empty for other users."""
    if os.geteuid() != 0:
        return []
    user = _user()
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _wait_until_gone(pids: list[int]) -> None:
    """Wait for killed grandchildren, which are init's children now."""
    deadline = time.monotonic() + _KILL_LIMIT
    for pid in pids:
        while _runs(pid) and time.monotonic() < deadline:
            time.sleep(_GONE_INTERVAL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
