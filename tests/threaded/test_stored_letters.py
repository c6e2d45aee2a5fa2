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
from mlproducer.stores.protocol import Change, Claim, Entry, Record
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


def test_a_store_that_fails_after_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent and deleted is told so, though the store failed for the others."""
    path = tmp_path / "store.db"
    headers = {"x-original-exchange": "x", "x-original-routing-key": "k"}

    def fail(_store: SQLiteStore, _changes: Sequence[Change]) -> list[Claim]:
        raise StoreError("the store fails")

    told: dict[str, PublishError | None] = {}

    def tell(letter: Letter, error: PublishError | None) -> None:
        told[letter.message_id] = error

    with FakeBroker(Refusing()) as broker:
        settings = Settings(
            url=broker.url, store_url=f"sqlite:///{path}", declare_topology="off", exchange="x"
        )
        with closing(SQLiteStore(path)) as store, MLProducer(settings) as producer:
            for body in (b"sent", b"refused"):
                message = Message(
                    body=body, routing_key="k", exchange="x", message_id=body.decode()
                )
                envelope, _ = producer.prepare(message)
                letter = dead_letter(envelope, "x.dlx", headers)
                store.put([Entry(Record(letter, attempts=4, dead=True), 0.0)], 5.0)
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "release", fail)
            with pytest.raises(StoreError, match="the store fails"):
                StoredDeadLetters(settings).replay(told=tell)
    assert told["sent"] is None
    assert isinstance(told["refused"], NackError)
    left = [each.message_id for each in StoredDeadLetters(settings).list()]
    assert left == ["refused"]
