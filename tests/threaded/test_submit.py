"""submit() and publish_many(): futures, windows, and one that fails alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, as_completed

import pytest

from mlproducer import EmbeddingTask, Message, MLProducer, Receipt, Settings
from mlproducer._engine import io_thread
from mlproducer.errors import (
    BufferFullError,
    ConfirmTimeoutError,
    InvalidMessageError,
    MessageTooLargeError,
    StoreError,
    UnroutableError,
)
from mlproducer.stores.memory import MemoryStore
from mlproducer.stores.protocol import Claim, Entry
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, Background, make_message
from tests.stopwatch import in_time
from tests.threaded.brokers import Silent, ack, nack
from tests.threaded.conftest import QUICK, Connect, Serve
from tests.threaded.moods import io_of


def test_the_id_is_there_at_once(connect: Connect, serve: Serve) -> None:
    """A future carries its message's id before the broker has seen it, and then its fate."""
    broker = serve(Silent())
    producer = connect(broker)
    future = producer.submit(make_message("mine"))
    assert isinstance(future, Future)
    assert future.message_id == "mine"
    anonymous = producer.submit(EmbeddingTask("share", {"text": "t", "type": "caption"}))
    assert len(anonymous.message_id) == 36
    assert not future.done()
    one, two = broker.wait_for_messages(2, LIMIT)
    assert one.properties.message_id == "mine"
    assert two.properties.message_id == anonymous.message_id
    ack(two, multiple=True)
    assert future.result(LIMIT).message_id == "mine"
    assert {each.message_id for each in as_completed([future, anonymous], LIMIT)} == {
        "mine",
        anonymous.message_id,
    }


def test_a_settled_future_goes_without_the_collector(connect: Connect, serve: Serve) -> None:
    """Many futures leave no cycles behind, whose collection would hold up every thread."""
    producer = connect(serve())
    gone = threading.Event()
    future = producer.submit(make_message())
    watched = weakref.ref(future, lambda _future: gone.set())
    gc.disable()
    try:
        assert future.result(LIMIT).confirmed
        del future
        assert gone.wait(LIMIT), watched
    finally:
        gc.enable()


def test_a_deferral_is_not_the_end(connect: Connect, serve: Serve) -> None:
    """The future waits through nacks for the confirm, and has no timeout of its own."""
    broker = serve(Silent())
    producer = connect(broker, publish_timeout=0.1)
    future = producer.submit(make_message("m"))
    nack(broker.wait_for_messages(1, LIMIT)[0])
    second = broker.wait_for_messages(2, LIMIT)[1]
    with pytest.raises(TimeoutError):
        broker.wait_for_messages(3, 0.3)  # past the publish timeout: not sent again
    assert not future.done()
    ack(second)
    assert future.result(LIMIT).attempts == 2


def test_cancel_before_the_hand_over(connect: Connect, serve: Serve) -> None:
    """What was withdrawn in time is never sent, and gives its slot back; later it is too late."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=2)
    assert producer.wait_connected(LIMIT)
    io_thread = producer._life.runtime.engines[0]._io  # type: ignore[union-attr]
    busy, free = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        assert free.wait(LIMIT)

    io_thread.order(occupy)  # type: ignore[arg-type]
    assert busy.wait(LIMIT)
    withdrawn = producer.submit(make_message("withdrawn"))
    sent = producer.submit(make_message("sent"))
    assert withdrawn.cancel()
    free.set()
    [message] = broker.wait_for_messages(1, LIMIT)
    assert message.properties.message_id == "sent"
    assert not sent.cancel()
    third = producer.submit(make_message("third"))
    for each in (message, broker.wait_for_messages(2, LIMIT)[1]):
        ack(each)
    assert sent.result(LIMIT).confirmed
    assert third.result(LIMIT).confirmed
    with pytest.raises(CancelledError):
        withdrawn.result(0)
    assert producer.flush(LIMIT) == 0


def test_a_full_window(connect: Connect, serve: Serve) -> None:
    """submit() waits for a slot, as long as publish_timeout and no longer."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=3, publish_timeout=0.3)
    assert producer.wait_connected(LIMIT)
    futures = [producer.submit(make_message()) for _ in range(3)]
    with in_time(0.55, 0.3), pytest.raises(BufferFullError) as caught:
        producer.submit(make_message("full"))
    assert (caught.value.message_id, caught.value.possibly_sent) == ("full", False)
    background = Background()
    background.call(producer.submit, make_message("fits"), timeout=LIMIT)
    ack(broker.wait_for_messages(3, LIMIT)[0])
    [future] = background.gather()
    assert futures[0].result(LIMIT).confirmed
    broker.wait_for_messages(4, LIMIT)
    ack(broker.messages[3], multiple=True)
    assert future.result(LIMIT).confirmed
    assert len(broker.messages) == 4


