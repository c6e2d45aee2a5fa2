"""Closing a producer at the moment when a connection has just failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from mlproducer import MLProducer, Settings
from mlproducer._engine import connector
from mlproducer.errors import PublishError
from mlproducer.testing.fake_broker import Behaviour, FakeConnection
from tests.helpers import LIMIT, descriptors, make_message
from tests.threaded.brokers import Holding
from tests.threaded.conftest import QUICK, Connect, Serve


class WithoutConfirms(Behaviour):
    """Is refused by us, and does not answer our goodbye."""

    capabilities = {**Behaviour.capabilities, "publisher_confirms": False}  # noqa: RUF012

    def on_close(self, connection: FakeConnection) -> None:
        """Say nothing."""


class Refuses(Behaviour):
    """Refuses the credentials, and then waits for a CloseOk."""

    def on_start_ok(self, connection: FakeConnection, start_ok: Any) -> None:
        """Say so."""
        connection.close_connection(403, "ACCESS_REFUSED")


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(WithoutConfirms, id="no confirms, no goodbye"),
        pytest.param(Refuses, id="refused"),
        pytest.param(lambda: Holding("start", times=9), id="silent at Start"),
        pytest.param(lambda: Holding("Confirm.Select", times=9), id="silent at Confirm.Select"),
    ],
)
def test_nothing_is_left_of_a_connection_that_failed(
    serve: Serve, behaviour: Callable[[], Behaviour]
) -> None:
    """An abandoned connection has its socket closed once close() returns, answered or not."""
    broker = serve(behaviour())
    before = len(descriptors())
    for _ in range(5):
        producer = MLProducer(Settings(url=broker.url, **{**QUICK, "connection_timeout": 0.1}))
        failed = threading.Event()
        with suppress(PublishError):
            producer.submit(make_message(), retry=False).add_done_callback(
                lambda _, failed=failed: failed.set()
            )
        assert failed.wait(LIMIT)
        producer.close(0.1)
        broker.wait_for_connections(0, LIMIT)
        assert len(descriptors()) == before


class WithoutGoodbye(Behaviour):
    """Does not answer ours."""

    def on_close(self, connection: FakeConnection) -> None:
        """Say nothing."""


def test_a_loop_without_cpu_until_a_close_is_over(
    connect: Connect,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What ends the connection is read only then: it is not taken for one that was lost."""
    cut = connector.Connector._cut

    def cut_late(self: connector.Connector) -> None:
        cut(self)
        self._finish()  # due in the same turn, since the loop stood still

    monkeypatch.setattr(connector.Connector, "_cut", cut_late)
    broker = serve(WithoutGoodbye())
    producer = connect(broker)
    assert producer.wait_connected(LIMIT)
    producer.close(0.1)
    broker.wait_for_connections(0, LIMIT)
    assert caplog.messages == []
