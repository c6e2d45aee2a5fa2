"""How far the demo has come, and its figures: what ``publish()`` answered against what was run.

Runs on: the main thread; the journal is written by the publishers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from mlproducer import Receipt
from mlproducer.testing.audit import Journal


@frozen(kw_only=True)
class Result:
    """The demo's figures.

    :ivar published: calls of ``publish()`` that returned
    :ivar confirmed: of these, confirmed at once
    :ivar deferred_then_confirmed: of these, deferred first and confirmed later
    :ivar undelivered: of these, not confirmed at the end
    :ivar given_back: calls that raised; the task was published again until one returned
    :ivar run: published messages that the worker ran
    :ivar duplicates: runs of a message beyond its first
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
        """Whether everything was published, confirmed and run."""
        return self.published == self.messages and self.lost == self.undelivered == 0

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the table, without those that are zero in a good run."""
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


class Progress:
    """How far a demo of so many messages has come: published, confirmed, run."""

    def __init__(self, messages: int, journal: Journal) -> None:
        self._messages = messages
        self._journal = journal
        self._seen = 0
        self._open: list[Receipt] = []
        self._runs: Counter[str] = Counter()
        self._runs_seen = 0

    @property
    def share(self) -> float:
        """How much has been published, from 0 to 1."""
        return len(self._journal.receipts) / self._messages

    def look(self, runs: Sequence[Any]) -> tuple[int, int, int]:
        """Take in what is new; return how many are published, confirmed and run."""
        new = self._journal.receipts[self._seen :]
        self._seen += len(new)
        self._open = [each for each in (*self._open, *new) if not each.confirmed]
        self._runs.update(run.id for run in runs[self._runs_seen :])
        self._runs_seen = len(runs)
        return self._seen, self._seen - len(self._open), len(self._runs)

    @property
    def complete(self) -> bool:
        """Whether everything published was confirmed and run, as of the last look."""
        if self._open or len(self._runs) < self._seen:
            return False
        return not self._journal.check(self._runs).lost

    def figures(self) -> Result:
        """Hold the journal against the runs, as of the last look."""
        receipts = self._journal.receipts
        deferred = sum(receipt.reason is not None for receipt in receipts)
        ours = {each.message_id: self._runs[each.message_id] for each in receipts}
        lost = len(self._journal.check(self._runs).lost)
        return Result(
            messages=self._messages,
            published=len(receipts),
            confirmed=len(receipts) - deferred,
            deferred_then_confirmed=deferred - len(self._open),
            undelivered=len(self._open),
            given_back=len(self._journal) - len(receipts),
            run=len(receipts) - lost,
            duplicates=sum(max(0, copies - 1) for copies in ours.values()),
            foreign=self._runs.total() - sum(ours.values()),
            lost=lost,
            longest_publish=self._journal.longest,
        )