def test_publish_in_a_full_window(connect: Connect, serve: Serve) -> None:
    """publish() keeps its time there too, and says that nothing was sent."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=1)
    assert producer.wait_connected(LIMIT)
    first = producer.submit(make_message())
    with in_time(0.45), pytest.raises(ConfirmTimeoutError) as caught:
        producer.publish(make_message(), timeout=0.2, retry=False)
    assert (caught.value.attempts, caught.value.possibly_sent) == (0, False)
    kept = producer.publish(make_message("kept"), timeout=0.2)
    assert not kept.confirmed
    ack(broker.wait_for_messages(1, LIMIT)[0])
    assert first.result(LIMIT).confirmed
    ack(broker.wait_for_messages(2, LIMIT)[1])
    assert kept.result(LIMIT).confirmed


def test_done_callbacks_run_off_the_io_thread(connect: Connect, serve: Serve) -> None:
    """Callbacks get the future on a thread that may be slow; one that raises harms no other."""
    broker = serve(Silent())
    producer = connect(broker)
    names: list[str] = []
    called = threading.Event()

    def note(future: Future[Receipt]) -> None:
        assert future.result(0).confirmed
        names.append(threading.current_thread().name)
        called.set()

    future = producer.submit(make_message())
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(note)
    ack(broker.wait_for_messages(1, LIMIT)[0])
    assert called.wait(LIMIT)
    called.clear()
    future.add_done_callback(note)
    assert called.wait(LIMIT)
    assert not any("-io" in name for name in names)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Message(body=b"", routing_key="k" * 256), InvalidMessageError),
        (Message(body=b"." * 2000, routing_key="k"), MessageTooLargeError),
        ("no task", InvalidMessageError),
        (None, InvalidMessageError),
    ],
)
def test_bad_input_is_raised_at_the_call(
    connect: Connect, serve: Serve, bad: Message, error: type[Exception]
) -> None:
    """Nothing is sent or stored, no slot is taken, and the next message is undisturbed."""
    broker = serve()
    producer = connect(broker, max_in_flight=1, max_message_bytes=1000)
    for call in (producer.publish, producer.submit):
        with pytest.raises(error) as caught:
            call(bad)
        assert not caught.value.possibly_sent  # type: ignore[attr-defined]
    assert producer.publish(make_message()).confirmed
    assert producer.status().retry_queue_size == 0
    assert len(broker.messages) == 1


# --- publish_many ------------------------------------------------------------------------------


def test_results_in_input_order(connect: Connect, serve: Serve) -> None:
    """Receipts stand where their tasks stood, though the broker confirms in reverse."""
    broker = serve(Silent())
    producer = connect(broker)
    background = Background()
    ids = [f"m{number}" for number in range(50)]
    background.call(producer.publish_many, map(make_message, ids))
    for message in reversed(broker.wait_for_messages(50, LIMIT)):
        ack(message)
    [receipts] = background.gather()
    assert [receipt.message_id for receipt in receipts] == ids
    assert all(receipt.confirmed for receipt in receipts)


def test_one_bad_task_fails_alone(connect: Connect, serve: Serve) -> None:
    """An invalid or unroutable message has its error in its place; the others are confirmed."""

    class Routes(Behaviour):
        def on_publish(
            self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
        ) -> None:
            if message.routing_key == "nowhere":
                connection.return_(channel, message)
            connection.ack(channel, tag)

    producer = connect(serve(Routes()))
    tasks = [make_message() for _ in range(5)]
    tasks[1] = Message(body=b"", routing_key="k" * 256)
    tasks[3] = Message(body=b"", routing_key="nowhere")
    results = producer.publish_many(tasks, retry=False)
    assert [type(result) for result in results] == [
        Receipt,
        InvalidMessageError,
        Receipt,
        UnroutableError,
        Receipt,
    ]


def test_a_generator_is_taken_one_window_ahead(connect: Connect, serve: Serve) -> None:
    """Any iterable will do, and no more of it is held than the window."""
    taken = 0

    def tasks() -> Iterator[Message]:
        nonlocal taken
        for number in range(20):
            taken = number + 1
            yield make_message(f"{number}")

    broker = serve(Silent())
    producer = connect(broker, max_in_flight=5)
    background = Background()
    background.call(producer.publish_many, tasks())
    for number in range(20):
        message = broker.wait_for_messages(min(number + 5, 20), LIMIT)[number]
        assert taken <= number + 6
        ack(message)
    [results] = background.gather()
    assert [result.message_id for result in results] == [f"{number}" for number in range(20)]


def test_timeout_is_per_message(connect: Connect, serve: Serve) -> None:
    """With a deaf broker and a window of 2, six messages of 0.2 s each take no longer than six."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=2)
    assert producer.wait_connected(LIMIT)
    with in_time(6 * 0.2 + 0.5):
        results = producer.publish_many(
            [make_message() for _ in range(6)], timeout=0.2, retry=False
        )
    assert all(isinstance(result, ConfirmTimeoutError) for result in results)
    assert [result.possibly_sent for result in results] == [True] * 2 + [False] * 4  # type: ignore[union-attr]


