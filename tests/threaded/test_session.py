"""Questions of commands to a broker that falls silent at any step: each has a limit."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from pika import spec

from mlproducer import Settings
from mlproducer._engine.endpoints import Endpoints
from mlproducer._engine.session import Session
from mlproducer.errors import NotConnectedError
from mlproducer.testing.fake_broker import Behaviour, FakeConnection
from tests.stopwatch import in_time
from tests.threaded.conftest import Serve

STEPS = (spec.Channel.Open, spec.Queue.Declare, spec.Connection.Close)
SHORT = 0.3


class SilentFrom(Behaviour):
    """Answers nothing any more once it is asked for one thing."""

    def __init__(self, step: type) -> None:
        self._step = step
        self._silent = False

    def on_method(self, connection: FakeConnection, channel: int, method: Any) -> None:
        """Answer, or not."""
        self._silent = self._silent or isinstance(method, self._step)
        if not self._silent:
            super().on_method(connection, channel, method)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_each_answer_has_a_limit(serve: Serve, step: type) -> None:
    """Whatever the heartbeat; where all was answered before, the end is just as short."""
    broker = serve(SilentFrom(step))
    settings = Settings(url=broker.url, heartbeat=0, connection_timeout=SHORT)
    with in_time(SHORT + 1.5):
        if step is spec.Connection.Close:
            _ask(settings)
        else:
            with pytest.raises(NotConnectedError, match="no answer in time") as caught:
                _ask(settings)
            assert caught.value.kind == "timeout"


def test_the_handshake_has_a_limit() -> None:
    """A broker that is frozen accepts by its kernel, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        url = f"amqp://guest:guest@127.0.0.1:{frozen.getsockname()[1]}/"
        with in_time(SHORT + 1.5):
            with pytest.raises(NotConnectedError, match="no answer in time") as caught:
                _ask(Settings(url=url, connection_timeout=SHORT))
            assert caught.value.kind == "timeout"


def _ask(settings: Settings) -> None:
    with Session(Endpoints(settings).known, settings.connection_timeout) as session:
        session.ask("queue_declare", "q", passive=True)
