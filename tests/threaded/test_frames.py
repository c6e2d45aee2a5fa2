"""What an error reporter would send of a failed publish: no password, and nothing that users wrote.

Such a reporter takes the local variables of every frame of a traceback. Ours hold tasks, settings
and errors, whose ``repr`` shows neither.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from mlproducer import CeleryTask, Message, MLProducer, SummarizationTask
from mlproducer.errors import MLProducerError
from tests.pure.refusals import CANARY, tells_nothing
from tests.threaded.conftest import Connect, Serve
from tests.threaded.moods import Moody

BODY = CANARY.encode()
TASK = CeleryTask("app.add", [CANARY], {CANARY: CANARY}, "k", headers={"h": CANARY})
SURROGATE = f"{CANARY}\ud800"

CALLS: list[Callable[[MLProducer], object]] = [
    lambda producer: producer.publish_summarization_task("s", {"text": CANARY, "url": ""}),
    lambda producer: producer.publish_summarization_task("s", {"text": SURROGATE}),
    lambda producer: producer.publish_transcription_task("s", f"{CANARY}\n"),
    lambda producer: producer.publish_embedding_task("s", {"text": "t", "metadata": {CANARY: {1}}}),
    lambda producer: producer.publish_embedding_batch_task([("s", {"text": SURROGATE})]),
    lambda producer: producer.publish(SummarizationTask("s", {"text": CANARY * 1000})),
    lambda producer: producer.publish(Message(body=BODY, routing_key="k\n")),
    lambda producer: producer.publish(Message(body=BODY, routing_key="k", priority=-1)),
    lambda producer: producer.publish(Message(body=CANARY, routing_key="k")),  # type: ignore[arg-type]
    lambda producer: producer.publish(TASK, retry=False),
    lambda producer: producer.submit(TASK, retry=False).result(30.0),
    lambda producer: _raised(producer.publish_many([TASK], retry=False)),
    lambda producer: producer.publish(Message(body=BODY, routing_key="k"), retry=False),
]


def _raised(answers: list[Any]) -> None:
    raise answers[0]


@pytest.mark.parametrize("call", CALLS)
def test_refused_or_nacked(
    connect: Connect, serve: Serve, call: Callable[[MLProducer], object]
) -> None:
    """Invalid in every way, too large, or nacked by the broker."""
    producer = connect(serve(Moody("nack")), max_message_bytes=5000)
    with pytest.raises(MLProducerError) as caught:
        call(producer)
    tells_nothing(caught.value)


@pytest.mark.parametrize("call", CALLS[-4:])
def test_not_connected(connect: Connect, call: Callable[[MLProducer], object]) -> None:
    """There is no broker, and the URL holds a password."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"amqp://user:{CANARY}%2F%40@127.0.0.1:{closed.getsockname()[1]}/"
        producer = connect(url)
        with pytest.raises(MLProducerError) as caught:
            call(producer)
    tells_nothing(caught.value)
