"""What every store must do, as a class of tests for a store of your own.

It asks nothing of a store but the protocol (`mlproducer.stores.protocol`), and needs pytest and
Hypothesis::

    class TestMyStore(StoreConformance):
        def make_store(self, lease: float) -> Store:
            return MyStore(PLACE, lease=lease)

Runs on: pytest's main thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlproducer.errors import BufferFullError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, RowFate, Store
from mlproducer.testing.store_dead_letters import Counts, Letters
from mlproducer.testing.store_helpers import (
    LIMIT,
    PATIENCE,
    StoreTests,
    all_of,
    claim_all,
    entries_of,
    entry_of,
    ids_of,
    insist,
    known_of,
    pages_of,
    record_of,
    records,
)

NO_WAITER = Claim(2**40, 1)


class _BrokenOffError(Exception):
    pass


class Storing(StoreTests):
    """How rows come, and who gets them."""

    def test_it_says_what_it_is(self, store: Store) -> None:
        """A name for people, and what the caller must know."""
        assert isinstance(store.name, str)
        assert store.name
        assert isinstance(store.durable, bool)
        assert isinstance(store.write_ahead, bool)
        assert store.lease > 0

    def test_what_is_put_without_a_delay_is_claimed(self, store: Store) -> None:
        """Claims come in order, and with larger keys for later rows; no other user gets them."""
        claims = store.put(entries_of("a", "b", "c", delay=None), PATIENCE)
        assert [claim.key for claim in claims] == sorted({claim.key for claim in claims})
        (later,) = store.put(entries_of("d", delay=None), PATIENCE)
        assert later.key > claims[-1].key
        assert store.claim(10) == []
        assert store.renew([*claims, later]) == []

    def test_what_is_put_with_a_delay_is_due_after_it(self, store: Store) -> None:
        """Not before, and then for any user; a row that was never claimed is not doubtful."""
        store.put(entries_of("now", delay=0.0), PATIENCE)
        store.put(entries_of("later", delay=self.lease / 2), PATIENCE)
        assert ids_of(store.claim(10)) == ["now"]
        self.advance(self.lease * 0.75)
        (row,) = store.claim(10)
        assert row.record.envelope.message_id == "later"
        assert not row.record.doubtful

    def test_entries_are_read_once(self, store: Store) -> None:
        """They may be a generator, and none at all."""
        assert store.put(iter(()), PATIENCE) == []
        read: list[str] = []

        def entries() -> Iterator[Entry]:
            for name in ("a", "b"):
                read.append(name)
                yield entry_of(name, 0.0)

        assert len(store.put(entries(), PATIENCE)) == 2
        assert read == ["a", "b"]
        assert ids_of(store.claim(10)) == ["a", "b"]

    def test_all_are_stored_or_none(self, store: Store) -> None:
        """Where the entries break off, none is stored, and the store goes on."""

        def entries() -> Iterator[Entry]:
            yield entry_of("a", 0.0)
            raise _BrokenOffError

        with pytest.raises(_BrokenOffError):
            store.put(entries(), PATIENCE)
        assert store.depth() == Depth()
        store.put(entries_of("b", delay=0.0), PATIENCE)
        assert ids_of(store.claim(10)) == ["b"]

    def test_the_oldest_goes_first_whenever_it_became_due(self, store: Store) -> None:
        """Among what is due, rows go by age, also those that were there before."""
        old, new = store.put(entries_of("old", "new", delay=None), PATIENCE)
        store.release([Change(new, record_of("new"), 0.0)])
        self.advance(self.lease / 100)
        store.release([Change(old, record_of("old"), 0.0)])
        store.put(entries_of("newest", delay=0.0), PATIENCE)
        assert ids_of(store.claim(1)) == ["old"]
        assert ids_of(store.claim(10)) == ["new", "newest"]

    def test_a_limit_is_kept(self, store: Store) -> None:
        """No more rows than were asked for; none is none."""
        store.put(entries_of("a", "b", "c", delay=0.0), PATIENCE)
        assert store.claim(0) == []
        assert ids_of(store.claim(2)) == ["a", "b"]
        assert ids_of(store.claim(2)) == ["c"]
        assert store.claim(2) == []

    def test_a_row_has_one_owner(self, store: Store, other: Store) -> None:
        """What one has claimed, another does not get."""
        store.put(entries_of("a", "b", delay=0.0), PATIENCE)
        assert ids_of(other.claim(1)) == ["a"]
        assert ids_of(store.claim(10)) == ["b"]
        assert other.claim(10) == []

    def test_thousands_of_rows(self, patient: Store) -> None:
        """They keep their order, whatever part of them a claim gives."""
        names = [f"m{number}" for number in range(2500)]
        claims = patient.put(entries_of(*names, delay=None), PATIENCE)
        assert [claim.key for claim in claims] == sorted({claim.key for claim in claims})
        changes = [
            Change(claim, record_of(name), 0.0) for claim, name in zip(claims, names, strict=True)
        ]
        assert patient.release(changes) == []
        rows = claim_all(patient)
        assert ids_of(rows) == names
        assert patient.renew([row.claim for row in rows]) == []
        patient.done([row.claim for row in rows])
        assert patient.depth() == Depth()

    def test_large_messages(self, patient: Store) -> None:
        """They come as they went, if need be a part at a time."""
        bodies = [bytes([number]) * (3 * 1024 * 1024 + number) for number in range(8)]
        patient.put([Entry(record_of(body=body), 0.0) for body in bodies], PATIENCE)
        assert [row.record.envelope.body for row in claim_all(patient)] == bodies


class Changing(StoreTests):
    """What becomes of a row that is claimed."""

    def test_a_released_row_is_due_after_its_delay(self, store: Store) -> None:
        """With what is known of it now, and under a larger token."""
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        record = record_of("a", attempts=2, doubtful=True, reason="NackError: no")
        assert store.release([Change(claim, record, self.lease / 2)]) == []
        assert store.claim(1) == []
        self.advance(self.lease * 0.75)
        (row,) = store.claim(1)
        assert (row.claim.key, row.claim.token > claim.token) == (claim.key, True)
        assert known_of(row.record) == known_of(record)

    def test_a_change_without_a_delay_keeps_the_claim(self, store: Store) -> None:
        """What is known is noted, and the row stays its owner's."""
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        assert store.release([Change(claim, record_of("a", attempts=1))]) == []
        assert store.claim(1) == []
        assert store.renew([claim]) == []
        assert store.release([Change(claim, record_of("a", attempts=2), 0.0)]) == []
        assert [row.record.attempts for row in store.claim(1)] == [2]

    def test_a_released_claim_holds_no_longer(self, store: Store) -> None:
        """It is told, among others that hold."""
        gone, held = store.put(entries_of("a", "b", delay=None), PATIENCE)
        store.release([Change(gone, record_of("a", attempts=1), 0.0)])
        changes = [
            Change(gone, record_of("a", attempts=9)),
            Change(held, record_of("b", attempts=1)),
        ]
        assert store.release(changes) == [gone]
        assert store.renew([held, gone]) == [gone]
        assert [row.record.attempts for row in store.claim(10)] == [1]

    def test_deleted_rows_are_gone(self, store: Store) -> None:
        """Claimed ones and released ones."""
        claimed, released, left = store.put(entries_of("a", "b", "c", delay=None), PATIENCE)
        store.release([Change(each, record_of(), 0.0) for each in (released, left)])
        store.done([claimed, released])
        assert [row.claim.key for row in store.claim(10)] == [left.key]
        assert store.depth() == Depth(1, 0)

    def test_a_row_that_was_claimed_since_is_not_deleted(self, store: Store) -> None:
        """An old claim deletes nothing any more."""
        (old,) = store.put(entries_of("a", delay=None), PATIENCE)
        store.release([Change(old, record_of("a"), 0.0)])
        (row,) = store.claim(1)
        store.done([old])
        assert store.renew([row.claim]) == []
        assert store.depth() == Depth(1, 0)

    def test_unknown_claims_do_nothing(self, store: Store) -> None:
        """Neither a row that never was nor one that is gone is an error."""
        (gone,) = store.put(entries_of("a", delay=None), PATIENCE)
        store.done([gone, NO_WAITER])
        store.done([])
        assert store.renew([gone, NO_WAITER]) == [gone, NO_WAITER]
        changes = [Change(gone, record_of(), 0.0), Change(NO_WAITER, record_of("b", dead=True))]
        assert store.release(changes) == [gone, NO_WAITER]
        assert store.release([]) == store.renew([]) == []
        assert store.depth() == Depth()
        assert store.claim(10) == []

    def test_keys_do_not_come_again(self, store: Store) -> None:
        """What replaces a deleted row has a larger key."""
        (gone,) = store.put(entries_of("a", delay=None), PATIENCE)
        store.done([gone])
        (new,) = store.put(entries_of("b", delay=None), PATIENCE)
        assert new.key > gone.key
        assert store.renew([gone]) == [gone]