@pytest.mark.hurry
def test_many_with_an_io_thread_that_hangs(connect: Connect, serve: Serve) -> None:
    """Fifty messages wait for it together, and not one after the other; none is sent later."""
    broker = serve()
    producer = connect(broker)
    assert producer.publish(make_message("first")).confirmed
    over = threading.Event()
    io_of(producer).order(lambda: over.wait(4 * LIMIT))
    with in_time(0.2 + 1.0):
        results = producer.publish_many([make_message() for _ in range(50)], timeout=0.2)
    over.set()
    assert [type(each) for each in results] == [ConfirmTimeoutError] * 50
    assert not any(each.possibly_sent for each in results)  # type: ignore[union-attr]
    assert producer.publish(make_message("last")).confirmed
    assert [each.properties.message_id for each in broker.messages] == ["first", "last"]


class SlowStore(MemoryStore):
    """Takes what it is given a good while later."""

    def __init__(self, over: threading.Event) -> None:
        super().__init__()
        self._over = over

    def put(self, entries: Iterable[Entry], patience: float) -> list[Claim]:
        """Store them in the end."""
        assert self._over.wait(4 * LIMIT)
        return super().put(entries, patience)


def test_many_with_a_store_that_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty that it is to take wait for it together."""
    monkeypatch.setattr(io_thread, "STORE_LIMIT", 0.1)  # while the I/O thread has time to say so
    over = threading.Event()
    settings = Settings(url=serve(Silent()).url, **QUICK)  # type: ignore[arg-type]
    with MLProducer(settings, store=SlowStore(over)) as producer:
        assert producer.wait_connected(LIMIT)
        with in_time(0.2 + 1.0):
            results = producer.publish_many([make_message() for _ in range(50)], timeout=0.2)
        over.set()
        assert [type(each) for each in results] == [StoreError] * 50
        producer.close(0.5)


def test_an_iterable_that_raises(connect: Connect, serve: Serve) -> None:
    """Its own error comes through, with what came of all that it had given before."""
    broker = serve()
    producer = connect(broker, max_in_flight=5)

    def tasks() -> Iterator[Message]:
        yield make_message("one")
        yield Message(body=b"", routing_key="k", priority=1, expiration=-1.0)
        yield make_message("two")
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as caught:
        producer.publish_many(tasks())
    one, bad, two = caught.value.results  # type: ignore[attr-defined]
    assert (one.confirmed, two.confirmed) == (True, True)
    assert isinstance(bad, InvalidMessageError)
    assert [each.properties.message_id for each in broker.messages] == ["one", "two"]
    assert producer.flush(LIMIT) == 0
    assert len(producer.publish_many([])) == 0
    assert producer.publish(make_message()).confirmed
