"""What ``publish()`` said in the demo, what the worker ran, and whether the two agree.

Publishers add to lists, which needs no lock; everything else is the main thread's.

Runs on: the publishers add, the main thread looks and counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from attrs import define, field, frozen

from mlproducer import Receipt


@frozen(kw_only=True)
class Result:
    """The demo's figures.

    :ivar published: calls of ``publish()`` that returned
    :ivar confirmed: of these, confirmed at once
    :ivar deferred_then_confirmed: of these, kept by the library and confirmed later
    :ivar undelivered: of these, not confirmed at the end
    :ivar given_back: calls that raised; each was made again until one returned
    :ivar run: published messages that the worker ran
    :ivar duplicates: runs of a message on top of its first
    :ivar foreign: runs of messages that are not the demo's
    :ivar lost: published messages that the worker did not run
    :ivar longest_publish: seconds
    """

    messages: int
    published: int
    confirmed: int
    deferred_then_confirmed: int
    undelivered: int
    given_back: int
    run: int
    duplicates: int
    foreign: int
    lost: int
    longest_publish: float

    @property
    def well(self) -> bool:
        """Everything was published, confirmed and run."""
        return self.published == self.messages and self.lost == self.undelivered == 0

    def rows(self) -> list[tuple[str, str]]:
        """Give the table for people; what did not happen and need not is left out."""
        rows = [
            ("published", self.published),
            ("confirmed at once", self.confirmed),
            ("deferred, then confirmed", self.deferred_then_confirmed),
            ("run by the worker", self.run),
            ("duplicates", self.duplicates),
            ("lost", self.lost),
        ]
        further = [
            ("not published", self.messages - self.published),
            ("never confirmed", self.undelivered),
            ("given back, published again", self.given_back),
            ("run, but not the demo's", self.foreign),
        ]
        rows += [row for row in further if row[1]]
        longest = ("longest publish()", f"{self.longest_publish:.3f} s")
        return [*((name, str(value)) for name, value in rows), longest]


@define
class Tally:
    """What is known so far, of so many messages."""

    messages: int
    receipts: list[Receipt] = field(factory=list)
    durations: list[float] = field(factory=list)
    given_back: list[str] = field(factory=list)
    _runs: Counter[str] = field(factory=Counter)
    _runs_seen: int = 0
    _receipts_seen: int = 0
    _open: list[Receipt] = field(factory=list)

    @property
    def share(self) -> float:
        """How much has been published, from 0 to 1."""
        return len(self.receipts) / self.messages

    def look(self, runs: Sequence[Any]) -> tuple[int, int, int]:
        """Take in what is new; give how many are published, confirmed and run."""
        new = self.receipts[self._receipts_seen :]
        self._receipts_seen += len(new)
        self._open = [each for each in (*self._open, *new) if not each.confirmed]
        self._runs.update(run.id for run in runs[self._runs_seen :])
        self._runs_seen = len(runs)
        return self._receipts_seen, self._receipts_seen - len(self._open), len(self._runs)

    @property
    def complete(self) -> bool:
        """Everything that was published is confirmed and was run, as of the last look."""
        return not self._open and len(self._runs) >= self._receipts_seen and not self._missing()

    def _missing(self) -> int:
        return sum(receipt.message_id not in self._runs for receipt in self.receipts)

    def count(self) -> Result:
        """Count."""
        deferred = sum(receipt.reason is not None for receipt in self.receipts)
        ids = {receipt.message_id for receipt in self.receipts}
        ours = {key: count for key, count in self._runs.items() if key in ids}
        return Result(
            messages=self.messages,
            published=len(self.receipts),
            confirmed=len(self.receipts) - deferred,
            deferred_then_confirmed=deferred - len(self._open),
            undelivered=len(self._open),
            given_back=len(self.given_back),
            run=len(ours),
            duplicates=sum(ours.values()) - len(ours),
            foreign=self._runs.total() - sum(ours.values()),
            lost=self._missing(),
            longest_publish=max(self.durations, default=0.0),
        )
