"""FastAPI under uvicorn, with the broker frozen and the in-flight window full.

Runs on: pytest's main thread, and the event loop's own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlproducer import MLProducer, Settings, SummarizationTask, contrib
from mlproducer.errors import BufferFullError
from mlproducer.testing import Behaviour, FakeBroker, RecordingProducer
from mlproducer.testing.fake_broker import FakeConnection, ReceivedMessage
from tests.helpers import LIMIT
from tests.pages import run, snippets
from tests.stopwatch import Stopwatch

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

LAG = 0.05
"""Seconds for which nothing of ours may hold up the event loop."""

PAUSE, PAUSES = 0.3, 3
"""Seconds and number of pauses that are not ours, such as the garbage collector's. A call that
waits takes longer than one; calls that each hold up the loop a little are more than that."""

TICK = 0.01
WINDOW = 20


class Frozen(Behaviour):
    """Takes messages, and never confirms one."""

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Do nothing."""


def make_app(producer: MLProducer, lags: list[float]) -> Any:
    """Make an app with both ways of publishing, and a task that measures the loop's lag."""
    app = fastapi.FastAPI()

    @app.post("/awaited/{number}")
    async def awaited(number: int) -> Any:
        receipt = await producer.apublish(task_of(number), timeout=1.0)
        return {"outcome": receipt.outcome.value}

    @app.post("/submitted/{number}")
    async def submitted(number: int) -> Any:
        try:
            future = producer.submit(task_of(number), timeout=0)
        except BufferFullError:
            raise fastapi.HTTPException(503) from None
        return {"id": future.message_id}

    @app.get("/lag")
    async def lag() -> Any:
        for _ in range(150):
            watch = Stopwatch()
            await asyncio.sleep(TICK)
            lags.append(watch.own() - TICK)
        return sorted(lags)

    return app


def task_of(number: int) -> SummarizationTask:
    """Return a task."""
    return SummarizationTask(number, {"text": "x" * 1000})


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run uvicorn on a thread of its own."""
    config = uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + LIMIT
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)  # uvicorn sets a flag, and tells of it in no other way
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(LIMIT)


def test_the_event_loop_is_never_held_up() -> None:
    """The window is full and nothing is confirmed: requests wait, or are refused; the loop runs."""

    async def ask(address: str) -> tuple[list[Any], list[float]]:
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            await client.post("/submitted/0")
            filling = [client.post(f"/submitted/{n}") for n in range(1, WINDOW)]
            assert {each.status_code for each in await asyncio.gather(*filling)} == {200}
            measuring = asyncio.ensure_future(client.get("/lag"))
            ways = [f"/{way}/{n}" for n in range(10) for way in ("awaited", "submitted")]
            answers = await asyncio.gather(*map(client.post, ways))
            return list(answers), (await measuring).json()

    with FakeBroker(Frozen()) as broker:
        settings = Settings(url=broker.url, max_in_flight=WINDOW)
        producer = MLProducer(settings)
        producer.wait_connected(LIMIT)
        with serving(make_app(producer, [])) as address:
            answers, lags = asyncio.run(ask(address))
        producer.close(0.0)
    assert [each.status_code for each in answers[1::2]] == [503] * 10
    assert {each.json()["outcome"] for each in answers[::2]} == {"deferred"}
    assert lags[-1] < PAUSE
    assert lags[-1 - PAUSES] < LAG


def test_page(recording_producer: RecordingProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows of FastAPI runs, with nothing that it does not show."""
    page = Path(contrib.__file__).with_name("asyncio.rst")
    shop = types.ModuleType("shop")
    monkeypatch.setitem(sys.modules, "shop", shop)
    monkeypatch.setenv("RABBITMQ_URL", "amqp://127.0.0.1:1/")
    program, _outcomes, _django, test = snippets(page.read_text())
    run(program, page, vars(shop))
    monkeypatch.setattr("shop.producer", recording_producer)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=shop.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answers = [await client.post("/shares/7/summary"), await client.post("/shares/7/later")]
            recording_producer.fail_next(BufferFullError("full"))
            answers.append(await client.post("/shares/7/later"))
        return [each.status_code for each in answers]

    assert asyncio.run(ask()) == [200, 200, 503]
    recording_producer.clear()
    names: dict[str, Any] = {}
    run(test, page, names)
    names["test_summarize"](recording_producer, monkeypatch)


