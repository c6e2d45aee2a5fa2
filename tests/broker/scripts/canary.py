"""Goes through failures with secrets in every place, and shows all that a program might print.

The secrets come from the environment, since a traceback shows the lines of this file.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

from telling import tell

from mlproducer import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    Message,
    MLProducer,
    Settings,
    SummarizationTask,
    TranscriptionTask,
)
from mlproducer.errors import MLProducerError
from mlproducer.testing.proxy import Proxy

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)

URL = os.environ["RABBITMQ_URL"]
WRONG_URL = os.environ["WRONG_URL"]
PASSWORD = os.environ["PASSWORD_CANARY"]
TEXT = os.environ["TEXT_CANARY"]
PORT = Settings(url=URL).brokers[0].port
QUEUE = "ml.embed"

shown: set[str] = set()


class Unserialisable:
    """What JSON cannot carry, with a repr that tells too much."""

    def __repr__(self) -> str:
        return TEXT


def show(thing: Any) -> None:
    """Print a thing as a log, a debugger or a traceback would."""
    print(f"{thing} {thing!r}", file=sys.stderr)
    if isinstance(thing, BaseException):
        shown.add(type(thing).__name__)
        traceback.print_exception(thing)
        print(vars(thing), thing.args, pickle.dumps(thing), file=sys.stderr)


def attempt(act: Callable[[], Any]) -> Any:
    """Do something, and show what comes of it; return it unless it is an error."""
    try:
        result = act()
    except MLProducerError as error:
        show(error)
        return None
    show(result)
    reason = getattr(result, "reason", None)
    if reason is not None:
        show(reason)
    return result


def tasks() -> list[Any]:
    """One of each kind, with the secret wherever a user's text may be."""
    content = {"text": TEXT, "metadata": {"key": TEXT, "more": [TEXT]}}
    return [
        SummarizationTask("s", {"text": TEXT, "title": TEXT, "url": f"https://h/{TEXT}"}),
        TranscriptionTask("s", f"https://h/{TEXT}", {"prompt": TEXT}),
        EmbeddingTask("s", content),
        EmbeddingBatchTask([("s", content)]),
        CeleryTask("n", [TEXT], {"k": TEXT}, routing_key=QUEUE, headers={"h": TEXT}),
        raw(QUEUE),
    ]


def raw(routing_key: str, **fields: Any) -> Message:
    """Return a message whose body, header and correlation id are secret."""
    return Message(
        body=TEXT.encode(),
        routing_key=routing_key,
        headers={"h": TEXT, "deep": {"h": [TEXT]}},
        correlation_id=TEXT,
        **fields,
    )


def bad_settings() -> None:
    """Settings that do not parse, with a password in them."""
    for url in (
        f"http://u:{PASSWORD}@h/",
        f"amqp://u:{PASSWORD}@h:port/",
        f"amqp://u:{PASSWORD}@/",
        f"amqp://u:{PASSWORD}@h/?secret={PASSWORD}",
        f"u:{PASSWORD}@h",
        f"amqp://u:{PASSWORD}@[h/",
    ):
        attempt(lambda url=url: Settings(url=url))
        attempt(lambda url=url: Settings.from_env({"RABBITMQ_URL": url}))
    attempt(lambda: Settings(store_url=f"mysql://u:{PASSWORD}@h/"))
    attempt(lambda: Settings.from_env({"ML_STORE_URL": f"u:{PASSWORD}@h"}))
    attempt(lambda: Settings.from_env({"RABBITMQ_HEARTBEAT": PASSWORD}))
    attempt(lambda: Settings.from_env({"PREFERRED_STT": PASSWORD}))
    show(Settings(url=URL, store_url=f"redis://:{PASSWORD}@h/0?password={PASSWORD}"))


