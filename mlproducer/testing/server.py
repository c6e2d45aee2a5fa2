"""What private servers have in common: one program, that is ended, killed, frozen and thawed.

Owns the program while it runs. It must not know how one is started, nor when it is up.

Runs on: the caller's thread.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlproducer.testing.workspace import Program

__all__ = ["Server"]


class Server:
    """A server of your own, as a context manager."""

    error: ClassVar[type[Exception]]
    """What is raised where the server does not do what it was asked to."""

    def __init__(self) -> None:
        self._program: Program | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        raise NotImplementedError

    def close(self) -> None:
        """Kill the server and remove all it left."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Whether the server's process lives; a frozen one does."""
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
        """SIGSTOP: the kernel goes on accepting connections and bytes, nobody answers."""
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

    def _running_program(self) -> Program:
        if self._program is None or not self._program.running:
            raise self.error(f"{self._label} is not running")
        return self._program

    @property
    def _label(self) -> str:
        """How errors call it."""
        return repr(self)