class Leases(StoreTests):
    """Claims that end by themselves, and what an old one may do."""

    def test_a_claim_ends_by_itself(self, store: Store, other: Store) -> None:
        """Then any user gets the row, doubtful, under a larger token."""
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        assert other.claim(1) == []
        self.let_leases_end()
        (row,) = other.claim(1)
        assert (row.claim.key, row.claim.token > claim.token) == (claim.key, True)
        assert row.record.doubtful

    def test_who_was_frozen_past_the_lease_does_no_harm(self, store: Store, other: Store) -> None:
        """With the old token nothing is changed any more, and the call reports it."""
        (old,) = store.put(entries_of("a", delay=None), PATIENCE)
        self.let_leases_end()
        (row,) = other.claim(1)
        assert store.renew([old]) == [old]
        assert store.release([Change(old, record_of("b", attempts=9, dead=True), 0.0)]) == [old]
        store.done([old])
        store.close()
        assert other.renew([row.claim]) == []
        assert other.release([Change(row.claim, row.record, 0.0)]) == []
        (again,) = other.claim(1)
        assert known_of(again.record) == known_of(row.record)

    def test_a_renewed_claim_lasts(self, store: Store) -> None:
        """A lease that was renewed ends later."""
        (claim,) = store.put(entries_of("a", delay=None), PATIENCE)
        for _ in range(3):
            assert store.renew([claim]) == []
            self.advance(self.lease * 0.6)
            assert store.claim(1) == []

    def test_a_claim_that_was_not_taken_over_still_holds(self, store: Store) -> None:
        """After its lease too, until another user claims the row."""
        first, second = store.put(entries_of("a", "b", delay=None), PATIENCE)
        self.let_leases_end()
        assert store.renew([first]) == []
        assert store.release([Change(second, record_of("b"), 0.0)]) == []
        assert ids_of(store.claim(10)) == ["b"]

    def test_a_doubt_lasts(self, store: Store, other: Store) -> None:
        """A row whose claim ended by itself stays doubtful with the next claim."""
        store.put(entries_of("a", delay=None), PATIENCE)
        self.let_leases_end()
        assert len(other.claim(1)) == 1
        self.let_leases_end()
        (row,) = store.claim(1)
        assert row.record.doubtful