def test_a_cancelled_publish_that_was_handed_over_goes_on() -> None:
    """Cancelling ends the wait; the message is confirmed, and told to callbacks."""

    async def cancelled(producer: MLProducer, broker: FakeBroker) -> None:
        waiting = asyncio.ensure_future(producer.apublish(task_of(1)))
        await asyncio.to_thread(broker.wait_for_messages, 1, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with FakeBroker(Frozen()) as broker, MLProducer(Settings(url=broker.url)) as producer:
        confirmed = threading.Event()
        producer.on("confirmed", confirmed.set)
        producer.wait_connected(LIMIT)
        asyncio.run(cancelled(producer, broker))
        [message] = broker.messages
        message.connection.ack(message.channel, message.tag)
        assert confirmed.wait(30.0)


def test_a_cancelled_publish_that_waits_for_room_is_never_sent() -> None:
    """While the window is full it has not been handed over."""

    async def cancelled(producer: MLProducer, broker: FakeBroker) -> None:
        first = asyncio.ensure_future(producer.apublish(task_of(1)))
        await asyncio.to_thread(broker.wait_for_messages, 1, 10)
        second = asyncio.ensure_future(producer.apublish(task_of(2)))
        await asyncio.sleep(0)  # it runs until it waits
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        [message] = broker.messages
        message.connection.ack(message.channel, message.tag)
        assert (await first).confirmed

    with FakeBroker(Frozen()) as broker:
        producer = MLProducer(Settings(url=broker.url, max_in_flight=1))
        producer.wait_connected(LIMIT)
        asyncio.run(cancelled(producer, broker))
        assert producer.flush(30.0) == 0
        assert len(broker.messages) == 1
        producer.close()


class Nacking(Behaviour):
    """Nacks everything until it is told otherwise."""

    takes = False

    def on_publish(
        self, connection: FakeConnection, channel: int, tag: int, message: ReceivedMessage
    ) -> None:
        """Take it, or not."""
        if self.takes:
            connection.ack(channel, tag)
        else:
            connection.nack(channel, tag)


ASGI = """
import asyncio
from fastapi import FastAPI
from mlproducer import MLProducer, SummarizationTask

producer = MLProducer()
get_asgi_application = FastAPI
{snippet}

@django.post("/shares/{{share_id}}/later")
async def later(share_id: int):
    task = SummarizationTask(share_id, {{"text": "a"}})
    return {{"id": producer.submit(task, timeout=0).message_id}}
"""


@pytest.mark.parametrize(
    ("program", "number", "app"),
    [("{snippet}", 0, "app"), (ASGI, 2, "application")],
    ids=["lifespan", "asgi.py"],
)
def test_what_is_in_flight_when_uvicorn_ends(
    tmp_path: Path, program: str, number: int, app: str
) -> None:
    """With what the page shows it is delivered, although uvicorn runs no exit functions."""
    page = Path(contrib.__file__).with_name("asyncio.rst")
    snippet = snippets(page.read_text())[number]
    (tmp_path / "main.py").write_text(program.format(snippet=snippet))
    behaviour = Nacking()
    with FakeBroker(behaviour) as broker, socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", f"main:{app}", "--fd", str(number)],
            cwd=tmp_path,
            env={**os.environ, "RABBITMQ_URL": broker.url},
            pass_fds=[number],
        )
        listener.close()  # connections wait while the server starts, and are refused if it ends
        try:
            with httpx.Client(timeout=60) as client:
                for each in range(5):
                    answer = client.post(f"http://127.0.0.1:{port}/shares/{each}/later")
                    answer.raise_for_status()
            broker.wait_for_messages(5, LIMIT)
            behaviour.takes = True
            server.terminate()
            server.wait(30)
        finally:
            server.kill()
            server.wait(30)
        taken = {message.properties.message_id for message in broker.messages[5:]}
    assert len(taken) == 5
