"""Publishes with pikas that have one of their private names under another name.

Each is loaded anew, with the name replaced in its source. Prints what went wrong, as JSON.

Runs on: the main thread.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

from prometheus_client import CollectorRegistry

LIMIT = 30.0
MESSAGES = 20


class Renaming(MetaPathFinder):
    """Finds modules of pika, in which one name is another."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find a module."""
        if not f"{fullname}.".startswith("pika."):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin, self._name)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, name: str) -> None:
        super().__init__(fullname, path)
        self._name = name

    def get_code(self, fullname: str) -> CodeType | None:
        source = self.get_data(self.path).decode()
        if self._name not in source:
            return super().get_code(fullname)
        return compile(re.sub(rf"\b{self._name}\b", "_renamed", source), self.path, "exec")


class Errors(logging.Handler):
    """Collects what is logged as an error: a loop that fails is."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.addFilter(lambda record: "gave up" not in record.msg)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        self.texts.append(record.getMessage())


def publish() -> None:
    """Publish one message and many, ask a question, and meet brokers that refuse or babble."""
    mlproducer = importlib.import_module("mlproducer")
    fake_broker = importlib.import_module("mlproducer.testing.fake_broker")
    endpoints = importlib.import_module("mlproducer._engine.endpoints")
    io_loop = importlib.import_module("mlproducer._engine.io_loop")
    session = importlib.import_module("mlproducer._engine.session")

    class Refusing(fake_broker.Behaviour):  # type: ignore[name-defined, misc]
        def on_open(self, connection: Any, virtual_host: str) -> None:
            connection.close_connection(530, "NOT_ALLOWED")

    class Babbling(fake_broker.Behaviour):  # type: ignore[name-defined, misc]
        def on_open(self, connection: Any, virtual_host: str) -> None:
            connection.send_raw(b"\x01\x00\x00\x7f\xff\xff\xff")
            connection.drop()

    tasks = [mlproducer.SummarizationTask(f"s{n}", {"text": "text"}) for n in range(MESSAGES)]
    with fake_broker.FakeBroker() as broker:
        settings = mlproducer.Settings(url=broker.url)
        with mlproducer.MLProducer(settings, registry=CollectorRegistry()) as producer:
            answers = [producer.publish(tasks[0], timeout=LIMIT)]
            answers += producer.publish_many(tasks[1:], timeout=LIMIT)
            assert all(each.confirmed for each in answers)
        assert len(broker.messages) == MESSAGES
        with session.Session(endpoints.Endpoints(settings).known, LIMIT) as asking:
            asking.ask("queue_declare", "q", passive=True)
        broker.wait_for_connections(0, LIMIT)
    for behaviour in (Refusing(), Babbling()):
        with fake_broker.FakeBroker(behaviour) as broker:
            settings = mlproducer.Settings(url=broker.url, max_reconnect_attempts=1)
            with mlproducer.MLProducer(settings, registry=CollectorRegistry()) as producer:
                gave_up = threading.Event()
                producer.on("gave_up", lambda _event, told=gave_up: told.set())
                producer.start()
                assert gave_up.wait(LIMIT)
    loop = io_loop.EventLoop()
    list(loop.descriptors())
    loop.close()


def main(names: list[str]) -> None:
    """Publish with each."""
    errors = Errors()
    logging.getLogger().addHandler(errors)
    wrong = {}
    for name in names:
        for module in list(sys.modules):
            if module.split(".")[0] in ("mlproducer", "pika"):
                del sys.modules[module]
        finder = Renaming(name)
        sys.meta_path.insert(0, finder)
        try:
            publish()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            errors.texts.append(repr(error)[:200])
        sys.meta_path.remove(finder)
        if errors.texts:
            wrong[name], errors.texts = errors.texts, []
    print(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