class Fates(StoreTests):
    """What the holder of a claim learns of a row that it does not hold any more."""

    def test_a_row_under_its_claim_is_held(self, store: Store) -> None:
        """Claimed, or released and not claimed since; dead or not."""
        claims = store.put(entries_of("a", "b", "c", delay=None), PATIENCE)
        store.release([Change(claims[1], record_of("b"), self.lease * 100)])
        store.release([Change(claims[2], record_of("c", dead=True), 0.0)])
        assert store.trace(claims) == [RowFate.HELD] * 3
        assert store.trace([]) == []

    def test_a_row_that_was_claimed_since_is_taken(self, store: Store) -> None:
        """Under the new claim it is held."""
        (old,) = store.put(entries_of("a", delay=0.0), PATIENCE)
        (row,) = store.claim(1)
        assert store.trace([old, row.claim]) == [RowFate.TAKEN, RowFate.HELD]

    def test_a_row_that_its_first_owner_deleted_leaves_nothing(self, store: Store) -> None:
        """Nor does one that never was."""
        first, second = store.put(entries_of("a", "b", delay=None), PATIENCE)
        store.done([first])
        store.release([Change(second, record_of("b"), 0.0)])
        (row,) = store.claim(1)
        store.done([row.claim])
        fates = store.trace([NO_WAITER, first, second, row.claim])
        assert fates == [RowFate.MISSING] * 4

    def test_what_another_delivered_can_be_learned(self, store: Store, other: Store) -> None:
        """Whether as a message or as a dead letter; the store has no row of it any more."""
        claims = store.put(entries_of("a", "b", "c", delay=0.0), PATIENCE)
        rows = other.claim(10)
        letter = Change(rows[1].claim, record_of("b", dead=True))
        assert other.release([letter]) == []
        assert store.trace(claims) == [RowFate.TAKEN] * 3
        other.done([row.claim for row in rows[:2]])
        expected = [RowFate.CONFIRMED, RowFate.DEAD_LETTERED, RowFate.TAKEN]
        assert store.trace(claims) == expected
        assert other.trace(claims) == expected
        assert store.depth() == Depth(waiting=1)

    def test_what_came_back_leaves_nothing(self, store: Store, other: Store) -> None:
        """Its first owner deletes it in the end, after another one has had it."""
        (old,) = store.put(entries_of("a", delay=0.0), PATIENCE)
        (row,) = other.claim(1)
        other.release([Change(row.claim, row.record, 0.0)])
        (back,) = store.claim(1)
        store.done([back.claim])
        assert store.trace([old, row.claim]) == [RowFate.MISSING] * 2

    def test_the_time_of_acceptance_stays(self, store: Store, other: Store) -> None:
        """It goes with the row, from claim to claim."""
        accepted = 1_700_000_000.125
        store.put([Entry(record_of("a", accepted_at=accepted), 0.0)], PATIENCE)
        (row,) = other.claim(1)
        assert row.record.accepted_at == accepted
        other.release([Change(row.claim, row.record, 0.0)])
        (row,) = store.claim(1)
        assert row.record.accepted_at == accepted


