"""No password and no user text is in anything that the library says, whatever goes wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote

import pika
import pytest
from attrs import frozen

from mlproducer.testing import RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from tests.broker.scripts import Ended, run
from tests.broker.users import delete_user

pytestmark = pytest.mark.broker

USER = "canary-user"
PASSWORD = "pwCanary7f3a@:/%? #x"
WRONG_PASSWORD = "pwWrong51bd@:/%"
TEXT = "textCanary9e1c"


@frozen
class Run:
    """A run through the failures."""

    ended: Ended
    vhost: VirtualHost

    @property
    def everything(self) -> str:
        """All that was printed or logged."""
        return self.ended.stderr + json.dumps(self.ended.reports)


@pytest.fixture(scope="module")
def canary(rabbitmq_node: RabbitMQNode) -> Iterator[Run]:
    """One run for all tests."""
    node = rabbitmq_node
    node.add_vhost("canary")
    node.add_user(USER, PASSWORD)
    node.set_permissions("canary", USER)
    url = node.url_for("canary", USER, PASSWORD)
    environ = {
        "WRONG_URL": node.url_for("canary", USER, WRONG_PASSWORD),
        "PASSWORD_CANARY": quote(PASSWORD, safe=""),
        "TEXT_CANARY": TEXT,
    }
    yield Run(run("canary", url=url, environ=environ), VirtualHost("canary", node, url))
    node.delete_vhost("canary")
    delete_user(node, USER)


def test_run_went_through_the_failures(canary: Run) -> None:
    """The run met every failure that it was made for, with all logs on."""
    assert canary.ended.returncode == 0, canary.ended.stderr[-2000:]
    (report,) = canary.ended.reports
    assert set(report["errors"]) >= {
        "AuthenticationError",
        "BrokerRejectedError",
        "ConfigurationError",
        "ConfirmTimeoutError",
        "InvalidMessageError",
        "InvalidTaskError",
        "MessageTooLargeError",
        "NotConnectedError",
        "ProducerClosedError",
        "UnroutableError",
    }
    assert "DEBUG:pika." in canary.ended.stderr
    assert "WARNING:mlproducer." in canary.ended.stderr
    assert "LookupError: a callback of the script" in canary.ended.stderr


def test_messages_carried_the_canary(canary: Run) -> None:
    """What was published did hold the text: otherwise its absence would say nothing."""
    connection = pika.BlockingConnection(pika.URLParameters(canary.vhost.url))
    _, properties, body = connection.channel().basic_get("ml.embed", auto_ack=True)
    connection.close()
    assert TEXT.encode() in body
    assert properties.headers["h"] == TEXT


@pytest.mark.parametrize("password", [PASSWORD, WRONG_PASSWORD])
def test_no_password(canary: Run, password: str) -> None:
    """No password is in it, neither as it is nor as URLs and SASL write it."""
    forms = {
        password,
        quote(password, safe=""),
        password.partition("@")[0],
        base64.b64encode(password.encode()).decode(),
        base64.b64encode(f"\0{USER}\0{password}".encode()).decode(),
    }
    assert [form for form in forms if form in canary.everything] == []


def test_no_user_text(canary: Run) -> None:
    """No line shows what users wrote."""
    lines = canary.everything.splitlines()
    encoded = base64.b64encode(TEXT.encode()).decode()[:-2]
    assert [line[:300] for line in lines if TEXT in line or encoded in line] == []
