"""The part of the conformance suite of stores about dead letters, and how rows are counted.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import itertools

import pytest

from mlproducer.message import Envelope
from mlproducer.stores.protocol import Change, Depth, Entry, Record, Store
from mlproducer.testing.store_helpers import (
    PATIENCE,
    StoreTests,
    entries_of,
    entry_of,
    fields_of,
    ids_of,
    pages_of,
    record_of,
)


class Letters(StoreTests):
    """Dead letters, and how a command gets them."""

    def test_a_dead_letter_takes_its_messages_place(self, store: Store) -> None:
        """It has the letter's bytes and route, is counted as dead, and is claimed like any row."""
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        letter = Envelope("a", "t", "dlx", "dead", b"\x01headers", b"the letter")
        assert store.release([Change(claim, Record(letter, attempts=4, dead=True), 0.0)]) == []
        assert store.depth() == Depth(0, 1)
        (shown,) = store.letters(10)
        assert fields_of(shown.record.envelope) == fields_of(letter)
        (row,) = store.claim(10)
        assert fields_of(row.record.envelope) == fields_of(letter)
        assert (row.record.dead, row.record.attempts) == (True, 4)

    def test_letters_are_shown_page_by_page(self, store: Store) -> None:
        """By key, as often as one asks; an empty page is the end; what is not dead is not shown."""
        for number in range(7):
            store.put([Entry(record_of(f"m{number}", dead=number != 3), 0.0)], PATIENCE)
        for _ in range(2):
            pages = list(pages_of(store, 4))
            assert ids_of([*itertools.chain(*pages)]) == ["m0", "m1", "m2", "m4", "m5", "m6"]
            assert max(map(len, pages)) <= 4
        assert len(store.claim(10)) == 7

    def test_a_letter_is_seized_once(self, store: Store) -> None:
        """A listed letter can be claimed, unless another user of the store was faster."""
        store.put([Entry(record_of("a", dead=True), 0.0)], PATIENCE)
        (shown,) = store.letters(1)
        seized = store.seize(shown)
        assert seized is not None
        assert seized.claim.key == shown.claim.key
        assert seized.claim.token > shown.claim.token
        assert fields_of(seized.record.envelope) == fields_of(shown.record.envelope)
        assert store.seize(shown) is None
        assert store.seize(seized) is None
        assert store.claim(10) == []
        assert store.renew([seized.claim]) == []

    def test_a_letter_that_has_changed_is_not_seized(self, store: Store) -> None:
        """Neither after another claim of it, nor when it is gone."""
        store.put([Entry(record_of("a", dead=True), 0.0)], PATIENCE)
        (shown,) = store.letters(1)
        (row,) = store.claim(1)
        store.release([Change(row.claim, row.record, 0.0)])
        assert store.seize(shown) is None
        (shown,) = store.letters(1)
        store.done([shown.claim])
        assert store.seize(shown) is None
        assert store.letters(10) == []

    def test_a_letter_that_waits_for_its_next_attempt_is_seized(self, store: Store) -> None:
        """It is not claimed, although it is not due."""
        store.put([Entry(record_of("a", dead=True), self.lease * 100)], PATIENCE)
        (shown,) = store.letters(1)
        assert store.seize(shown) is not None

    def test_a_letter_whose_claim_has_ended_is_seized(self, store: Store, other: Store) -> None:
        """Its owner is gone."""
        store.put([Entry(record_of("a", dead=True))], PATIENCE)
        (shown,) = other.letters(1)
        assert other.seize(shown) is None
        self.let_leases_end()
        assert other.seize(shown) is not None


class Counts(StoreTests):
    """How many rows there are."""

    def test_rows_are_counted(self, store: Store) -> None:
        """Those that wait, claimed or not, and the dead, by any user of the store."""
        assert store.depth() == Depth()
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        store.put([entry_of("b", 0.0), entry_of("c", 100.0)], PATIENCE)
        assert store.depth() == Depth(3, 0)
        store.release([Change(claim, record_of("a", dead=True), 0.0)])
        assert store.depth() == Depth(2, 1)
        store.done([row.claim for row in store.claim(10)])
        assert store.depth() == Depth(1, 0)

    def test_rows_are_counted_for_all(self, store: Store, other: Store) -> None:
        """One user counts what another wrote."""
        store.put([entry_of("a", 0.0), Entry(record_of("b", dead=True), 0.0)], PATIENCE)
        assert other.depth() == Depth(1, 1)

    def test_what_is_stored_ahead_does_not_wait(self, store: Store) -> None:
        """Not while it is claimed for its first attempt; after that it does."""
        if not store.durable:
            pytest.skip("nothing is stored ahead in memory")
        first, second = store.put([Entry(record_of(each), ahead=True) for each in "ab"], PATIENCE)
        assert store.depth() == Depth(ahead=2)
        assert store.depth().total == 2
        store.release([Change(first, record_of("a", attempts=1), 0.0)])
        assert store.depth() == Depth(waiting=1, ahead=1)
        store.done([first, second])
        assert store.depth() == Depth()

    def test_what_is_stored_ahead_waits_while_it_is_not_sent(self, store: Store) -> None:
        """Once its claim has ended it is a message that waits, also while the next has it."""
        store.put([Entry(record_of("a"), ahead=True)], PATIENCE)
        self.let_leases_end()
        assert store.depth() == Depth(1, 0)
        assert ids_of(store.claim(1)) == ["a"]
        assert store.depth() == Depth(1, 0)
