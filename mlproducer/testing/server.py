"""What the private servers share: start, wait, stop, restart, kill, freeze and thaw.

Owns the server's process while it runs. Must not know which program that is: a subclass starts it,
and says whether it answers.

Runs on: the caller's thread.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlproducer.testing.workspace import Program

__all__ = ["Server"]


class Server:
    """A private server, as a context manager.

    A subclass defines `_spawn`, `_answers` and `_clean_up`.
    """

    error: ClassVar[type[Exception]]
    """Raised when the server does not start, stop or answer."""

    start_limit: ClassVar[float] = 240.0
    """Seconds in which a server must answer after it was started."""

    stop_limit: ClassVar[float] = 60.0
    """Seconds in which a server must end after it was told to."""

    look_interval: ClassVar[float] = 0.02
    """Seconds between two looks at whether a starting server answers."""

    def __init__(self) -> None:
        self._program: Program | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- start and stop --------------------------------------------------------------------------

    def start(self, timeout: float | None = None) -> None:
        """Start the server and wait until it answers, at most ``timeout`` seconds.

        The errors raised are those of `launch` and `wait_ready`.
        """
        self.launch()
        self.wait_ready(timeout)

    def launch(self) -> None:
        """Start the server without waiting for it.

        Where its program is missing, an error is raised that says how to install it.
        """
        if self.running:
            raise self.error(f"{self._label} is running already")
        self._program = self._spawn()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the launched server answers, at most ``timeout`` seconds.

        A server that ends meanwhile, or is killed when the time is up, is an error that quotes the
        end of its log.
        """
        program = self._running_program()
        limit = self.start_limit if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not self._answers():
            if program.ended_within(self.look_interval):
                reason = f"ended with code {program.process.returncode} while starting"
            elif time.monotonic() > deadline:
                self.kill()
                reason = f"was not up within {limit:g} s"
            else:
                continue
            log = self.log_tail(60)
            raise self.error(f"{self._label} {reason}; the end of its log:\n{log}")

    def stop(self, timeout: float | None = None) -> None:
        """Stop the server in good order. Data is kept."""
        limit = self.stop_limit if timeout is None else timeout
        if self._program is not None and not self._terminate(self._program, limit):
            raise self.error(f"{self._label} did not stop within {limit:g} s and was killed")

    def restart(self, timeout: float | None = None) -> None:
        """Stop the server if it runs, and start it again with the same port and data."""
        self.stop()
        self.start(timeout)

    def close(self) -> None:
        """Kill the server, and remove its processes, ports and files."""
        self.kill()
        self._program = None
        self._clean_up()

    # -- the process -----------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the server's process is alive; a frozen one is."""
        return self._program is not None and self._program.running

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._running_program().pid

    def kill(self) -> None:
        """SIGKILL. Data is kept as far as the server had written it."""
        if self._program is not None:
            self._program.kill()

    def freeze(self) -> None:
        """SIGSTOP: the kernel still accepts connections and bytes, but there is no answer."""
        self._running_program().freeze()

    def thaw(self) -> None:
        """SIGCONT: end `freeze`."""
        self._running_program().send(signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the server for the length of the block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log."""
        return "" if self._program is None else self._program.log_tail(lines)

    # -- for subclasses --------------------------------------------------------------------------

    def _spawn(self) -> Program:
        """Start the server's program."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether the server answers its clients."""
        raise NotImplementedError

    def _clean_up(self) -> None:
        """Remove the files of a server that has ended."""
        raise NotImplementedError

    def _terminate(self, program: Program, timeout: float) -> bool:
        """End the program in good order, or kill it; return whether the former was enough."""
        return program.terminate(timeout)

    def _running_program(self) -> Program:
        if self._program is None or not self._program.running:
            raise self.error(f"{self._label} is not running")
        return self._program

    @property
    def _label(self) -> str:
        """The server's name in the text of errors."""
        return repr(self)
