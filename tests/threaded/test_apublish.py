"""Publishing in an event loop: the loop is never blocked, whatever the broker does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, cast

import pytest

from mlproducer import MLProducer, Outcome, Receipt
from mlproducer import _async_answers as awaiting
from mlproducer._async_answers import AwaitedAnswer
from mlproducer._core.delivery import Delivery
from mlproducer._engine.engine import Engine
from mlproducer._synchronization import Relay
from mlproducer.errors import (
    BufferFullError,
    ConfirmTimeoutError,
    InvalidMessageError,
    NackError,
    ProducerClosedError,
    PublishError,
)
from mlproducer.testing.fake_broker import Behaviour, FakeConnection, ReceivedMessage
from tests.helpers import LIMIT, make_delivery, make_message, wait_until
from tests.stopwatch import Stopwatch, in_time
from tests.threaded.brokers import Silent, SlowOpen, ack
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import events_of, io_of

LONGEST_TURN = 0.3
"""Seconds for which another task may have to wait for its turn."""


class Refusing(Behaviour):
    """Nacks everything."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Nack it."""
        connection.nack(channel, tag)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it in an event loop whose other tasks have to have their turns meanwhile."""

    async def main() -> Any:
        longest = [0.0]
        ticking = asyncio.create_task(tick(longest))
        try:
            return await asyncio.wait_for(work, 4 * LIMIT)
        finally:
            ticking.cancel()
            assert longest[0] < LONGEST_TURN

    return asyncio.run(main())


async def tick(longest: list[float]) -> None:
    """Note for how long the loop did not come round."""
    while True:
        watch = Stopwatch()
        await asyncio.sleep(0.005)
        longest[0] = max(longest[0], watch.own())


def test_many_at_once(connect: Connect, serve: Serve) -> None:
    """Hundreds of tasks publish through a window of ten; no thread is made for one of them."""
    broker = serve()
    producer = connect(broker, max_in_flight=10)
    producer.start()
    threads = threading.active_count()

    async def work() -> list[Receipt]:
        return await asyncio.gather(
            *(producer.apublish(make_message()) for _ in range(300))
        )  # begun in one turn

    receipts = run(work())
    assert all(receipt.confirmed for receipt in receipts)
    assert len(broker.messages) == 300
    assert threading.active_count() <= threads + 1  # the broker's, or the loop's own


def test_the_first_use(connect: Connect, serve: Serve) -> None:
    """It starts the producer, and waits for a slow broker, without blocking the loop."""
    producer = connect(serve(SlowOpen()))
    assert run(producer.apublish(make_message())).confirmed


def test_outcomes(connect: Connect, serve: Serve) -> None:
    """They are those of publish()."""
    silent = connect(serve(Silent()))
    assert silent.wait_connected(LIMIT)
    with in_time(1.5):
        receipt = run(silent.apublish(make_message(), timeout=0.2))
        assert receipt.outcome is Outcome.DEFERRED
        assert isinstance(receipt.reason, ConfirmTimeoutError)
        with pytest.raises(ConfirmTimeoutError):
            run(silent.apublish(make_message(), timeout=0.2, retry=False))
    with pytest.raises(NackError):
        run(connect(serve(Refusing())).apublish(make_message(), retry=False))
    with pytest.raises(InvalidMessageError):
        run(silent.apublish("no task"))  # type: ignore[arg-type]
    silent.close(0.0)
    with pytest.raises(ProducerClosedError):
        run(silent.apublish(make_message()))


def test_a_full_window(connect: Connect, serve: Serve) -> None:
    """It waits for its slot, at most its timeout, and leaves the queue then."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=1)
    producer.submit(make_message("first"))
    [first] = broker.wait_for_messages(1, LIMIT)

    async def work() -> Any:
        late = await asyncio.gather(
            producer.apublish(make_message("late"), timeout=0.1, retry=False),
            return_exceptions=True,
        )
        waiting = asyncio.create_task(producer.apublish(make_message("next")))
        await asyncio.sleep(0.1)
        ack(first)
        await asyncio.to_thread(broker.wait_for_messages, 2, LIMIT)
        ack(broker.messages[1])
        return late[0], await waiting

    late, receipt = run(work())
    assert isinstance(late, PublishError)
    assert not late.possibly_sent
    assert receipt.confirmed
    assert [each.properties.message_id for each in broker.messages] == ["first", "next"]