def bad_tasks(producer: MLProducer) -> None:
    """Whatever a task or message may have wrong, with user text in it or beside it."""
    for make in (
        lambda: SummarizationTask(["s", TEXT], {"text": TEXT}),  # type: ignore[arg-type]
        lambda: SummarizationTask("s", {"text": [TEXT]}),
        lambda: SummarizationTask("s", {"text": TEXT}, {"style": TEXT}),
        lambda: SummarizationTask("s", {"text": TEXT}, {"maxLength": TEXT}),
        lambda: TranscriptionTask("s", TEXT + "\n", {"backend": TEXT}),
        lambda: EmbeddingTask("s", {"text": TEXT, "type": TEXT}),
        lambda: EmbeddingTask("s", {"text": TEXT, "metadata": TEXT}),
        lambda: EmbeddingBatchTask([("s", {"text": TEXT}), (TEXT,)]),
        lambda: CeleryTask("n", TEXT, routing_key=QUEUE),
        lambda: CeleryTask("n", [], {1: TEXT}, routing_key=QUEUE),  # type: ignore[dict-item]
    ):
        attempt(make)
    for value in (math.nan, Unserialisable(), {TEXT}, TEXT.encode(), TEXT + "\ud800", {1: TEXT}):
        content = {"text": TEXT, "metadata": {"bad": value, "good": TEXT}}
        attempt(lambda content=content: producer.publish(EmbeddingTask("s", content)))
        attempt(lambda value=value: producer.publish(CeleryTask("n", [value], routing_key=QUEUE)))
    for fields in (
        {"routing_key": TEXT * 30},
        {"routing_key": QUEUE, "priority": 300},
        {"routing_key": QUEUE, "expiration": -1},
        {"routing_key": QUEUE, "message_id": TEXT * 30},
        {"routing_key": QUEUE, "type": TEXT * 30},
    ):
        attempt(lambda fields=fields: producer.publish(raw(**fields)))
    for headers in ({"h": 1.5, "t": TEXT}, {TEXT * 30: 1}, {"h": TEXT * 30_000}, {"h": {TEXT}}):
        attempt(
            lambda headers=headers: producer.publish(
                Message(body=b"", routing_key=QUEUE, headers=headers)
            )
        )
    attempt(lambda: producer.publish(raw(QUEUE, type=TEXT), timeout=TEXT))  # type: ignore[arg-type]
    show(producer.publish_many([raw("nowhere"), raw(TEXT * 30), raw(QUEUE)], retry=False))


def refusals(producer: MLProducer) -> None:
    """What the broker returns or rejects, alone and with others in flight."""
    attempt(lambda: producer.publish(raw("nowhere"), retry=False))
    attempt(lambda: producer.publish(raw("nowhere")))
    attempt(lambda: producer.publish(raw(QUEUE, exchange="missing")))
    innocent = [producer.submit(task) for task in tasks()]
    attempt(lambda: producer.publish(raw(QUEUE, exchange="missing")))
    for future in innocent:
        show(future)
        attempt(lambda future=future: future.result(30.0))


def losses(producer: MLProducer, proxy: Proxy) -> None:
    """A broker that hangs, goes away, and comes back."""
    proxy.stall()
    attempt(lambda: producer.publish(raw(QUEUE), timeout=0.2, retry=False))
    receipts = [attempt(lambda task=task: producer.publish(task, timeout=0.1)) for task in tasks()]
    show(producer.status())
    proxy.refuse()
    proxy.heal()
    proxy.reset()
    attempt(lambda: producer.publish(raw(QUEUE), retry=False, timeout=2.0))
    attempt(lambda: producer.publish(raw(QUEUE), timeout=2.0))
    show(producer)
    proxy.accept()
    producer.reconnect()
    for receipt in receipts:
        attempt(lambda receipt=receipt: receipt.result(30.0))


def callbacks(producer: MLProducer) -> None:
    """Callbacks that raise, of events and of futures."""

    def fail(thing: object) -> None:
        show(thing)
        raise LookupError("a callback of the script")

    for event in ("connected", "disconnected", "confirmed", "deferred"):
        producer.on(event, fail)
    future = producer.submit(raw(QUEUE))
    future.add_done_callback(fail)
    future.result(30.0)


def main() -> None:
    """Go through everything."""
    bad_settings()
    with MLProducer(Settings(url=WRONG_URL)) as refused:
        show(refused)
        attempt(lambda: refused.publish(raw(QUEUE)))
        show(refused.status())
    for task in tasks():
        show(task)
    with Proxy(("127.0.0.1", PORT)) as proxy:
        settings = Settings(url=proxy.url(URL), reconnect_initial_delay=0.05)
        producer = MLProducer(settings)
        show(settings)
        show(producer)
        callbacks(producer)
        for task in tasks():
            attempt(lambda task=task: producer.publish(task))
        refusals(producer)
        bad_tasks(producer)
        losses(producer, proxy)
        show(producer.status().to_json())
        proxy.stall()
        lost = producer.submit(raw(QUEUE))
        show(producer.close(0.2))
        attempt(lambda: lost.result(1.0))
        attempt(lambda: producer.publish(raw(QUEUE)))
        show(producer)
    tell(errors=sorted(shown))


if __name__ == "__main__":
    main()
