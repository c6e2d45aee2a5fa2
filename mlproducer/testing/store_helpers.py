"""Helpers of the conformance suite of stores: how tests get stores, and make and read rows.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import pytest
from attrs import evolve
from hypothesis import strategies as st

from mlproducer.errors import StoreError
from mlproducer.message import Envelope
from mlproducer.settings import RetryPolicy
from mlproducer.stores.protocol import Entry, Record, Row, Store

PATIENCE = 30.0
"""Seconds that a store has to become ready."""

LIMIT = 60.0
"""Seconds after which a test stops waiting for what ought to come."""

T = TypeVar("T")

Open = Callable[[], Store]

_texts = st.text(st.characters(codec="utf-8"), max_size=60)

envelopes = st.builds(
    Envelope,
    message_id=_texts,
    task_type=_texts,
    exchange=_texts,
    routing_key=_texts,
    properties=st.binary(max_size=300),
    body=st.binary(max_size=3000),
)

records = st.builds(
    Record,
    envelope=envelopes,
    attempts=st.integers(0, 2**31 - 1),
    doubtful=st.booleans(),
    dead=st.booleans(),
    reason=_texts,
    first_failed_at=st.floats(0, 4e9),
    accepted_at=st.floats(0, 4e9),
    retry=st.none()
    | st.builds(
        RetryPolicy,
        st.integers(0, 1_000_000),
        st.floats(0.001, 3600.0),
        st.floats(0.001, 3600.0),
    ),
)


class StoreTests:
    """Tests of one kind of store; a subclass makes the store.

    :cvar lease: seconds; so long do tests wait for a lease to end, unless ``advance`` is overridden
    :cvar leases: whether claims end by themselves
    :cvar shared: whether all that ``make_store`` gives during one test have the same rows
    """

    lease: float = 1.0
    leases: bool = True
    shared: bool = True

    def make_store(self, lease: float) -> Store:
        """Return a store, empty at the start of each test; if it is shared, one more user of it."""
        raise NotImplementedError

    def make_bounded_store(self, rows: int) -> Store:
        """Return a store that has room for so many rows, where this kind of store has a limit."""
        pytest.skip("this store has no limit")

    def empty_place(self) -> None:
        """Remove all that the stores have written, as an accident would; they stay in use."""
        pytest.skip("its rows are in no file or server")

    def keep_place(self) -> None:
        """Keep a copy of all that is written, as a backup does; all stores are closed."""
        pytest.skip("it is not backed up by a copy")

    def restore_place(self) -> None:
        """Put the copy back under the stores, which are in use."""
        raise NotImplementedError

    def advance(self, seconds: float) -> None:
        """Let time pass for the stores; with a clock that you can set, set it."""
        threading.Event().wait(seconds)

    @pytest.fixture
    def connect(self) -> Iterator[Open]:
        """Make stores that are closed after the test."""
        with ExitStack() as stores:
            yield lambda: stores.enter_context(closing(self.make_store(self.lease)))

    @pytest.fixture
    def store(self, connect: Open) -> Store:
        """Make one store."""
        return connect()

    @pytest.fixture
    def patient(self) -> Iterator[Store]:
        """Make one store with a lease that outlasts a busy machine."""
        with closing(self.make_store(100.0)) as store:
            yield store

    @pytest.fixture
    def other(self, connect: Open, store: Store) -> Store:
        """Make a second user of its rows."""
        if not self.shared:
            pytest.skip("its rows are not shared")
        return connect()

    def let_leases_end(self) -> None:
        """Let every claim end by itself."""
        if not self.leases:
            pytest.skip("its claims do not end by themselves")
        self.advance(self.lease * 1.25)


def insist(call: Callable[[], T]) -> T:
    """Call once more where a store says that its place was replaced, as it may do once."""
    with contextlib.suppress(StoreError):
        return call()
    return call()


def record_of(message_id: str = "m", *, body: bytes = b"body", **known: Any) -> Record:
    """Make a record."""
    record = Record(Envelope(message_id, "type", "exchange", "key", b"\x10\x00", body))
    return evolve(record, **known)


def entry_of(message_id: str, delay: float | None) -> Entry:
    """Make an entry."""
    return Entry(record_of(message_id), delay)


def entries_of(*ids: str, delay: float | None) -> list[Entry]:
    """Make entries that have the same delay."""
    return [entry_of(each, delay) for each in ids]


def ids_of(rows: list[Row]) -> list[str]:
    """Return the rows' message ids."""
    return [row.record.envelope.message_id for row in rows]


def fields_of(envelope: Envelope) -> tuple[object, ...]:
    """Return what a message consists of."""
    return (
        envelope.message_id,
        envelope.task_type,
        envelope.exchange,
        envelope.routing_key,
        bytes(envelope.properties),
        bytes(envelope.body),
    )


def known_of(record: Record) -> tuple[object, ...]:
    """Return what a row knows about its message; times to the microsecond."""
    since = pytest.approx(record.first_failed_at, abs=1e-5)
    accepted = pytest.approx(record.accepted_at, abs=1e-5)
    known = record.attempts, record.doubtful, record.dead, record.reason, record.retry
    return (*known, since, accepted)


def all_of(record: Record) -> tuple[object, ...]:
    """Return the message and what the row knows about it."""
    return (*fields_of(record.envelope), *known_of(record))


def claim_all(store: Store) -> list[Row]:
    """Claim until nothing more is due; a store may give a part of it at a time."""
    rows: list[Row] = []
    deadline = time.monotonic() + LIMIT
    while part := store.claim(1000):
        assert time.monotonic() < deadline
        rows += part
    return rows


def pages_of(store: Store, limit: int) -> Iterator[list[Row]]:
    """Show all dead letters, so many at a time."""
    after = 0
    while page := store.letters(limit, after):
        assert all(row.claim.key > after for row in page)
        yield page
        after = page[-1].claim.key
