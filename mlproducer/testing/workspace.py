"""A temporary directory, the programs that run in it, and their removal after this process.

Owns child processes and the directory that holds their files. A guard, a shell, makes the directory
and waits on a pipe from this process; when that closes or breaks, it kills the programs and removes
the directory. So neither ``kill -9`` of the test run nor Ctrl-C at any moment leaves a broker
behind. (``PR_SET_PDEATHSIG`` would not do: it fires when the *thread* that started the child ends.)
Must not know what the programs are.

Runs on: the caller's thread.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Program", "Workspace"]

_GUARD = """
trap '' INT TERM HUP PIPE
directory=$(mktemp -d "$1") || exit
printf '%s' "$directory"
exec >&-
read -r _
mv "$directory" "$directory.gone" || exit  # what has not started yet, now does not
for file in "$directory.gone"/*.pid; do
    [ -f "$file" ] || continue
    pid=${file%.pid}
    kill -s KILL -- "-${pid##*.}"
done
rm -rf "$directory.gone" || { sleep 1; rm -rf "$directory.gone"; }
"""
_START = ': > "$0.$$.pid" && exec "$@"'  # so that the guard knows the program before it runs
_KILL_LIMIT = 60.0  # a killed process ends within milliseconds, unless the machine is very busy


class Program:
    """One running child process, the leader of a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes], pid_file: Path, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.log = log
        self._pid_file = pid_file

    @property
    def running(self) -> bool:
        """Whether the process has not ended; a frozen one is running."""
        return self.process.poll() is None

    def ended_within(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for the end of the process."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self._pid_file.unlink(missing_ok=True)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        self.process.send_signal(number)

    def freeze(self) -> None:
        """SIGSTOP, and wait until the last thread has stopped; do nothing if it has ended.

        The signal alone is not enough: on a busy machine a broker was seen to confirm two more
        messages, 3 ms after it was sent.
        """
        self.send(signal.SIGSTOP)
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def terminate(self, timeout: float) -> bool:
        """SIGTERM, and SIGKILL after ``timeout`` seconds; return whether SIGTERM was enough."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)
        graceful = self.ended_within(timeout)
        if not graceful:
            self.kill()
        return graceful

    def kill(self) -> None:
        """SIGKILL to the whole process group, and wait for the end."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
        self.ended_within(_KILL_LIMIT)

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of what the program wrote."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Workspace:
    """A private directory (mode 0700) below ``directory``, or below the system's temporary one."""

    def __init__(self, prefix: str, directory: str | Path | None = None) -> None:
        template = Path(directory or tempfile.gettempdir(), f"{prefix}XXXXXX")
        self._programs: list[Program] = []
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(template)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        made = self._guard.stdout.read() if self._guard.stdout is not None else b""
        self.path = Path(os.fsdecode(made))
        if not made:
            self._dismiss()
            raise OSError(f"no directory could be created below {template.parent}")

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        stdout: int | None = None,
    ) -> Program:
        """Start a program; it writes to ``name.out`` unless ``stdout`` is ``subprocess.PIPE``."""
        log = self.path / f"{name}.out"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _START, str(self.path / name), *argv],
                env=dict(environ),
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output,
                start_new_session=True,
            )
        program = Program(process, self.path / f"{name}.{process.pid}.pid", log)
        self._programs.append(program)
        return program

    def close(self) -> None:
        """Kill what still runs, and remove the directory."""
        for program in self._programs:
            program.kill()
        self._dismiss()

    def _dismiss(self) -> None:
        """Let the guard clean up, and wait for its end."""
        self._guard.communicate(timeout=_KILL_LIMIT)