class Places(StoreTests):
    """Claims from before the rows' place was emptied, replaced, or put back to an earlier state."""

    never = threading.Event()

    def test_after_the_place_was_emptied_old_claims_touch_nothing(
        self, store: Store, other: Store
    ) -> None:
        """Not the rows that another has put since; and their holder is told that they are lost."""
        old = self._claims_of(store)
        self.empty_place()
        new = insist(lambda: other.put(entries_of("new", "newer", delay=None), PATIENCE))
        self._touch_nothing(store, old)
        assert store.trace(old) == [RowFate.MISSING] * 3
        store.close()
        assert other.renew(new) == []
        assert other.depth() == Depth(waiting=2)

    def test_after_an_earlier_state_came_back_old_claims_touch_nothing(
        self, store: Store, other: Store
    ) -> None:
        """Neither what is put nor what is claimed then has a claim that was there before."""
        store.put([entry_of("kept", 0.0)], PATIENCE)
        store.close()
        self.keep_place()
        (kept,) = store.claim(10)
        old = [kept.claim, *self._claims_of(store)[1:]]
        self.restore_place()
        (back,) = insist(lambda: other.claim(10))
        new = other.put(entries_of("new", "newer", delay=None), PATIENCE)
        self._touch_nothing(store, old)
        assert store.trace(old) == [RowFate.TAKEN, RowFate.MISSING, RowFate.MISSING]
        store.close()
        assert other.renew([back.claim, *new]) == []
        assert other.depth() == Depth(waiting=3)

    def _claims_of(self, store: Store) -> list[Claim]:
        claims = store.put(entries_of("a", "b", "c", delay=None), PATIENCE)
        store.release([Change(claims[2], record_of("c"), 100.0)])
        return claims

    def _touch_nothing(self, store: Store, old: list[Claim]) -> None:
        """Act on old claims, once the store has seen that its place is another."""
        deadline = time.monotonic() + LIMIT
        while insist(lambda: store.renew(old)) != old:
            assert time.monotonic() < deadline
            self.never.wait(0.05)
        changes = [Change(claim, record_of("old", dead=True), 0.0) for claim in old]
        assert store.release(changes) == old
        store.done(old)