def test_cancelled(connect: Connect, serve: Serve) -> None:
    """What was handed over goes on; what still waited for its slot is never sent."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=1)

    async def work() -> None:
        tasks = []
        for name in ("handed over", "in the queue"):
            tasks.append(asyncio.create_task(producer.apublish(make_message(name))))
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers)

    run(work())
    broker.connections[0].reset()  # it is sent again, although nothing waits for it
    messages = broker.wait_for_messages(2, LIMIT)
    ack(messages[1])
    assert producer.flush(LIMIT) == 0
    names = [each.properties.message_id for each in broker.messages]
    assert names == ["handed over", "handed over"]


@pytest.mark.parametrize("retry", [True, False])
def test_a_deadline_after_it_was_cancelled(connect: Connect, serve: Serve, *, retry: bool) -> None:
    """It counts as any other: the broker is asked, and what is not wanted any more is not sent."""
    broker = serve(Silent())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    told = events_of(producer, "blocked", "unblocked", "deferred")

    async def publish(name: str) -> None:
        with suppress(asyncio.TimeoutError):
            call = producer.apublish(make_message(name), timeout=0.4, retry=retry)
            await asyncio.wait_for(call, 0.1)

    run(publish("written"))
    broker.wait_for_messages(1, LIMIT)
    sender = io_of(producer).sender
    assert wait_until(lambda: bool(sender.timeouts))
    broker.connections[0].block(keep_reading=True)
    told.wait_for("blocked")
    run(publish("waits"))
    assert wait_until(lambda: not sender.waiting)
    broker.connections[0].unblock()
    told.wait_for("unblocked")
    if retry:
        assert broker.wait_for_messages(2, LIMIT)[1].properties.message_id == "waits"
    producer.submit(make_message("last"))
    last = broker.wait_for_messages(3 if retry else 2, LIMIT)[-1]
    assert last.properties.message_id == "last"
    ack(last, multiple=True)
    assert producer.flush(LIMIT) == 0
    assert told.seen.count("deferred") == (2 if retry else 0)


def test_the_loop_ends_first(connect: Connect, serve: Serve) -> None:
    """An answer that comes when the event loop is closed goes nowhere, and harms nothing."""
    broker = serve(Silent())
    producer = connect(broker)

    async def work() -> None:
        task = asyncio.create_task(producer.apublish(make_message("m")))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(work())
    ack(broker.wait_for_messages(1, LIMIT)[0])
    assert producer.flush(LIMIT) == 0


@pytest.mark.parametrize("ended", ["closed", "stopped", "stopped for too long"])
def test_a_loop_that_ends_while_the_window_is_full(
    connect: Connect, serve: Serve, ended: str
) -> None:
    """Its messages keep no slot, whatever holds their tasks, and others are published."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=2)
    first = [producer.submit(make_message(name)) for name in ("a", "b")]
    broker.wait_for_messages(2, LIMIT)
    loop = asyncio.new_event_loop()
    timeout = 0.1 if ended == "stopped for too long" else LIMIT
    calls = [
        producer.apublish(make_message("waits"), timeout=timeout, retry=False) for _ in range(50)
    ]
    tasks = [loop.create_task(call) for call in calls]
    loop.run_until_complete(asyncio.sleep(0.05))
    if ended == "closed":
        loop.close()
    elif ended == "stopped for too long":
        time.sleep(timeout)
    ack(broker.messages[1], multiple=True)
    for future in first:
        assert future.result(LIMIT).confirmed
    if ended == "stopped":
        for n in range(2, 52, 2):
            broker.wait_for_messages(n + 2, LIMIT)
            ack(broker.messages[n + 1], multiple=True)
        receipts = loop.run_until_complete(asyncio.gather(*tasks))
        assert all(receipt.confirmed for receipt in receipts)
    arrived = len(broker.messages)
    assert arrived == (52 if ended == "stopped" else 2)
    last = producer.submit(make_message("last"))
    ack(broker.wait_for_messages(arrived + 1, LIMIT)[-1], multiple=True)
    assert last.result(LIMIT).confirmed
    assert producer.flush(LIMIT) == 0
    if ended == "closed":
        for task in tasks:
            task.get_coro().close()  # else it complains when it is collected
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        return
    if ended == "stopped for too long":
        results = loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        assert all(isinstance(each, PublishError) for each in results)
        assert not any(each.possibly_sent for each in results)  # type: ignore[union-attr]
        assert len(broker.messages) == arrived + 1
    loop.close()


def test_submit_in_a_loop(connect: Connect, serve: Serve) -> None:
    """With a timeout of 0 it never waits, and its future can be awaited."""
    broker = serve(Silent())
    producer = connect(broker, max_in_flight=1)
    assert producer.wait_connected(LIMIT)

    async def work() -> Receipt:
        future = producer.submit(make_message("m"), timeout=0)
        with in_time(0.1), pytest.raises(BufferFullError) as caught:
            producer.submit(make_message(), timeout=0)
        assert not caught.value.possibly_sent
        await asyncio.to_thread(broker.wait_for_messages, 1, LIMIT)
        ack(broker.messages[0])
        return await asyncio.wrap_future(future)

    assert run(work()).confirmed
    with in_time(1.0, 0.2):
        producer.submit(make_message())
        with pytest.raises(BufferFullError):
            producer.submit(make_message(), timeout=0.2)


def test_written_ahead(connect: Connect, serve: Serve, tmp_path: Any) -> None:
    """The loop is not blocked by a store either."""
    broker = serve()
    producer: MLProducer = connect(broker, store_url=f"sqlite:///{tmp_path}/s.db?write_ahead=1")

    async def work() -> list[Receipt]:
        return await asyncio.gather(*(producer.apublish(make_message()) for _ in range(50)))

    assert all(receipt.confirmed for receipt in run(work()))


@pytest.mark.hurry
def test_an_answer_that_has_begun() -> None:
    """Where the sender speaks just as the wait ends, what it says is the answer."""
    receipt = Receipt("m", 1, 0.1)

    async def work() -> Receipt:
        answer = AwaitedAnswer(Relay(lambda: None))
        delivery = make_delivery(deadline=time.monotonic())
        delivery.waiter = answer
        speaking = delivery._listener()
        assert speaking is answer

        class Sender:
            """Has the message, and is a moment late."""

            def expire(self, delivery: Delivery) -> None:
                """Say nothing yet."""

            def take_back(self, delivery: Delivery, error: PublishError) -> bool:
                """Refuse, and speak soon."""
                asyncio.get_running_loop().call_soon(answer.set_result, receipt)
                return False

        return await awaiting.finish(cast(Engine, Sender()), delivery, answer)

    assert run(work()) is receipt
