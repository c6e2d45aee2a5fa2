"""Dead letters in a store, replayed while the store fails for some of them.

Runs on: pytest's main thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from mlproducer import Message, MLProducer, Settings
from mlproducer._wire.dead_letter import dead_letter
from mlproducer.dead_letters import Letter, StoredDeadLetters
from mlproducer.errors import NackError, PublishError, StoreError
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Change, Claim, Entry, Record, Row
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.testing.fake_broker import Behaviour, FakeBroker, FakeConnection, ReceivedMessage


class Refusing(Behaviour):
    """Nacks one of the messages."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Confirm the others."""
        settle = connection.nack if message.body == b"refused" else connection.ack
        settle(channel, tag)


def bury(settings: Settings, *names: str) -> None:
    """Put dead letters into the store, whose messages say what they are called."""
    headers = {"x-original-exchange": "x", "x-original-routing-key": "k"}
    with closing(open_store(settings)) as store, MLProducer(settings) as producer:
        for name in names:
            envelope, _ = producer.prepare(
                Message(body=name.encode(), routing_key="k", exchange="x", message_id=name)
            )
            letter = dead_letter(envelope, "x.dlx", headers)
            store.put([Entry(Record(letter, attempts=4, dead=True), 0.0)], 5.0)


def test_no_more_is_claimed_than_can_be_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of a letter that waits for its turn could end meanwhile."""
    most: list[int] = []
    letters = SQLiteStore.letters

    def note(store: SQLiteStore, limit: int, after: int = 0) -> list[Row]:
        most.append(limit)
        return letters(store, limit, after)

    with FakeBroker() as broker:
        settings = Settings(
            url=broker.url,
            store_url=f"sqlite:///{tmp_path}/store.db",
            declare_topology="off",
            exchange="x",
            max_in_flight=2,
        )
        bury(settings, *"abcde")
        monkeypatch.setattr(SQLiteStore, "letters", note)
        assert StoredDeadLetters(settings).replay() == 0
        assert sorted(each.body for each in broker.messages) == [b"a", b"b", b"c", b"d", b"e"]
    assert set(most) == {2}


def test_a_store_that_fails_after_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent and deleted is told so, though the store failed for the others."""
    path = tmp_path / "store.db"

    def fail(_store: SQLiteStore, _changes: Sequence[Change]) -> list[Claim]:
        raise StoreError("the store fails")

    told: dict[str, PublishError | None] = {}

    def tell(letter: Letter, error: PublishError | None) -> None:
        told[letter.message_id] = error

    with FakeBroker(Refusing()) as broker:
        settings = Settings(
            url=broker.url, store_url=f"sqlite:///{path}", declare_topology="off", exchange="x"
        )
        bury(settings, "sent", "refused")
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "release", fail)
            with pytest.raises(StoreError, match="the store fails"):
                StoredDeadLetters(settings).replay(told=tell)
    assert told["sent"] is None
    assert isinstance(told["refused"], NackError)
    left = [each.message_id for each in StoredDeadLetters(settings).list()]
    assert left == ["refused"]