class Ends(StoreTests):
    """What does not fit, and what a closed store leaves."""

    def test_what_does_not_fit_is_refused_as_a_whole(self) -> None:
        """What is there stays; deletion makes room."""
        with closing(self.make_bounded_store(3)) as store:
            claims = store.put(entries_of("a", "b", delay=None), PATIENCE)
            with pytest.raises(BufferFullError):
                store.put(entries_of("c", "d", delay=0.0), PATIENCE)
            assert store.depth() == Depth(2, 0)
            store.done(claims[:1])
            store.put(entries_of("c", "d", delay=0.0), PATIENCE)
            assert ids_of(store.claim(10)) == ["c", "d"]

    def test_closing_lets_claims_go(self, store: Store) -> None:
        """They are due at once, doubtful; the store can be used again."""
        claims = store.put([entry_of("a", None), Entry(record_of("b"), ahead=True)], PATIENCE)
        store.close()
        assert store.renew(claims) == claims
        rows = store.claim(10)
        assert ids_of(rows) == ["a", "b"]
        assert all(row.record.doubtful for row in rows)
        store.close()
        store.close()

    def test_closing_leaves_others_claims_alone(self, store: Store, other: Store) -> None:
        """Only one's own are let go."""
        (mine,) = store.put(entries_of("a", delay=None), PATIENCE)
        other.put(entries_of("b", delay=None), PATIENCE)
        other.close()
        assert ids_of(store.claim(10)) == ["b"]
        assert store.renew([mine]) == []

    def test_rows_outlive_who_stored_them(self, store: Store, other: Store) -> None:
        """What one has stored and left, the next one finds."""
        if not store.durable:
            pytest.skip("it is not durable")
        store.put([entry_of("a", 0.0), Entry(record_of("b", dead=True), 0.0)], PATIENCE)
        store.close()
        assert ids_of(other.claim(10)) == ["a", "b"]


class Bytes(StoreTests):
    """What went in comes out."""

    @settings(
        max_examples=50,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ],
    )
    @given(st.lists(records, min_size=1, max_size=5))
    def test_every_field_comes_back_as_it_was(self, patient: Store, given_: list[Record]) -> None:
        """Bytes, texts and numbers, by a claim, and letters when they are shown or have changed."""
        try:
            claims = patient.put([Entry(record) for record in given_], PATIENCE)
            changes = [Change(*pair, 0.0) for pair in zip(claims, given_, strict=True)]
            assert patient.release(changes) == []
            letters = [row.record for page in pages_of(patient, 2) for row in page]
            assert [all_of(each) for each in letters] == [
                all_of(each) for each in given_ if each.dead
            ]
            assert [all_of(row.record) for row in claim_all(patient)] == [
                all_of(each) for each in given_
            ]
        finally:
            patient.close()
            patient.done([row.claim for row in claim_all(patient)])


class StoreConformance(Storing, Changing, Leases, Letters, Counts, Fates, Places, Ends, Bytes):
    """All of it; see `StoreTests` for what a subclass overrides."""
