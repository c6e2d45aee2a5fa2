"""Contestants in processes of their own, and rounds in which they alternate.

A contestant stays connected from the first round to the last and is idle while others run. How many
messages its rounds have is found in the warm-up, so that all run for about the same time whatever
their speed. Before each turn the queue is emptied; in each round the order moves on by one.

Runs on: the main thread.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from attrs import field, frozen

from benchmarks.contestants.work import STRIDE

ANSWER_LIMIT = 300.0
END_LIMIT = 10.0

PIPELINED, BLOCKING = "pipelined", "blocking"


class ContestantError(RuntimeError):
    """A contestant failed; the text has the end of what it said."""


class Contestant:
    """A process that answers jobs, a line each."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed below
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Contestant:
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def line(self, job: dict[str, Any]) -> str:
        """Put a job as the process reads it."""
        return json.dumps(job)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Give a job and wait for its figures.

        :raises ContestantError: it failed, or took too long and was killed
        """
        if self._process.stdin is None:
            raise ContestantError(f"{self.name} has no input")
        try:
            self._process.stdin.write(self.line(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContestantError(f"{self.name} ended: {self._last_words()}") from None
        return self._answer()

    def close(self) -> None:
        """End the process: its input ends, and with it, in good order, the client."""
        try:
            if self._process.stdin is not None and not self._process.stdin.closed:
                self._process.stdin.close()
            self._process.wait(END_LIMIT)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(END_LIMIT)
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._errors.close()

    def _answer(self) -> dict[str, Any]:
        watchdog = threading.Timer(ANSWER_LIMIT, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout is not None else ""
        finally:
            watchdog.cancel()
        if not line:
            self._process.wait(END_LIMIT)
            raise ContestantError(f"{self.name} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-1000:].strip()


class NativeContestant(Contestant):
    """The C client, which reads two numbers."""

    def line(self, job: dict[str, Any]) -> str:
        """Give the count and the window, by which it stands for as many threads."""
        window = 1000 if job["way"] == PIPELINED else job["workers"]
        return f"{job['count']} {window}"


@frozen
class Player:
    """A contestant and what it has to do in this match.

    :ivar label: how the table calls it
    """

    label: str
    contestant: Contestant
    way: str = PIPELINED
    workers: int = 1

    def play(self, count: int) -> Turn:
        """Publish, and give the figures."""
        answer = self.contestant.ask(way=self.way, count=count, workers=self.workers)
        return Turn(answer)


@frozen
class Turn:
    """What one contestant did in one round."""

    answer: dict[str, Any] = field(repr=False)

    @property
    def rate(self) -> float:
        """Messages per second."""
        return float(self.answer["count"] / self.answer["seconds"])

    @property
    def cpu(self) -> float:
        """Microseconds of its process's time per message."""
        return float(self.answer["cpu"] / self.answer["count"] * 1e6)

    @property
    def growth(self) -> float:
        """Bytes of memory per message while the results are held."""
        return float(self.answer["grown"] / self.answer["count"])

    def paces(self) -> list[float]:
        """Give the messages per second between our own contestant's marks."""
        pairs = itertools.pairwise(self.answer["marks"])
        return [STRIDE / (end - start) for start, end in pairs]

    def wait(self, which: str) -> float:
        """Seconds of waiting: ``mean``, ``p50``, ``p99`` or ``max``."""
        return float(self.answer[which])

    def thread_cpu(self, prefix: str) -> float:
        """Microseconds per message of the threads whose names begin so."""
        threads: dict[str, float] = self.answer["threads"]
        spent = sum(used for name, used in threads.items() if name.startswith(prefix))
        return spent / float(self.answer["count"]) * 1e6


@frozen
class Match:
    """What all did, in order: lists by the players' labels."""

    turns: dict[str, list[Turn]]

    def of(self, label: str, what: Callable[[Turn], float]) -> list[float]:
        """Give one figure of one player, round by round."""
        return [what(turn) for turn in self.turns[label]]

    def rates(self, label: str) -> list[float]:
        """Give a player's messages per second."""
        return self.of(label, lambda turn: turn.rate)

    def __contains__(self, label: str) -> bool:
        return label in self.turns


def play(
    players: Sequence[Player], *, rounds: int, seconds: float, purge: Callable[[], None]
) -> Match:
    """Let the players alternate.

    :param seconds: about how long a turn takes
    :param purge: empties the queue
    """
    counts = {player.label: _warm_up(player, seconds, purge) for player in players}
    turns: dict[str, list[Turn]] = {player.label: [] for player in players}
    for number in range(rounds):
        for step in range(len(players)):
            player = players[(number + step) % len(players)]
            purge()
            turns[player.label].append(player.play(counts[player.label]))
    return Match(turns)


def _warm_up(player: Player, seconds: float, purge: Callable[[], None]) -> int:
    """Find out how many messages a turn has; a multiple of the workers, so that none has more."""
    purge()
    few = 4 * player.workers
    player.play(few)
    first = player.play(_multiple(player.play(few * 4).rate * seconds / 4, player.workers))
    return _multiple(first.rate * seconds, player.workers)


def _multiple(count: float, workers: int) -> int:
    return max(1, round(count / workers)) * workers
