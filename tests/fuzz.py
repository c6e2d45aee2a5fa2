"""Random input for everything that reads what others write: frames, rows, URLs, requests, ...

Inputs are well-formed ones that were cut, joined and changed at random, by a seed. Hypothesis would
remember each of a million; this does not. What a target may not do is raise anything but the error
that it documents, quote what is secret, or keep memory. By hand::

    .venv/bin/python -m tests.fuzz                       # a million inputs for each target: hours
    .venv/bin/python -m tests.fuzz urls --inputs 100000 --seed 7

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import frozen

WARM = 0.2
"""The part of the inputs after which memory may not grow: caches are full by then."""

GROWTH = 48
"""MiB by which it may grow nevertheless: what the allocator keeps, and fragments."""

_PAGE = 4096
_MIB = 1024 * 1024
_LONGEST = 100_000


@frozen
class Target:
    """Something that reads.

    :ivar seeds: well-formed inputs
    :ivar words: pieces that mean something to it
    :ivar read: reads one input; returns how it was answered, in a word, for the report
    """

    seeds: Sequence[bytes]
    words: Sequence[bytes]
    read: Callable[[bytes, random.Random], str]


@frozen
class Report:
    """What came of a target's inputs.

    :ivar answers: how often it answered how
    :ivar grown: MiB of memory at the end beyond those after the warm-up
    """

    inputs: int
    seconds: float
    answers: Counter[str]
    grown: float


class FuzzError(AssertionError):
    """A target failed; the text has the input."""


def run(target: Target, inputs: int, seed: int) -> Report:
    """Give a target so many inputs.

    :raises FuzzError: it raised what it should not, or its memory grew
    """
    dice = random.Random(seed)
    answers: Counter[str] = Counter()
    began, warm = time.monotonic(), 0.0
    for number in range(inputs):
        data = mutated(dice, target)
        try:
            answers[target.read(data, dice)] += 1
        except Exception as error:  # noqa: BLE001 - it is told with its input
            told = "".join(traceback.format_exception(error))
            raise FuzzError(f"input {number} of seed {seed}, {data[:2000]!r}:\n{told}") from None
        if number == int(inputs * WARM):
            warm = _memory()
    grown = _memory() - warm
    if grown > GROWTH:
        raise FuzzError(f"{grown:.0f} MiB more after {inputs} inputs of seed {seed}")
    return Report(inputs, time.monotonic() - began, answers, grown)


def _memory() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / _MIB


def mutated(dice: random.Random, target: Target) -> bytes:
    """Return one of the seeds, changed in a few places; now and then as it is."""
    data = bytearray(dice.choice(target.seeds))
    for _ in range(dice.choice((0, 1, 1, 1, 2, 2, 3, 5, 8))):
        dice.choice(_CHANGES)(dice, data, target)
        del data[_LONGEST:]
    return bytes(data)


def _flip(dice: random.Random, data: bytearray, _target: Target) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _set(dice: random.Random, data: bytearray, _target: Target) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))


def _cut(dice: random.Random, data: bytearray, _target: Target) -> None:
    start = dice.randint(0, len(data))
    del data[start : start + dice.choice((1, 2, 4, 16, len(data)))]


def _repeat(dice: random.Random, data: bytearray, _target: Target) -> None:
    start = dice.randint(0, len(data))
    piece = data[start : start + dice.choice((1, 4, 16, 64))]
    data[start:start] = piece * dice.choice((1, 2, 10, 300))


def _random(dice: random.Random, data: bytearray, _target: Target) -> None:
    at = dice.randint(0, len(data))
    data[at:at] = dice.randbytes(dice.choice((1, 2, 4, 8, 32)))


def _word(dice: random.Random, data: bytearray, target: Target) -> None:
    start = dice.randint(0, len(data))
    end = start + dice.choice((0, 0, 1, 4, 16))
    data[start:end] = dice.choice(target.words)


def _splice(dice: random.Random, data: bytearray, target: Target) -> None:
    other = dice.choice(target.seeds)
    start = dice.randint(0, len(other))
    data[dice.randint(0, len(data)) :] = other[start:]


_CHANGES = (_flip, _set, _cut, _repeat, _random, _word, _word, _splice)


def main() -> None:
    """Run targets by name, one after the other, and print a line for each."""
    from tests.fuzzed import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # parameters of URLs that are ignored
    for name in arguments.targets or TARGETS:
        report = run(TARGETS[name](), arguments.inputs, arguments.seed)
        answers = ", ".join(f"{word} {count}" for word, count in report.answers.most_common())
        print(
            f"{name}: {report.inputs} inputs of seed {arguments.seed} in {report.seconds:.0f} s, "
            f"{report.grown:+.0f} MiB: {answers}",
            flush=True,
        )


if __name__ == "__main__":
    main()
